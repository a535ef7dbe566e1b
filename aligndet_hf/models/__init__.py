from transformers import AutoConfig, AutoModelForPreTraining

from .configuration_aligndet import AlignDetConfig
from .configuration_soco import SoCoConfig
from .modeling_aligndet import AlignDetForPreTraining, AlignDetOutput
from .modeling_soco import SoCoForPreTraining, SoCoOutput
from .momentum_model import MomentumModel

AutoConfig.register("aligndet", AlignDetConfig)
AutoModelForPreTraining.register(AlignDetConfig, AlignDetForPreTraining)
AutoConfig.register("soco", SoCoConfig)
AutoModelForPreTraining.register(SoCoConfig, SoCoForPreTraining)

__all__ = [
    "AlignDetConfig",
    "AlignDetForPreTraining",
    "AlignDetOutput",
    "MomentumModel",
    "SoCoConfig",
    "SoCoForPreTraining",
    "SoCoOutput",
]
