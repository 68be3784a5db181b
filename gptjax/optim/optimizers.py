"""An optimizer from a config: clipping, the algorithm it names (a file in `algorithms`), multipliers by path."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gptjax.optim.hyper import Hyper
from gptjax.optim.parts import Parts
from gptjax.parameters import Parameter, find, multipliers, path_string


def make_optimizer(
    options: ConfigDict, params: Any, hyper: Hyper, *, widening: float = 1.0
) -> optax.GradientTransformation:
    """The optimizer of one step.

    Args:
      options: `config.optimizer`.
      params: the trained parameters, which may be abstract.
      hyper: this step's hyper-parameters, which may be traced; the structure of the state does not depend on them.
      widening: `Architecture.widening`. With muP, the learning rates of matrices are divided by it and their weight
        decay is multiplied by it, unless the algorithm scales updates by the shape of the matrix (`SPECTRAL`).

    Raises UserError for multipliers that match no parameter.
    """
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decayed = [path for path in paths if find(path).decayed]
    rates = multipliers(options.learning_rate_multipliers, paths, "optimizer.learning_rate_multipliers")
    decays = multipliers(options.weight_decay_multipliers, decayed, "optimizer.weight_decay_multipliers")
    if widening != 1:
        for path in paths:
            if find(path).matrix and not getattr(_algorithm(options.name), "SPECTRAL", False):
                rates[path] /= widening
                decays[path] *= widening

    def decay(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        name = path_string(path)
        if not find(name).decayed:
            return update
        change = hyper["weight_decay"] * decays[name] * param
        if options.cautious_weight_decay:  # Chen et al. 2025, arXiv:2510.12402, algorithm 1
            change = jnp.where(update * param >= 0, change, 0)
        return update + change

    def rate(name: str) -> optax.GradientTransformation:
        # A schedule, although the rate is given: its state counts steps, as checkpoints expect.
        plain = optax.scale_by_learning_rate(lambda count: hyper[name])
        if all(factor == 1 for factor in rates.values()):
            return plain

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            updates, state = plain.update(updates, state, params)
            scale = lambda path, update: rates[path_string(path)] * update  # noqa: E731
            return jax.tree_util.tree_map_with_path(scale, updates), state

        return optax.GradientTransformation(plain.init, update)

    transform = _algorithm(options.name).build(Parts(options, hyper, _by_path(decay), rate))
    if options.learning_rate_multipliers:
        # The identity keeps the structure that the state has in checkpoints.
        transform = optax.chain(transform, optax.identity())
    return optax.chain(optax.clip_by_global_norm(hyper["clip_norm"]), transform)


def average(options: ConfigDict) -> Callable[[Hyper, Any, Any], Any] | None:
    """The algorithm's own average of the parameters, a function of its state; None if it keeps none."""
    return getattr(_algorithm(options.name), "average", None)


def updater(name: str, row: Parameter) -> str:
    """The algorithm that updates a parameter. Some update only the matrices in blocks, and AdamW the rest."""
    return "adamw" if getattr(_algorithm(name), "MATRICES_ONLY", False) and not row.matrix else name


def _algorithm(name: str) -> ModuleType:
    return importlib.import_module(f"gptjax.optim.algorithms.{name}")


def _by_path(change: Callable[[tuple, jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Replaces every update by `change(path, update, parameter)`."""
    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(change, updates, params))
