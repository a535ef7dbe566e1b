"""Pre-train whole object detectors without labels, and fine-tune them, with Hugging Face Transformers."""

__version__ = "0.1.0"
