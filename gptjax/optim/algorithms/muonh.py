"""MuonH, Muon on a hyperball (Wen et al. 2025), for the matrices in blocks, AdamW for everything else.

W' = r unit(W - rate r unit(u)), where u is Muon's orthogonal momentum, r the norm of W, and unit(x) = x / norm(x): each
matrix keeps its initial norm, and the learning rate is the angle of a step. This replaces the weight decay of matrices;
the authors start from rate = sqrt(rate of Muon x its weight decay).
Source: whenwen.github.io, "From Weight Decay to Hyperball Optimization", and levanter's muonH, which takes r from W.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.algorithms import muon
from gptjax.optim.parts import Parts

MATRICES_ONLY = muon.MATRICES_ONLY
SPECTRAL = muon.SPECTRAL


def build(parts: Parts) -> optax.GradientTransformation:
    """Orthogonalised momentum with the norm of the matrix, the learning rate, then back to the sphere."""
    muonh = optax.chain(
        muon.orthogonal_momentum(parts),
        optax.stateless(_as_long_as_the_matrix),
        parts.rate("muon_learning_rate"),
        optax.stateless(_back_to_the_sphere),
    )
    return muon.matrices_and_rest("muonh", muonh, parts)


def _resized(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, with each matrix scaled to the norm of the one in `like`."""
    return x * (muon.matrix_norm(like) / jnp.maximum(muon.matrix_norm(x), 1e-30))


def _as_long_as_the_matrix(updates: Any, params: Any) -> Any:
    return jax.tree.map(_resized, updates, params)


def _back_to_the_sphere(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p: _resized(p + u, p) - p, updates, params)
