"""NorMuon (Li et al. 2025, arXiv:2510.05491) for the matrices in blocks, AdamW for everything else.

Each neuron of Muon's orthogonal update is divided by the root of a running mean of its squares. As in the authors'
code, the update of a matrix keeps the norm of Muon's update, so that Muon's learning rates can be used. beta2 decays
the second moment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gptjax.optim.algorithms import muon
from gptjax.optim.parts import Parts

MATRICES_ONLY = muon.MATRICES_ONLY
SPECTRAL = muon.SPECTRAL


class NeuronState(NamedTuple):
    """The second moment of each neuron, [..., 1, out]."""

    nu: Any


def build(parts: Parts) -> optax.GradientTransformation:
    """Orthogonalised momentum, normalised neurons, then weight decay, then `muon_learning_rate`."""
    normuon = optax.chain(
        muon.orthogonal_momentum(parts),
        scale_by_neuron(parts.hyper["beta2"]),
        muon.scale_by_aspect_ratio(),
        parts.decay,
        parts.rate("muon_learning_rate"),
    )
    return muon.matrices_and_rest("normuon", normuon, parts)


def scale_by_neuron(b2: ArrayLike) -> optax.GradientTransformation:
    """v = b2 v + (1 - b2) mean(o^2) over a neuron's inputs; o / sqrt(v), scaled to the norm of o (algorithm 1)."""

    def init(params: Any) -> NeuronState:
        return NeuronState(jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, p.shape[-1]), p.dtype), params))

    def normalised(o: jax.Array, v: jax.Array) -> jax.Array:
        scaled = o / (jnp.sqrt(v) + 1e-10)
        return scaled * muon.matrix_norm(o) / (muon.matrix_norm(scaled) + 1e-10)

    def update(updates: Any, state: NeuronState, params: Any = None) -> tuple[Any, NeuronState]:
        del params
        moment = lambda o, v: b2 * v + (1 - b2) * jnp.square(o).mean(-2, keepdims=True)  # noqa: E731
        nu = jax.tree.map(moment, updates, state.nu)
        return jax.tree.map(normalised, updates, nu), NeuronState(nu)

    return optax.GradientTransformation(init, update)
