"""Muon for the matrices in blocks (Jordan et al. 2024), AdamW for everything else, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.algorithms import adamw
from gptjax.optim.hyper import Hyper, rate
from gptjax.parameters import map_rows

# The last two axes of a stacked kernel [layers, in, out] or [layers, experts, in, out]; the matrices are orthogonalised
# one by one.
MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def build(hyper: Hyper, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """Orthogonalised momentum, then weight decay, then a learning rate of its own."""
    muon = optax.chain(
        _experts_first(
            optax.contrib.scale_by_muon(
                weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MATRIX, params),
                mu_dtype=jnp.float32,
            )
        ),
        optax.stateless(_scale_by_aspect_ratio),
        decay,
        rate(hyper["muon_learning_rate"]),
    )
    return optax.partition({"muon": muon, "adamw": adamw.build(hyper, decay)}, labels)


def labels(params: Any) -> Any:
    """ "muon" or "adamw" for every parameter."""
    return map_rows(lambda row, _: "muon" if row.matrix else "adamw", params)


def _experts_first(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """`muon`, computed on kernels [experts, layers, in, out].

    optax reshapes the first two axes into one. XLA keeps that axis split over a mesh only if the split axis, which is
    that of the experts, comes first; otherwise each device would gather all experts.
    """

    def swap(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.swapaxes(0, 1) if x.ndim == 4 else x, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = muon.update(swap(updates), state._replace(mu=swap(state.mu)), params)
        return swap(updates), state._replace(mu=swap(state.mu))

    return optax.GradientTransformation(muon.init, update)


def _scale_by_aspect_ratio(updates: Any, params: Any = None) -> Any:
    """sqrt(max(1, out / in)), with which the outputs change by the same root mean square for every shape of matrix."""
    del params
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
