"""gptjax: train, ablate, evaluate and talk to GPT language models in JAX."""

__version__ = "0.1.0"
