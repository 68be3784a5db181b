"""The settings of a beam search."""

import dataclasses
import math
from typing import Literal

from gptjax.errors import UserError

EarlyStopping = Literal["false", "true", "never"]


@dataclasses.dataclass(frozen=True)
class BeamParams:
    """Settings of a search. A completion's score is its log-probability / length ** length_penalty.

    Attributes:
      beams: unfinished completions that are kept after each token.
      num_best: completions to return, the best first; at most `beams`.
      length_penalty: more than 0 favours long completions, less than 0 short ones; 0 compares log-probabilities.
      early_stopping: when a search with as many finished completions as beams ends, as in transformers. "true": at
        once. "false": when no beam would be better if it ended now. "never": when no beam can become better within
        max_new_tokens.
      max_new_tokens: the largest number of generated tokens.
      ignore_eos: whether to go on after an end-of-text token.
    """

    beams: int = 4
    num_best: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "false"
    max_new_tokens: int = 100
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raises one UserError with every value that is out of its range."""
        checks = (
            ("beams", self.beams >= 1, "at least 1"),
            ("num_best", 1 <= self.num_best <= self.beams, f"from 1 to the number of beams, {self.beams}"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("early_stopping", self.early_stopping in ("false", "true", "never"), "false, true or never"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        )
        problems = [f"{name} is {getattr(self, name)}; expected {rule}" for name, ok, rule in checks if not ok]
        if problems:
            raise UserError("; ".join(problems))
