"""Formulas of group-relative policy optimisation: advantages, the clipped ratio, the divergence.

GRPO: Shao et al. 2024 (arXiv:2402.03300). DAPO: Yu et al. 2025 (arXiv:2503.14476). Dr. GRPO: Liu et al. 2025
(arXiv:2503.20783).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from gptjax.model import head
from gptjax.model.architecture import Architecture
from gptjax.model.head import Hidden, Table
from gptjax.objectives.cross_entropy import Pieces, Targets, token_losses

PerToken = Float[Array, "batch length"]

# Smaller differences between the rewards of a group count as none: dividing by a deviation that is only rounding error
# would give advantages of about 1.
MIN_DEVIATION = 1e-6


def advantages(
    rewards: Float64[np.ndarray, "groups size"], kind: str
) -> tuple[Float64[np.ndarray, "groups size"], Bool[np.ndarray, " groups"]]:
    """(advantage of each answer, which groups have a signal).

    The reward minus the mean of its group; "normalized" also divides by the standard deviation of the group, the
    sample's, with size - 1 as in TRL. Groups with equal rewards or a NaN have advantages 0 and no signal.
    """
    centered = rewards - rewards.mean(1, keepdims=True)
    deviation = rewards.std(1, ddof=1)
    has_signal = deviation > MIN_DEVIATION * np.maximum(1.0, np.abs(rewards).max(1))  # False for NaN
    scale = np.where(has_signal, deviation, 1.0)[:, None] if kind == "normalized" else 1.0
    return np.where(has_signal[:, None], centered / scale, 0.0), has_signal


class PolicyScores(NamedTuple):
    """What a model says of each token, in float32 and nats.

    Attributes:
      log_probability: of the target.
      entropy: of the distribution; no gradient goes through it.
    """

    log_probability: PerToken
    entropy: PerToken


def score(a: Architecture, hidden: Hidden, table: Table, targets: Targets, *, chunk: int = 0) -> PolicyScores:
    """Scores of every token. With a chunk, only the logits of that many tokens of a row exist at a time, also in the
    backward pass, which computes them again."""
    pieces = Pieces.of(hidden.shape[1], chunk)
    if pieces.count == 1:
        return _score(a, hidden, table, targets)

    @jax.checkpoint
    def body(_, piece):
        hidden, targets = piece
        return None, _score(a, hidden, table, targets)

    _, scores = jax.lax.scan(body, None, (pieces.split(hidden), pieces.split(targets)))
    return jax.tree.map(pieces.join, scores)


def _score(a: Architecture, hidden: Hidden, table: Table, targets: Targets) -> PolicyScores:
    logits = head.scores(a, hidden, table)
    nll, log_partition, _ = token_losses(logits, targets)
    fixed, log_partition = jax.lax.stop_gradient((logits, log_partition))
    # Padding of the vocabulary has the score -1e30 and the probability 0; their product is 0.
    mean = (jnp.exp(fixed - log_partition[..., None]) * fixed).sum(-1)
    return PolicyScores(-nll, log_partition - mean)


class Surrogate(NamedTuple):
    """The loss of each token, and whether clipping makes its gradient 0."""

    loss: PerToken
    clipped: Bool[Array, "batch length"]


def surrogate(
    log_ratio: PerToken, advantage: Float[Array, "batch"], low: Float[Array, ""] | float, high: Float[Array, ""] | float
) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), with r = exp(log_ratio) (Schulman et al. 2017, equation 7).

    Two bounds as in DAPO, equation 10. With r = 1 and advantages of mean 0, the loss is 0 but its gradient is not.
    """
    ratio, advantage = jnp.exp(log_ratio), advantage[:, None]
    plain, bounded = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
    return Surrogate(-jnp.minimum(plain, bounded), bounded < plain)


def divergence(log_probability: PerToken, reference: PerToken) -> PerToken:
    """An estimate of KL(policy || reference) from one token: r - log r - 1, r = reference / policy (Schulman 2020, k3).

    Never negative, 0 if the two are equal, and unbiased if the token was sampled from the policy.
    """
    log_ratio = reference - log_probability
    return jnp.expm1(log_ratio) - log_ratio
