"""The formulas of preference losses: from the log-probabilities of a row's answers to its loss and rewards.

Log-probabilities are sums over the tokens of an answer, in nats, [row, pair] with the better answer first.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Hyper = Mapping[str, Array]


class Answers(NamedTuple):
    """The inputs of a loss, for the answers of each row.

    Attributes:
      policy: log-probabilities under the model that is trained.
      reference: log-probabilities under the initial model; not used by losses without a reference.
      lengths: tokens of each answer in the loss, at least 1.
    """

    policy: Float[Array, "row pair"]
    reference: Float[Array, "row pair"]
    lengths: Float[Array, "row pair"]


class Loss(NamedTuple):
    """The loss of each row, and the reward that it gives to each answer."""

    loss: Float[Array, "row"]
    rewards: Float[Array, "row pair"]


def dpo(x: Answers, hyper: Hyper) -> Loss:
    """-log sigmoid(r_better - r_worse) with r = beta (log pi - log pi_reference) (Rafailov et al. 2023).

    With label smoothing s, a share s of the pairs is assumed to be reversed (conservative DPO, Mitchell 2023).
    """
    rewards = hyper["beta"] * (x.policy - x.reference)
    return Loss(_smoothed(rewards[:, 0] - rewards[:, 1], hyper), rewards)


def ipo(x: Answers, hyper: Hyper) -> Loss:
    """(h - 1 / (2 beta))^2, with h the difference of the log-ratios per token (Azar et al. 2023, as in TRL)."""
    ratios = x.policy - x.reference
    means = ratios / x.lengths
    return Loss(jnp.square(means[:, 0] - means[:, 1] - 0.5 / hyper["beta"]), hyper["beta"] * ratios)


def orpo(x: Answers, hyper: Hyper) -> Loss:
    """-log p - beta log sigmoid(log odds ratio), of probabilities per token (Hong et al. 2024, equations 6, 7)."""
    means = x.policy / x.lengths
    # log(1 - p); a probability that rounds to 1 would have infinite odds.
    log_odds = means - jnp.log(-jnp.expm1(jnp.minimum(means, -1e-7)))
    ratio = jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    return Loss(-means[:, 0] - hyper["beta"] * ratio, hyper["beta"] * means)


def simpo(x: Answers, hyper: Hyper) -> Loss:
    """-log sigmoid(r_better - r_worse - margin) with r = beta log pi / length (Meng et al. 2024, equation 6)."""
    rewards = hyper["beta"] * x.policy / x.lengths
    return Loss(_smoothed(rewards[:, 0] - rewards[:, 1] - hyper["simpo_margin"], hyper), rewards)


def kto(
    ratio: Float[Array, "row"], desirable: Float[Array, "row"], kl: Float[Array, ""], hyper: Hyper
) -> tuple[Float[Array, "row"], Float[Array, "row"]]:
    """(loss, value): w (1 - sigmoid(v)), v = beta (log-ratio - KL), negated for bad answers (Ethayarajh et al. 2024).

    Args:
      ratio: log pi - log pi_reference of the judged answer.
      desirable: 1 for good answers, 0 for bad ones.
      kl: the estimate over the batch, at least 0; it gets no gradient.
    """
    value = hyper["beta"] * (ratio - kl) * (2 * desirable - 1)
    weight = jnp.where(desirable > 0, hyper["desirable_weight"], hyper["undesirable_weight"])
    return weight * (1 - jax.nn.sigmoid(value)), value


def _smoothed(margin: Float[Array, "row"], hyper: Hyper) -> Float[Array, "row"]:
    share = hyper["label_smoothing"]
    return -(1 - share) * jax.nn.log_sigmoid(margin) - share * jax.nn.log_sigmoid(-margin)


OF_PAIRS: dict[str, Callable[[Answers, Hyper], Loss]] = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo}
WITHOUT_REFERENCE = ("orpo", "simpo")
SMOOTHED = ("dpo", "simpo")
