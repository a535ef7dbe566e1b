"""
Pre-train whole object detectors without labels, and fine-tune them, with Hugging Face Transformers.

`from aligndet_hf import finetune` and the like: these names are a contract. Each is imported when it is first used, so
that `import aligndet_hf` costs nothing; the models are registered with `AutoModelForPreTraining` when one of their
names is.
"""

import importlib

__version__ = "0.1.0"

# Where the names of the Python face live. `__init__.pyi` tells type checkers and editors the same.
_FACE = {
    "commands.chain": ["ChainArguments", "run_chain"],
    "commands.check": ["CheckArguments", "CheckReport", "check"],
    "commands.clusters": ["ClustersArguments", "cluster_proposals"],
    "commands.compare": ["CompareArguments", "compare"],
    "commands.convert": ["ConvertArguments", "convert"],
    "commands.embeddings": ["EmbeddingsArguments", "compare_embeddings"],
    "commands.evaluate": ["EvaluateArguments", "evaluate"],
    "commands.export": ["ExportArguments", "export"],
    "commands.finetune": ["FinetuneArguments", "FinetuneResult", "finetune"],
    "commands.knn": ["KnnArguments", "measure_knn"],
    "commands.predict": ["PredictArguments", "predict"],
    "commands.pseudolabel": ["PseudolabelArguments", "pseudolabel"],
    "commands.pretrain": ["PretrainArguments", "PretrainResult", "pretrain"],
    "commands.proposals": ["ProposalsArguments", "generate_proposals"],
    "commands.recall": ["RecallArguments", "measure_recall"],
    "commands.report": ["ReportArguments", "report"],
    "data.errors": ["DataError"],
    "data.formats": ["category_names", "load_dataset_source"],
    "detectors.build": ["build_detector"],
    "detectors.criterion": ["use_correct_loss"],
    "evaluation": ["CocoMetrics"],
    "losses": ["object_contrastive_loss"],
    "models": [
        "AlignDetConfig", "AlignDetForPreTraining", "AlignDetOutput", "SoCoConfig", "SoCoForPreTraining", "SoCoOutput",
    ],
    "proposals.selective_search": ["selective_search"],
    "training.detection_trainer": ["DetectionTrainer"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _FACE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
