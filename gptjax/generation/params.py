"""The settings of a completion."""

import dataclasses

from gptjax.errors import UserError

MAX_BIASES = 300  # entries of `logit_bias`


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, and where a completion ends.

    Attributes:
      max_new_tokens: the largest number of generated tokens.
      temperature: the logits are divided by this; 0 takes the most probable token.
      top_k: keeps only the k most probable tokens; 0 = all.
      top_p: keeps only the smallest set of tokens with at least this probability; 1 = all.
      min_p: keeps only tokens whose probability is at least min_p times that of the most probable one; 0 = all.
      repetition_penalty: divides the scores of tokens that are already in the text; 1 = none.
      presence_penalty: subtracted from the scores of tokens that were generated before; 0 = none.
      frequency_penalty: subtracted once for each time that a token was generated before; 0 = none.
      logit_bias: (token id, number added to its score), at most MAX_BIASES of them.
      stop: texts that end a completion; they are not part of it.
      seed: of the random numbers. The same seed, prompt and index of the prompt give the same tokens.
      ignore_eos: whether to go on after an end-of-text token.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raises one UserError with every value that is out of its range."""
        infinity = 3.4e38  # of float32, in which the device computes
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < infinity, "0 (the most probable token) or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (all tokens) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < infinity, "more than 0; 1 is no penalty"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2; 0 is no penalty"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2; 0 is no penalty"),
            (
                "logit_bias",
                _biases(self.logit_bias),
                f"at most {MAX_BIASES} token ids, each with a number from -100 to 100",
            ),
            ("stop", all(self.stop), "texts that are not empty"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
        )
        problems = [f"{name} is {getattr(self, name)}; expected {rule}" for name, ok, rule in checks if not ok]
        if problems:
            raise UserError("; ".join(problems))


def _biases(pairs: tuple[tuple[int, float], ...]) -> bool:
    return len(pairs) <= MAX_BIASES and all(token >= 0 and -100 <= value <= 100 for token, value in pairs)
