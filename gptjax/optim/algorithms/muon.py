"""Muon for the matrices in blocks (Jordan et al. 2024), AdamW for everything else, from optax.

`optimizer.orthogonalization` says how a matrix becomes orthogonal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.algorithms import adamw
from gptjax.optim.parts import Parts
from gptjax.parameters import map_rows

MATRICES_ONLY = True
SPECTRAL = True  # updates are scaled by the shape of the matrix: with muP, no learning rate depends on the width
# The last two axes of a stacked kernel [layers, in, out] or [layers, experts, in, out]; the matrices are orthogonalised
# one by one.
MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# Polynomials a x + b x^3 + c x^5 of singular values. Those of Polar Express (Amsel et al. 2025, arXiv:2505.16932,
# algorithm 1) are taken at x / 1.01, for safety, and the first at x / 1.01^2: the authors first divide the matrix by
# 1.01 times its norm, here it is divided by its norm.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = (1.01**2, 1.01, 1.01, 1.01, 1.01)
COEFFICIENTS = {
    "newton_schulz": (3.4445, -4.7750, 2.0315),
    "polar_express": tuple((a / s, b / s**3, c / s**5) for (a, b, c), s in zip(_POLAR_EXPRESS, _SAFETY, strict=True)),
}


def build(parts: Parts) -> optax.GradientTransformation:
    """Orthogonalised momentum, then weight decay, then `muon_learning_rate`."""
    muon = optax.chain(
        orthogonal_momentum(parts), scale_by_aspect_ratio(), parts.decay, parts.rate("muon_learning_rate")
    )
    return matrices_and_rest("muon", muon, parts)


def matrices_and_rest(name: str, transform: optax.GradientTransformation, parts: Parts) -> optax.GradientTransformation:
    """`transform` for the matrices in blocks, AdamW for everything else."""
    return optax.partition({name: transform, "adamw": adamw.build(parts)}, lambda params: labels(params, name))


def labels(params: Any, name: str = "muon") -> Any:
    """`name` or "adamw" for every parameter."""
    return map_rows(lambda row, _: name if row.matrix else "adamw", params)


def orthogonal_momentum(parts: Parts) -> optax.GradientTransformation:
    """Nesterov momentum, with each matrix U S V^T replaced by approximately U V^T."""
    muon = optax.contrib.scale_by_muon(
        ns_coeffs=COEFFICIENTS[parts.options.orthogonalization],
        beta=parts.hyper["muon_momentum"],
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MATRIX, params),
    )

    def swap(tree: Any) -> Any:
        # optax merges the first two axes. XLA keeps the merged axis split over a mesh only if the split axis (the
        # experts) comes first; otherwise each device would gather all experts.
        return jax.tree.map(lambda x: x.swapaxes(0, 1) if x.ndim == 4 else x, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = muon.update(swap(updates), state._replace(mu=swap(state.mu)), params)
        return swap(updates), state._replace(mu=swap(state.mu))

    return optax.GradientTransformation(muon.init, update)


def scale_by_aspect_ratio() -> optax.GradientTransformation:
    """sqrt(max(1, out / in)): with it, an update changes outputs by the same root mean square for every shape."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)

    return optax.stateless(scale)


def matrix_norm(x: jax.Array) -> jax.Array:
    """The Frobenius norm of each matrix, [..., 1, 1]."""
    return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))
