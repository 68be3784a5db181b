"""From the scores of the next token to a token. Pure functions, in the order in which `sample` applies them.

Every row has its own controls, which are traced: one compiled program serves all settings. A control that is off in
all rows costs only a branch. The token of a row does not depend on the controls of other rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.generation.params import MAX_BIASES, SamplingParams

Logits = Float[Array, "batch vocab"]
Number = Float[Array, "#batch"] | Float[np.ndarray, "#batch"]
Count = Int[Array, "#batch"] | Int[np.ndarray, "#batch"]

REMOVED = -jnp.inf
NO_TOKEN = -1
TOP = 20  # most probable tokens that can be returned with each token
# Logits divided by a smaller temperature would leave the range of float32.
GREEDY_TEMPERATURE = 1e-5


class Controls(NamedTuple):
    """The settings of `SamplingParams` that the device needs: one value per row, or one for all rows."""

    temperature: Number
    top_k: Count
    top_p: Number
    min_p: Number
    repetition_penalty: Number
    presence_penalty: Number
    frequency_penalty: Number


OFF = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Bias(NamedTuple):
    """Values added to the scores of single tokens; unused places have the id NO_TOKEN and the value 0."""

    ids: Int[Array, "batch biases"] | Int[np.ndarray, "batch biases"]
    values: Float[Array, "batch biases"] | Float[np.ndarray, "batch biases"]


class Drawn(NamedTuple):
    """Tokens, and their log-probabilities in nats under softmax(logits), with no token removed or penalised.

    Attributes:
      top_ids, top_values: the TOP most probable tokens, the best first; zeros if they were not requested.
    """

    tokens: Int[Array, "*batch"]
    log_probabilities: Float[Array, "*batch"]
    top_ids: Int[Array, "*batch top"]
    top_values: Float[Array, "*batch top"]


def controls(rows: Sequence[SamplingParams]) -> Controls:
    """The settings of each row, with the dtypes of the compiled program."""
    return Controls(
        **{
            name: np.array([getattr(params, name) for params in rows], np.int32 if name == "top_k" else np.float32)
            for name in Controls._fields
        }
    )


def bias(rows: Sequence[SamplingParams]) -> Bias:
    """The biases of each row, filled up."""
    ids = np.full((len(rows), MAX_BIASES), NO_TOKEN, np.int32)
    values = np.zeros((len(rows), MAX_BIASES), np.float32)
    for row, params in enumerate(rows):
        for place, (token, value) in enumerate(params.logit_bias):
            ids[row, place], values[row, place] = token, value
    return Bias(ids, values)


def only(active: Bool[Array, "batch"], controls: Controls) -> Controls:
    """`controls`, switched off in rows that are not active, so that these rows take no time."""
    return Controls(*(jnp.where(active, value, OFF[name]) for name, value in controls._asdict().items()))


def sample(
    logits: Logits,
    seen: Bool[Array, "batch vocab"],
    controls: Controls,
    keys: Key[Array, "batch"],
    *,
    counts: Int[Array, "batch vocab"] | None = None,
    biases: Bias | None = None,
    allowed: Bool[Array, "batch vocab"] | None = None,
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """Samples one token per row.

    Args:
      logits: float32 scores.
      seen: True for the tokens that are in the prompt of the row or were generated in it.
      controls: see `SamplingParams`. A temperature below 1e-5 takes the token with the highest score.
      keys: one random key per row, so that the sample of a row does not depend on other rows.
      counts: how often each token was generated in the row.
      biases: added to single scores.
      allowed: tokens that may be sampled.

    Returns:
      The tokens, and their log-probabilities in nats under the unmodified softmax(logits).
    """
    scores = repetition_penalty(logits, seen, controls.repetition_penalty)
    if counts is not None:
        scores = generated_penalty(scores, counts, controls.presence_penalty, controls.frequency_penalty)
    if biases is not None:
        scores = add_bias(scores, biases)
    if allowed is not None:
        scores = jnp.where(allowed, scores, REMOVED)
    greedy = jnp.broadcast_to(controls.temperature < GREEDY_TEMPERATURE, logits.shape[:1])
    best = highest(scores)

    def draw(scores: Logits) -> Int[Array, "batch"]:
        scores = scores / _column(jnp.where(greedy, 1.0, controls.temperature))
        scores = top_k(scores, controls.top_k)
        scores = top_p(scores, controls.top_p)
        scores = min_p(scores, controls.min_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        return jnp.where(greedy, best, highest(scores + noise))  # the Gumbel-max trick: a sample from softmax(scores)

    tokens = jax.lax.cond(greedy.all(), lambda scores: best, draw, scores)
    return tokens, log_probability(logits, tokens)


def log_probability(logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Log-probabilities of tokens, in nats, under softmax(logits)."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def drawn(
    logits: Float[Array, "*batch vocab"],
    tokens: Int[Array, "*batch"],
    log_probabilities: Float[Array, "*batch"],
    wanted: Bool[Array, ""] | bool,
) -> Drawn:
    """Tokens and, where `wanted`, the most probable ones.

    If the token is among these, both log-probabilities have the same bits: a score minus the same number.
    """
    count = min(TOP, logits.shape[-1])

    def find(logits):
        values, ids = jax.lax.top_k(logits, count)
        values = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        values = jnp.where(ids == tokens[..., None], log_probabilities[..., None], values)
        padding = [(0, 0)] * (values.ndim - 1) + [(0, TOP - count)]
        return jnp.pad(ids, padding, constant_values=NO_TOKEN), jnp.pad(values, padding, constant_values=REMOVED)

    def skip(logits):
        return jnp.zeros((*tokens.shape, TOP), jnp.int32), jnp.zeros((*tokens.shape, TOP))

    return Drawn(tokens, log_probabilities, *jax.lax.cond(jnp.asarray(wanted), find, skip, logits))


def highest(scores: Logits) -> Int[Array, "batch"]:
    """Index of the highest score, the first of equal ones. Same result as `argmax`, in a fifth of its time on a CPU."""
    best, last = scores.max(axis=-1, keepdims=True), scores.shape[-1] - 1
    return jnp.where(scores == best, jnp.arange(last + 1), last).min(axis=-1)


def repetition_penalty(logits: Logits, seen: Bool[Array, "batch vocab"], penalty: Number) -> Logits:
    """Scores of seen tokens: s / penalty where s > 0, s x penalty below (CTRL, Keskar et al. 2019)."""
    penalty = _column(penalty)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def generated_penalty(logits: Logits, counts: Int[Array, "batch vocab"], presence: Number, frequency: Number) -> Logits:
    """s - presence x (count > 0) - frequency x count, over the generated tokens: the formula of OpenAI's API."""

    def subtract(logits: Logits) -> Logits:
        return logits - _column(presence) * (counts > 0) - _column(frequency) * counts

    on = jnp.any(jnp.asarray(presence) != 0) | jnp.any(jnp.asarray(frequency) != 0)
    return jax.lax.cond(on, subtract, lambda logits: logits, logits)


def add_bias(logits: Logits, biases: Bias) -> Logits:
    """Adds the value of each id to its score."""
    ids, values = jnp.asarray(biases.ids), jnp.asarray(biases.values)

    def add(logits: Logits) -> Logits:
        # NO_TOKEN would count from the end: such ids go to column `vocab`, which does not exist.
        at = jnp.arange(ids.shape[0])[:, None], jnp.where(ids == NO_TOKEN, logits.shape[1], ids)
        return logits.at[at].add(values, mode="drop")

    return jax.lax.cond(jnp.any(values != 0), add, lambda logits: logits, logits)


def top_k(logits: Logits, k: Count) -> Logits:
    """Removes tokens that score below the k-th highest; ties with it stay (Fan et al. 2018). 0 = off."""

    def keep_highest(logits: Logits) -> Logits:
        kept = _keep_top(logits, lambda kept: kept.sum(axis=-1) >= k)
        return jnp.where(_column(k > 0), kept, logits)

    return jax.lax.cond(jnp.any(k > 0), keep_highest, lambda logits: logits, logits)


def top_p(logits: Logits, p: Number) -> Logits:
    """Keeps the nucleus: the smallest set of most probable tokens that has probability >= p.

    It has at least one token; ties with the least probable one stay (Holtzman et al. 2020). 1 = off.
    """

    def keep_nucleus(logits: Logits) -> Logits:
        probabilities = jax.nn.softmax(logits)
        kept = _keep_top(logits, lambda kept: jnp.where(kept, probabilities, 0).sum(axis=-1) >= p)
        return jnp.where(_column(p < 1), kept, logits)

    return jax.lax.cond(jnp.any(p < 1), keep_nucleus, lambda logits: logits, logits)


def min_p(logits: Logits, p: Number) -> Logits:
    """Removes tokens less than p times as probable as the most probable (Nguyen et al. 2024). 0 = off."""
    threshold = logits.max(axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits < threshold, REMOVED, logits)


def _column(values: Array | np.ndarray) -> Array:
    return jnp.asarray(values)[:, None]


def _keep_top(logits: Logits, enough: Callable[[Array], Array]) -> Logits:
    """Removes all but the smallest set {score >= t} that is `enough`; removes nothing if no set is.

    Bisects t over all float32 numbers, in the order of their bit patterns: 32 passes over the vocabulary take
    a tenth of the time of sorting it.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ranks = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)  # negative floats are in reverse order

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) / 2 without overflow
        good = enough(ranks >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    limits = jnp.iinfo(jnp.int32)
    bounds = jnp.full(logits.shape[0], limits.min), jnp.full(logits.shape[0], limits.max)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(ranks >= threshold[:, None], logits, REMOVED)
