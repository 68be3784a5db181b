"""SOAP (Vyas et al. 2024, arXiv:2409.11321, algorithm 3) for the matrices in blocks, AdamW for everything else.

Adam in the eigenbasis of Shampoo's preconditioner. Every `optimizer.soap_refresh` steps, one power iteration and a QR
decomposition update the basis; no eigenvalue problem is solved. The basis begins as the identity, with which SOAP is
Adam. So Adam's learning rates fit: `learning_rate` is used, not `muon_learning_rate`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gptjax.optim.algorithms import muon
from gptjax.optim.parts import Parts

MATRICES_ONLY = muon.MATRICES_ONLY


class Moments(NamedTuple):
    """Of matrices [..., in, out]: `left` and its basis are [..., in, in], `right` and its basis [..., out, out]."""

    mu: Any  # of gradients
    nu: Any  # of squared gradients, in the basis
    left: Any  # of G G^T
    right: Any  # of G^T G
    left_basis: Any
    right_basis: Any


class SoapState(NamedTuple):
    count: jax.Array
    moments: Moments


def build(parts: Parts) -> optax.GradientTransformation:
    """Adam in the eigenbasis, then weight decay, then the learning rate."""
    hyper = parts.hyper
    soap = optax.chain(
        scale_by_soap(hyper["beta1"], hyper["beta2"], hyper["epsilon"], parts.options.soap_refresh),
        parts.decay,
        parts.rate("learning_rate"),
    )
    return muon.matrices_and_rest("soap", soap, parts)


def scale_by_soap(b1: ArrayLike, b2: ArrayLike, epsilon: ArrayLike, refresh: int) -> optax.GradientTransformation:
    """The direction of SOAP, for a tree of stacked matrices."""

    def init(params: Any) -> SoapState:
        def squares(axis: int) -> Any:
            return jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), p.dtype), params)

        def identities(tree: Any) -> Any:
            return jax.tree.map(lambda a: a + jnp.eye(a.shape[-1], dtype=a.dtype), tree)

        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        left, right = squares(-2), squares(-1)
        moments = Moments(mu, nu, left, right, identities(left), identities(right))
        return SoapState(jnp.zeros([], jnp.int32), moments)

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        count = state.count + 1
        # With packed runs, `due` has an axis of members: `cond` then computes both branches and selects.
        due = count % refresh == 0

        def one(gradient: jax.Array, *old: jax.Array) -> tuple[jax.Array, Moments]:
            mu, nu, left, right, *bases = old
            ql, qr = bases
            mu = b1 * mu + (1 - b1) * gradient
            nu = b2 * nu + (1 - b2) * jnp.square(_product(ql.mT, gradient, qr))
            adam = _product(ql.mT, mu, qr) / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + epsilon)
            left = b2 * left + (1 - b2) * _product(gradient, gradient.mT)
            right = b2 * right + (1 - b2) * _product(gradient.mT, gradient)
            turned = jax.lax.cond(due, _turned, lambda left, right, *bases: bases, left, right, *bases)
            return _product(ql, adam, qr.mT), Moments(mu, nu, left, right, *turned)

        leaves, structure = jax.tree.flatten(updates)
        old = [jax.tree.leaves(tree) for tree in state.moments]
        results = [one(*arrays) for arrays in zip(leaves, *old, strict=True)]
        directions = structure.unflatten([direction for direction, _ in results])
        new = [structure.unflatten([moments[i] for _, moments in results]) for i in range(len(Moments._fields))]
        return directions, SoapState(count, Moments(*new))

    return optax.GradientTransformation(init, update)


def _product(*matrices: jax.Array) -> jax.Array:
    """A matrix product in float32 on every device, so that a basis stays orthogonal."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), matrices)


def _turned(left: jax.Array, right: jax.Array, *bases: jax.Array) -> tuple[jax.Array, ...]:
    """The bases after one power iteration (algorithm 4).

    A small multiple of the identity, which changes no eigenvector, is added to the moment. The moment of few gradients
    has a low rank, and QR would else complete the basis from rounding errors, which differ between devices.
    """

    def turned(a: jax.Array, q: jax.Array) -> jax.Array:
        mean = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None] / a.shape[-1]
        return jnp.linalg.qr(_product(a, q) + 1e-4 * mean * q).Q

    return tuple(map(turned, (left, right), bases))
