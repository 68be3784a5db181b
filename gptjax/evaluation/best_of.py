"""Best of n: of several completions of a prompt, the one with the highest reward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptjax.data.pipeline.prompts import spell
from gptjax.errors import RunError, UserError
from gptjax.rewards import rewards
from gptjax.rewards.processes import Item

if TYPE_CHECKING:
    from gptjax.artifacts.loading import Trained
    from gptjax.generation.events import Completion


def check(count: int, reward: str, *, beams: int = 1, temperature: float = 1.0) -> None:
    """Raises UserError if --best_of and --reward do not fit each other, or the decoding."""
    if count == 1:
        if reward:
            raise UserError("--reward chooses among --best_of completions; add --best_of=8")
        return
    if not reward:
        raise UserError(
            f"--best_of={count} needs a reward to choose by: --reward=model:WORKDIR, FILE.py:function or "
            f"one of {', '.join(rewards.BUILT_IN)}"
        )
    if beams > 1:
        raise UserError(f"--beams={beams} does not sample; leave out --best_of")
    if temperature == 0:
        raise UserError(f"with --temperature=0 all --best_of={count} completions are equal; use a higher one")
    rewards.parse(reward, "--reward")


def open_reward(text: str, trained: "Trained", requests: Sequence[dict[str, Any]]) -> rewards.Reward:
    """The reward that --reward names. Raises UserError where it needs references that are missing."""
    needed = [name for _, name in rewards.parse(text, "--reward") if name in rewards.REFERRING]
    lacking = next((number for number, request in enumerate(requests) if _reference(request) is None), None)
    if needed and lacking is not None:
        prompt = requests[lacking]["prompt"]
        raise UserError(f'--reward={needed[0]} compares with a reference, and {prompt[:60]!r} has no "reference"')
    config = trained.config.copy_and_resolve_references().unlock()
    config.objective.update(reward=text, reward_errors="skip")  # `choose` reports failures
    return rewards.Reward(config, trained.tokenizer, "--reward")


class Chosen(NamedTuple):
    """The place of the best completion of a prompt, and its reward."""

    place: int
    reward: float


def choose(
    reward: rewards.Reward,
    trained: "Trained",
    asked: Sequence[np.ndarray],
    requests: Sequence[dict[str, Any]],
    completions: "Sequence[Completion]",
) -> list[Chosen]:
    """The best completion of each prompt (the first of equal ones). Closes the reward.

    Args:
      asked: the tokens of each prompt.
      requests: prompt and references of each.
      completions: the same number of each prompt, one prompt after another.

    Raises RunError if the reward of a completion cannot be computed.
    """
    count = len(completions) // len(asked)
    prompts = [(tokens, spell(tokens, trained.tokenizer)) for tokens in asked]
    items = [
        Item(text, one.text, _reference(requests[number]) or "", np.concatenate([tokens, one.tokens]))
        for number, (tokens, text) in enumerate(prompts)
        for one in completions[number * count : (number + 1) * count]
    ]
    try:
        scores = reward(items, [repr(request["prompt"][:60]) for request in requests for _ in range(count)])
    finally:
        reward.close()
    if scores.failures:
        raise RunError(f"{scores.failures[0].what}; correct it, or give another --reward")
    places = scores.values.reshape(-1, count).argmax(1) + count * np.arange(len(asked))
    return [Chosen(int(place), float(scores.values[place])) for place in places]


def _reference(request: dict[str, Any]) -> str | None:
    found = request.get("references") or [request.get("reference")]
    return found[0]
