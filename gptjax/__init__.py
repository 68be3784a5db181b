"""gptjax: train, ablate, evaluate and talk to GPT language models in JAX."""

import sys

from gptjax import interrupts

__version__ = "0.1.0"

if interrupts.is_command(sys.orig_argv):
    interrupts.install()
