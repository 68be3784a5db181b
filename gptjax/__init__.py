"""gptjax: train, ablate, evaluate and talk to GPT language models in JAX."""

import importlib
import sys

from gptjax import interrupts

__version__ = "0.1.0"
__all__ = ["load", "train"]

if interrupts.is_command(sys.orig_argv):
    interrupts.install()


def __getattr__(name: str):
    """Imports `gptjax.load` and `gptjax.train` at their first use, since that takes seconds."""
    if name == "load":
        return importlib.import_module("gptjax.evaluation.loaded").load
    if name == "train":
        return importlib.import_module("gptjax.train")
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
