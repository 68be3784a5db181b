"""A model in three lines of Python: load, generate, score."""

import functools
import math
from pathlib import Path

import numpy as np

from gptjax.errors import UserError


class Loaded:
    """A trained model, its tokenizer and its template.

    Attributes:
      trained: the checkpoint: `trained.params`, `trained.architecture`, `trained.tokenizer`.
    """

    def __init__(self, trained):
        self.trained = trained

    def generate(self, prompt: str, **sampling) -> str:
        """The completion of a prompt; options are those of `SamplingParams`: max_new_tokens, temperature, seed, ...

        A model trained on dialogues answers the prompt. Raises UserError for options that are unknown or out of range.
        """
        from gptjax.generation.params import SamplingParams

        known = SamplingParams.__dataclass_fields__
        if unknown := [name for name in sampling if name not in known]:
            raise UserError(f"generate() has no option {unknown[0]!r}; choose from {', '.join(known)}")
        (completion,) = self._generator.complete([prompt], SamplingParams(**sampling))
        return completion.text

    def score(self, text: str) -> dict[str, float]:
        """How probable the model finds a text: `log_likelihood` in nats, its `tokens`, its `perplexity` per token.

        The text is the beginning of a document; the token that would end it is not scored.
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


def load(path: str | Path, checkpoint: str = "best", *, adapter: str | Path = "") -> Loaded:
    """The model of a work directory, or of a directory in the Hugging Face layout ("hf:DIR"). Raises UserError.

    `checkpoint`: best, last or a step, of a work directory. `adapter`: a directory of PEFT for hf:DIR.
    """
    from gptjax.artifacts import models

    return Loaded(models.find(str(path), checkpoint, adapter=str(adapter)).load())
