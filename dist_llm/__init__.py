"""dist_llm: distributed pretraining of GPT and Llama models, the same training on every layout of ranks."""

__version__ = "0.1.0"
