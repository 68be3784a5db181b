"""An optimizer from a config: clipping, the algorithm it names (a file in `algorithms`), multipliers by path."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from gptjax.optim.hyper import Hyper
from gptjax.parameters import find, multipliers, path_string


def make_optimizer(options: ConfigDict, params: Any, hyper: Hyper) -> optax.GradientTransformation:
    """The optimizer of one step.

    Args:
      options: `config.optimizer`.
      params: the trained parameters, which may be abstract.
      hyper: this step's hyper-parameters, which may be traced; the form of the state does not depend on them.

    Raises UserError for multipliers that match no parameter.
    """
    algorithm = importlib.import_module(f"gptjax.optim.algorithms.{options.name}")
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decayed = [path for path in paths if find(path).decayed]
    rates = multipliers(options.learning_rate_multipliers, paths, "optimizer.learning_rate_multipliers")
    decays = multipliers(options.weight_decay_multipliers, decayed, "optimizer.weight_decay_multipliers")

    def decay(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        name = path_string(path)
        return update + hyper["weight_decay"] * decays[name] * param if find(name).decayed else update

    def scale(path: tuple, update: jax.Array, _: Any) -> jax.Array:
        return rates[path_string(path)] * update

    transform = algorithm.build(hyper, _by_path(decay))
    if options.learning_rate_multipliers:
        transform = optax.chain(transform, _by_path(scale))
    return optax.chain(optax.clip_by_global_norm(hyper["clip_norm"]), transform)


def _by_path(change: Callable[[tuple, jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Replaces every update by `change(path, update, parameter)`."""
    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(change, updates, params))
