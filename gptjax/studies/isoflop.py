"""IsoFLOP analysis: the tokens per parameter with the lowest loss at equal training compute.

Hoffmann et al. 2022, arXiv:2203.15556, section 3.2: a parabola through the losses of models of several sizes trained
with the same FLOPs. Here its axis is the logarithm of tokens per parameter, with one fit per seed; its lowest point
must lie between the smallest and the largest model.
"""

import dataclasses
import math

import jax
import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from gptjax.config import Config
from gptjax.data.tokenization.tokenizer import known_vocab_size
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parameters import path_string
from gptjax.studies import statistics
from gptjax.studies.cells import Arm, Plan

COUNTED = {  # path prefixes of the parameters that are not counted
    "all parameters": (),
    "all but the embedding": ("embedding/",),
    "all but embedding and head": ("embedding/", "head/"),
}
TOLERANCE = 0.1  # relative difference of FLOPs within one budget: runs have whole steps
FEWEST = 3  # sizes that determine a parabola


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Tokens per parameter at the lowest loss of a budget: geometric mean over seeds, with its interval.

    NaN: for some seed the lowest loss is at the smallest or the largest model, or beyond.
    """

    flops: float
    counted: str
    sizes: int
    mean: float
    low: float
    high: float


def num_steps(config: Config, flops: float) -> int:
    """The number of steps whose training takes `flops` FLOPs, at least one."""
    architecture = Architecture.from_config(config.model, config.model.vocab_size or known_vocab_size(config.tokenizer))
    tokens_a_step = config.train.batch_size * config.model.context_length
    return max(round(flops / (architecture.flops_per_token() * tokens_a_step)), 1)


def optima(plan: Plan) -> list[Optimum]:
    """The optimum of each budget with enough sizes, for each way to count; budgets with missing cells are left out."""
    found = []
    for arms in _budgets(plan):
        scores = [plan.scores(arm.name) for arm in arms]
        if len(arms) < FEWEST or any(len(of_arm) < plan.study.seeds for of_arm in scores):
            continue
        flops = math.exp(float(np.mean([math.log(arm.training_flops) for arm in arms])))
        for counted, without in COUNTED.items():
            ratios = np.array([arm.tokens / _count(arm, without) for arm in arms])
            best = [lowest(ratios, losses) for losses in np.array(scores).T]
            of_seeds = statistics.summary([math.log(value) for value in best])
            ends = (math.exp(value) for value in (of_seeds.mean, of_seeds.low, of_seeds.high))
            found.append(Optimum(flops, counted, len(arms), *ends))
    return found


def lowest(ratios: Float[Array, " sizes"], losses: Float[Array, " sizes"]) -> float:
    """The log ratio of the minimum of the least-squares parabola through (log ratio, loss); NaN if it is not inside."""
    logs = np.log(ratios)
    curvature, slope, _ = np.polyfit(logs - logs.mean(), losses, 2)
    if not curvature > 0:
        return math.nan
    place = logs.mean() - slope / (2 * curvature)
    return math.exp(place) if logs.min() <= place <= logs.max() else math.nan


def _budgets(plan: Plan) -> list[list[Arm]]:
    """The arms by their training FLOPs, the cheapest first."""
    budgets: list[list[Arm]] = []
    for arm in sorted(plan.arms.values(), key=lambda arm: arm.training_flops):
        if budgets and arm.training_flops <= budgets[-1][0].training_flops * (1 + TOLERANCE):
            budgets[-1].append(arm)
        else:
            budgets.append([arm])
    return budgets


def _count(arm: Arm, without: tuple[str, ...]) -> int:
    params = gpt.abstract_params(Architecture.from_config(arm.config.model, arm.config.model.vocab_size))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if not path_string(path).startswith(without or ("\0",)))
