"""A model in the form for decoding, and checks of prompts and drafts."""

import dataclasses

import jax
import numpy as np

from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.model import gpt
from gptjax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in the form for decoding, made by `Model.prepare`.

    Attributes:
      params: from `decoding.prepare`.
      name: the name of the model in messages.
    """

    architecture: Architecture
    params: gpt.Params
    name: str = "the model"

    @classmethod
    def prepare(cls, architecture: Architecture, params: gpt.Params, name: str = "the model") -> "Model":
        """A model for decoding. On a CPU it computes in float32.

        On a CPU, XLA has no fast bfloat16 product of a few rows with a matrix: a 124M model takes 3 times as long at
        batch 1, 2 times at batch 8.
        """
        architecture = architecture.for_inference()
        if platform(params) == "cpu" and architecture.compute_dtype != "float32":
            architecture = dataclasses.replace(architecture, compute_dtype="float32")
        return cls(architecture, decoding.prepare(params, architecture=architecture), name)


def platform(params: gpt.Params) -> str:
    (device, *_) = jax.tree.leaves(params)[0].sharding.device_set
    return device.platform


def check_prompt(name: str, prompt: np.ndarray, architecture: Architecture) -> None:
    """Raises UserError for token ids that the model cannot continue."""
    context, vocab = architecture.context_length, architecture.vocab_size
    if not len(prompt):
        raise UserError(f"{name} is empty; a document begins with the end-of-text token")
    if len(prompt) > context:
        raise UserError(f"{name} has {len(prompt)} tokens, more than the model's context_length {context}; shorten it")
    if np.min(prompt) < 0 or np.max(prompt) >= vocab:
        raise UserError(f"{name} has a token id outside 0 to {vocab - 1}, the model's vocabulary")


def check_draft(model: Model, draft: Model, draft_tokens: int) -> None:
    if draft_tokens < 1:
        raise UserError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    ours, theirs = model.architecture.vocab_size, draft.architecture.vocab_size
    if theirs != ours:
        raise UserError(
            f"{draft.name} has a vocabulary of {theirs} tokens and {model.name} one of {ours}; a draft needs the same"
        )
    ours, theirs = model.architecture.context_length, draft.architecture.context_length
    if theirs < ours:
        raise UserError(f"{draft.name} has a context_length of {theirs}, less than the {ours} of {model.name}")
