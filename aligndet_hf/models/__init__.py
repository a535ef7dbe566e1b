from transformers import AutoConfig, AutoModelForPreTraining

from .configuration_aligndet import AlignDetConfig
from .modeling_aligndet import AlignDetForPreTraining, AlignDetOutput

AutoConfig.register("aligndet", AlignDetConfig)
AutoModelForPreTraining.register(AlignDetConfig, AlignDetForPreTraining)

__all__ = ["AlignDetConfig", "AlignDetForPreTraining", "AlignDetOutput"]
