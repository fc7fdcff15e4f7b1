"""dist_llm: from a compute budget to a trained, checked, exported language model on a GPU cluster."""

__version__ = "0.1.0"
