"""How often a model prefers the answer that people prefer, on the pairs of a split.

The log-probability of an answer is compared as it is, and per token. Where the model was trained against a reference
there are also the rewards of DPO, beta (log pi - log pi_reference). For a reward model only its own rewards are
compared. Pairs with the same prompt are not independent, so the bootstrap draws prompts.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.artifacts.loading import Trained
from gptjax.data.pipeline.preferences import Examples, InOrder
from gptjax.data.store.shards import TokenSplit
from gptjax.evaluation.metrics import Estimate, Outcome, item_ids, ratio_metric
from gptjax.model import gpt
from gptjax.objectives import reward_model
from gptjax.objectives.preference import TEXTS, log_probabilities
from gptjax.parallel import partition
from gptjax.training import reference

_ROWS = 16


def score(trained: Trained, splits: Mapping[str, TokenSplit], mesh: Mesh, identity: str) -> Outcome:
    """`accuracy` and `margin` of rewards, if any; `accuracy_likelihood`, `accuracy_normalized` except of reward models.

    Raises UserError where a split has no pairs.
    """
    length = trained.architecture.context_length
    parts = [Examples.of(split, length, judged=False) for split in splits.values()]
    rows = np.concatenate([part.prompts for part in parts])
    prompts, groups = np.unique(rows, return_inverse=True)
    ids = item_ids(prompts.tolist())
    pairs = np.bincount(groups)
    signature = f"{identity}|context:{length}|pairs:{len(rows)}|ci:bootstrap-prompt-1000"

    def metric(values: np.ndarray) -> Estimate:
        return ratio_metric(ids, np.bincount(groups, values), pairs, signature=signature, n=len(rows))

    def of_rewards(rewards: np.ndarray) -> dict[str, Estimate]:
        return {"accuracy": metric(_prefers(rewards)), "margin": metric(rewards[:, 0] - rewards[:, 1])}

    warnings = [note for part in parts for note in part.notes[1:]]
    if trained.config.objective.name == "reward_model":
        rewards = _scored(trained, parts, mesh, lambda model, batch: reward_model.rewards(model, batch)[0])
        return Outcome(of_rewards(rewards), warnings=warnings)
    policy = _scored(trained, parts, mesh, log_probabilities)
    lengths = np.concatenate([part.answer_lengths for part in parts])
    metrics = {
        "accuracy_likelihood": metric(_prefers(policy)),
        "accuracy_normalized": metric(_prefers(policy / lengths)),
    }
    known = [reference.read(trained.config, _workdir(trained.path), part) for part in parts]
    if all(values is not None for values in known):
        metrics = of_rewards(trained.config.objective.beta * (policy - np.concatenate(known))) | metrics
    elif (_workdir(trained.path) / reference.FILE).exists():
        warnings.append("rewards are left out: the cache lacks the reference model's log-probabilities of these pairs")
    return Outcome(metrics, warnings=warnings)


def _workdir(checkpoint: Path) -> Path:
    return checkpoint.parents[1]


def _prefers(values: np.ndarray) -> np.ndarray:
    return (values[:, 0] > values[:, 1]).astype(np.float64)


def _scored(
    trained: Trained,
    parts: list[Examples],
    mesh: Mesh,
    score: Callable[[gpt.GPT, dict[str, jax.Array]], jax.Array],
) -> np.ndarray:
    """float32 [pairs, 2]: `score` of a model and a batch, for all pairs."""
    shards = partition.row_shards(mesh)
    batches = InOrder(parts, batch_size=-(-_ROWS // shards) * shards)
    specs = {name: partition.field_spec(field.axes) for name, field in TEXTS.items()}

    @partial(jax.jit, out_shardings=partition.replicated(mesh))
    def scored(params: gpt.Params, batch: dict[str, jax.Array]) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return score(gpt.bind(trained.architecture, params), batch)

    values = []
    with jax.set_mesh(mesh):
        for number in range(int(batches.steps_per_epoch)):
            batch = {name: batches[number][name] for name in TEXTS}
            values.append(np.asarray(scored(trained.params, partition.to_device(batch, mesh, specs=specs))))
    return np.concatenate(values)[: sum(map(len, parts))]
