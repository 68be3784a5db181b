"""Optimizers from a config: optax chains, with what is decayed and what Muon sees decided by parameter path."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gptjax.optim.schedules import make_schedule

# Matrices and embedding tables are decayed; norm scales and biases are not (nanoGPT's rule, by name because
# stacking over layers gives biases two axes).
DECAYED = r".*(kernel|embedding)"
# Muon is for the matrices inside blocks; embeddings, head, norms, biases and routers stay with AdamW (Jordan et al.
# 2024).
ORTHOGONALISED = r"blocks/(?!.*router).*/kernel"


def make_optimizer(
    optimizer: ConfigDict, schedule: ConfigDict, *, num_steps: int, warmup: int, decay: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimizer, learning-rate schedule). The schedule returned is AdamW's; Muon's has the same shape."""

    def learning_rate(peak: float) -> optax.Schedule:
        return make_schedule(
            schedule.name,
            peak=peak,
            num_steps=num_steps,
            warmup=warmup,
            decay=decay,
            final_fraction=schedule.final_fraction,
        )

    rate = learning_rate(optimizer.learning_rate)
    adamw = optax.adamw(
        rate,
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    transform = adamw
    if optimizer.name == "muon":
        muon = optax.chain(
            _experts_first(
                optax.contrib.scale_by_muon(
                    weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MATRIX, params),
                    mu_dtype=jnp.float32,
                )
            ),
            optax.stateless(_scale_by_aspect_ratio),
            optax.add_decayed_weights(optimizer.weight_decay),
            optax.scale_by_learning_rate(learning_rate(optimizer.muon_learning_rate)),
        )
        transform = optax.partition({"muon": muon, "adamw": adamw}, muon_labels)
    if optimizer.clip_norm:
        transform = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), transform)
    return transform, rate


# The last two axes of a stacked kernel [layers, in, out] or [layers, experts, in, out]; the matrices are orthogonalised
# one by one.
MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay acts on."""
    return _match(DECAYED, params)


def muon_labels(params: Any) -> Any:
    """ "muon" or "adamw" for every parameter."""
    return jax.tree.map(lambda matrix: "muon" if matrix else "adamw", _match(ORTHOGONALISED, params))


def _experts_first(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """`muon`, computed on kernels [experts, layers, in, out].

    It makes one axis of the first two. Only where experts come first is that axis split over a mesh as they are;
    otherwise each device would gather the experts of all.
    """

    def swap(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.swapaxes(0, 1) if x.ndim == 4 else x, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = muon.update(swap(updates), state._replace(mu=swap(state.mu)), params)
        return swap(updates), state._replace(mu=swap(state.mu))

    return optax.GradientTransformation(muon.init, update)


def _scale_by_aspect_ratio(updates: Any, params: Any = None) -> Any:
    """sqrt(max(1, out / in)): equal root-mean-square change of the outputs for every shape of matrix."""
    del params
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)


def _match(pattern: str, params: Any) -> Any:
    def matches(path, leaf):
        return bool(re.fullmatch(pattern, jax.tree_util.keystr(path, simple=True, separator="/")))

    return jax.tree_util.tree_map_with_path(matches, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
