"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with decoupled weight decay, from optax.

The second moment of a matrix of at least 128 x 128 is kept as one mean for each row and one for each column. Updates
are clipped to a root mean square of 1 and scaled by that of the parameter, so the learning rate is relative; 1e-2 is
usual. There is no first moment: betas and epsilon are not used.
"""

from typing import Any

import jax
import optax

from gptjax.optim.parts import Parts
from gptjax.parameters import path_string


def build(parts: Parts) -> optax.GradientTransformation:
    """The factored second moment, clipping, the parameters' scale, then weight decay, then the learning rate."""
    one = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    kinds = {"whole": one, "layers": _stacked(one), "experts": _stacked(_stacked(one))}
    return optax.chain(optax.partition(kinds, _labels), parts.decay, parts.rate("learning_rate"))


def _labels(params: Any) -> Any:
    """How many leading axes of a parameter are stacked: layers, or layers and experts."""

    def label(path: tuple, leaf: jax.Array) -> str:
        if not path_string(path).startswith("blocks/"):
            return "whole"
        return "experts" if leaf.ndim == 4 else "layers"

    return jax.tree_util.tree_map_with_path(label, params)


def _stacked(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` for each entry of the first axis separately: each layer of a stack is a matrix."""

    def init(params: Any) -> Any:
        return jax.vmap(transform.init)(params) if jax.tree.leaves(params) else transform.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        each = jax.vmap(transform.update) if jax.tree.leaves(updates) else transform.update
        return each(updates, state, params)

    return optax.GradientTransformation(init, update)
