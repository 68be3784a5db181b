"""A model in three lines of Python: load, generate, stream, chat, score."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.artifacts.loading import Trained
    from gptjax.config import Config
    from gptjax.data.tokenization.tokenizer import Tokenizer
    from gptjax.generation.conversation import Conversation
    from gptjax.generation.params import SamplingParams
    from gptjax.model.gpt import Params


class Loaded:
    """A trained model, its tokenizer and its template.

    Attributes:
      trained: the checkpoint, with `trained.architecture` and `trained.template`.
    """

    def __init__(self, trained: "Trained"):
        self.trained = trained

    @property
    def config(self) -> "Config":
        """The config of the run; for a published model the default config with its `model` options."""
        return self.trained.config

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.trained.tokenizer

    @property
    def params(self) -> "Params":
        """Nested dicts of arrays; adapters are a part of the kernels."""
        return self.trained.params

    def generate(self, prompt: str, **sampling) -> str:
        """The completion of a prompt; options are those of `SamplingParams`: max_new_tokens, temperature, seed, ...

        A model trained on dialogues answers the prompt. Raises UserError for options that are unknown or out of range.
        """
        (completion,) = self._generator.complete([prompt], _sampling(sampling))
        return completion.text

    def stream(self, prompt: str, **sampling) -> Iterator[str]:
        """The completion of `generate` in pieces, as soon as they are final. No piece ends inside a character."""
        engine = self._generator.engine(slots=1, rounds=4)
        engine.submit(self._generator.encode([prompt])[0], _sampling(sampling))
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                if event.text:
                    yield event.text

    def chat(self, *, system: str = "", **sampling) -> "Conversation":
        """A conversation: `.ask(question).text` is an answer; there are `.regenerate()`, `.save(path)`, `.messages`."""
        from gptjax.generation.conversation import Conversation

        return Conversation(self._generator, _sampling(sampling), system=system)

    def score(self, text: str) -> dict[str, float]:
        """How probable the model finds a text: `log_likelihood` in nats, its `tokens`, its `perplexity` per token.

        The text counts as the beginning of a document; no end-of-text token after it is scored.
        """
        tokenizer = self.trained.tokenizer
        tokens = tokenizer.encode(text)
        if not len(tokens):
            raise UserError("score() needs a text that is not empty")
        scores = self._scorer.score([(np.array(tokenizer.begin_ids, np.int32), np.asarray(tokens, np.int32))])
        total, count = float(scores.log_likelihood[0]), int(scores.num_tokens[0])
        return {"log_likelihood": total, "tokens": count, "perplexity": math.exp(min(-total / count, 700.0))}

    @functools.cached_property
    def _generator(self):
        from gptjax.generation.completion import Generator

        return Generator.from_trained(self.trained)

    @functools.cached_property
    def _scorer(self):
        import jax

        from gptjax.config import get_default
        from gptjax.evaluation.continuations import ContinuationScorer
        from gptjax.parallel.mesh import make_mesh

        mesh = make_mesh(get_default().mesh, devices=jax.local_devices()[:1])
        return ContinuationScorer(self.trained.architecture, self.trained.params, mesh, batch_size=8)


def _sampling(options: dict) -> "SamplingParams":
    """Raises UserError for an unknown option."""
    from gptjax.generation.params import SamplingParams

    known = SamplingParams.__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"there is no option {unknown[0]!r}; choose from {', '.join(known)}")
    return SamplingParams(**options)


def load(path: str | Path, checkpoint: str = "best", *, adapter: str | Path = "") -> Loaded:
    """The model of a work directory, or of a directory in the Hugging Face layout ("hf:DIR"). Raises UserError.

    `checkpoint`: best, last or a step, of a work directory. `adapter`: a directory of PEFT for hf:DIR.
    """
    from gptjax.artifacts import models

    return Loaded(models.find(str(path), checkpoint, adapter=str(adapter)).load())
