"""The names of `aligndet_hf`, a line each: for type checkers and editors, and for `__init__.py`, which reads this."""

from .commands.chain import ChainArguments as ChainArguments
from .commands.chain import run_chain as run_chain
from .commands.check import CheckArguments as CheckArguments
from .commands.check import CheckReport as CheckReport
from .commands.check import check as check
from .commands.clusters import ClustersArguments as ClustersArguments
from .commands.clusters import cluster_proposals as cluster_proposals
from .commands.compare import CompareArguments as CompareArguments
from .commands.compare import compare as compare
from .commands.convert import ConvertArguments as ConvertArguments
from .commands.convert import convert as convert
from .commands.embeddings import EmbeddingsArguments as EmbeddingsArguments
from .commands.embeddings import compare_embeddings as compare_embeddings
from .commands.evaluate import EvaluateArguments as EvaluateArguments
from .commands.evaluate import evaluate as evaluate
from .commands.export import ExportArguments as ExportArguments
from .commands.export import export as export
from .commands.finetune import FinetuneArguments as FinetuneArguments
from .commands.finetune import FinetuneResult as FinetuneResult
from .commands.finetune import finetune as finetune
from .commands.knn import KnnArguments as KnnArguments
from .commands.knn import measure_knn as measure_knn
from .commands.predict import PredictArguments as PredictArguments
from .commands.predict import predict as predict
from .commands.pretrain import PretrainArguments as PretrainArguments
from .commands.pretrain import PretrainResult as PretrainResult
from .commands.pretrain import pretrain as pretrain
from .commands.proposals import ProposalsArguments as ProposalsArguments
from .commands.proposals import generate_proposals as generate_proposals
from .commands.pseudolabel import PseudolabelArguments as PseudolabelArguments
from .commands.pseudolabel import pseudolabel as pseudolabel
from .commands.recall import RecallArguments as RecallArguments
from .commands.recall import measure_recall as measure_recall
from .commands.report import ReportArguments as ReportArguments
from .commands.report import report as report
from .data.errors import DataError as DataError
from .data.formats import category_names as category_names
from .data.formats import load_dataset_source as load_dataset_source
from .detectors.build import build_detector as build_detector
from .detectors.criterion import use_correct_loss as use_correct_loss
from .evaluation import CocoMetrics as CocoMetrics
from .losses import object_contrastive_loss as object_contrastive_loss
from .models import AlignDetConfig as AlignDetConfig
from .models import AlignDetForPreTraining as AlignDetForPreTraining
from .models import AlignDetOutput as AlignDetOutput
from .models import SoCoConfig as SoCoConfig
from .models import SoCoForPreTraining as SoCoForPreTraining
from .models import SoCoOutput as SoCoOutput
from .proposals.selective_search import selective_search as selective_search
from .training.detection_trainer import DetectionTrainer as DetectionTrainer

__version__: str
__all__: list[str]
