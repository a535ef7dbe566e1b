"""
Pre-train whole object detectors without labels, and fine-tune them, with Hugging Face Transformers.

`from aligndet_hf import finetune` and the like: these names are a contract. Each is imported when it is first used, so
that `import aligndet_hf` costs nothing; the models are registered with `AutoModelForPreTraining` when one of their
names is.
"""

import importlib
import re
from pathlib import Path

__version__ = "0.1.0"

# Where the names of the Python face live: as `__init__.pyi` tells type checkers and editors.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULE_OF = {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as \w+$", _STUB, re.MULTILINE)}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
