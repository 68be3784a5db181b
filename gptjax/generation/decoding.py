"""The compiled programs of generation: reading prompts into slots (prefill), then decoding in all slots on the device.

A slot is a row of the state. Prompts are read into free slots while the other slots wait. One decode loop serves all
slots, each with its own settings. With a draft model the loop is speculative: the draft proposes a few tokens, the
model reads all of them at once, and the proposals that the model would have sampled itself are kept. Model and draft
sample with the same random key at a position. So the tokens, sampled or greedy, are exactly those without a draft, and
equal distributions give equal samples
(Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding").
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.generation import sampling
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt, sharding
from gptjax.model.architecture import Architecture
from gptjax.model.attention import MASKED
from gptjax.model.cache import Cache, empty_cache
from gptjax.parameters import map_rows

ROUNDS = 16  # per call of `decode`; a round writes 1 token, or with a draft up to 1 + draft_tokens
MAX_END_IDS = 8
SCORED = 16  # positions of a prompt whose logits are in memory at once
NO_TOKEN = sampling.NO_TOKEN

Architectures = tuple[Architecture, ...]  # of the model, then of the draft if there is one
AllParams = tuple[gpt.Params, ...]  # in the same order; each from `prepare`
Rows = Int[Array, "slots"]


class State(NamedTuple):
    """Slots with unfinished texts.

    Attributes:
      caches: keys and values of all tokens so far, for the model and, if there is one, for the draft.
      logits: scores of the next token.
      positions: the position that the next token will have.
      seen: tokens of the prompt.
      counts: how often each token was generated.
      keys: one random key per slot; folded with a position, it is the key of one sample.
      controls, biases: how each slot samples.
      end_ids: tokens that end the text of a slot, filled up with NO_TOKEN.
    """

    caches: tuple[Cache, ...]
    logits: Float[Array, "slots vocab"]
    positions: Rows
    seen: Bool[Array, "slots vocab"]
    counts: Int[Array, "slots vocab"]
    keys: Key[Array, "slots"]
    controls: sampling.Controls
    biases: sampling.Bias
    end_ids: Int[Array, "slots ends"]


class Prompts(NamedTuple):
    """Prompts to read, or the next chunks of prompts, padded on the right.

    Attributes:
      lengths: the number of tokens without padding.
      slots: the slot of each prompt.
      seeds, indices: together they decide the random key of a text.
    """

    tokens: Int[np.ndarray, "batch length"]
    lengths: Int[np.ndarray, "batch"]
    slots: Int[np.ndarray, "batch"]
    seeds: np.ndarray
    indices: Int[np.ndarray, "batch"]
    controls: sampling.Controls
    biases: sampling.Bias
    end_ids: Int[np.ndarray, "batch ends"]


class Written(NamedTuple):
    """The tokens that a call of `decode` has written.

    Attributes:
      drawn: the new tokens of each slot, then NO_TOKEN.
      rounds: the number of rounds in which each slot was active.
    """

    drawn: sampling.Drawn
    rounds: Rows


@partial(jax.jit, static_argnames="architecture")
def prepare(params: gpt.Params, *, architecture: Architecture) -> gpt.Params:
    """Parameters in the form for decoding: one tree per layer, matrices in the compute dtype.

    Decoding reads every parameter for every token. Slices of stacked layers would be copied each time, and matrices
    in float32 would be read at full size and converted each time. The router of experts and the norms stay in float32.
    """

    dtype = architecture.compute_dtype
    params = map_rows(lambda row, leaf: leaf if row.dtype == "float32" else leaf.astype(dtype), params)
    layers = range(architecture.num_layers)
    return {**params, "blocks": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in layers)}


@partial(jax.jit, static_argnames=("architectures", "slots", "capacity"))
def new_state(*, architectures: Architectures, slots: int, capacity: int) -> State:
    """A state in which all slots are free. `capacity`: the largest number of tokens of prompt and completion."""
    zeros, vocab = jnp.zeros(slots, jnp.int32), architectures[0].padded_vocab_size
    return _split(
        State(
            caches=tuple(empty_cache(architecture, slots, capacity) for architecture in architectures),
            logits=jnp.zeros((slots, vocab)),
            positions=zeros,
            seen=jnp.zeros((slots, vocab), bool),
            counts=jnp.zeros((slots, vocab), jnp.int32),
            keys=jax.vmap(jax.random.key)(zeros),
            controls=sampling.only(zeros > 0, sampling.Controls(*[zeros] * len(sampling.OFF))),
            biases=sampling.Bias(*map(jnp.asarray, sampling.bias([SamplingParams()] * slots))),
            end_ids=jnp.full((slots, MAX_END_IDS), NO_TOKEN),
        )
    )


@partial(jax.jit, static_argnames="capacity")
def grow(caches: tuple[Cache, ...], *, capacity: int) -> tuple[Cache, ...]:
    """The same texts in larger caches."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, capacity - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]), caches)


@partial(jax.jit, static_argnames="architectures", donate_argnames="state")
def insert(
    architectures: Architectures,
    params: AllParams,
    state: State,
    prompts: Prompts,
    starts: Int[Array, "batch"] | Int[np.ndarray, "batch"] | None = None,
    targets: Int[Array, "batch length"] | Int[np.ndarray, "batch length"] | None = None,
) -> tuple[State, sampling.Drawn | None]:
    """Reads prompts into slots.

    Args:
      state: its buffers are given to the new state.
      prompts: whole prompts, or chunks of them.
      starts: the position of the first token of each chunk; the tokens before it are in the slot already. None:
        position 0, which is cheaper, since nothing is read from the caches.
      targets: the token after each token of `prompts`, whose log-probability is wanted. None computes logits only
        after the last tokens.

    Returns:
      The state, and the log-probabilities of `targets` with the most probable tokens, or None.
    """
    tokens, lengths, slots = map(jnp.asarray, (prompts.tokens, prompts.lengths, prompts.slots))
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ends = lengths if starts is None else jnp.asarray(starts) + lengths
    # 1. The model, and then the draft, read the tokens; the logits after the last ones are the model's.
    caches, scores = [], None
    for architecture, own, cache in zip(architectures, params, state.caches, strict=True):
        model, layers = _bind(architecture, own)
        if starts is None:
            hidden, new = model.hidden(tokens, positions=places, new_cache=True, layers=layers)
        else:  # padding gets a position beyond the capacity, so that it is not written
            at = jnp.where(places < lengths[:, None], jnp.asarray(starts)[:, None] + places, cache.capacity)
            rows = _rows_of_cache(cache, slots)
            hidden, new = model.hidden(tokens, positions=at, cache=rows, layers=layers)
        if not caches:
            last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
            logits = model.logits(last)[:, 0]
            if targets is not None:
                scores = _scores(model, hidden, jnp.asarray(targets))
        caches.append(_insert_cache(cache, new, slots))
    # 2. The rows of the slots start afresh; `seen` has the tokens of the whole prompt so far.
    batch, vocab = logits.shape
    written, capacity = caches[0].tokens[slots], caches[0].capacity
    written = jnp.where(jnp.arange(capacity) < ends[:, None], written, vocab)
    seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], written].set(True, mode="drop")
    keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(prompts.seeds, prompts.indices)

    def put(old: Array, new: Array) -> Array:
        return old.at[slots].set(new)

    counts = jnp.zeros((batch, vocab), jnp.int32)
    rows = (logits, ends, seen, counts, keys, prompts.controls, prompts.biases, prompts.end_ids)
    return _split(State(tuple(caches), *jax.tree.map(put, tuple(state[1:]), rows))), scores


def _scores(model: gpt.GPT, hidden: Float[Array, "batch length embed"], targets: Int[Array, "batch length"]):
    """Log-probabilities of `targets`, and the most probable tokens. Few positions have logits in memory at a time."""

    def one(inputs):
        hidden, target = inputs
        logits = model.logits(hidden[:, None])[:, 0]
        return sampling.drawn(logits, target, sampling.log_probability(logits, target), True)

    found = jax.lax.map(one, (hidden.swapaxes(0, 1), targets.T), batch_size=min(SCORED, targets.shape[1]))
    return jax.tree.map(lambda x: _replicate(x.swapaxes(0, 1)), found)


@partial(jax.jit, static_argnames=("architectures", "draft_tokens"), donate_argnames="state")
def decode(
    architectures: Architectures,
    params: AllParams,
    state: State,
    remaining: Rows | np.ndarray,
    num_rounds: Int[Array, ""] | int,
    until_one_ends: Bool[Array, ""] | bool,
    *,
    allowed: Bool[Array, "slots vocab"] | Bool[np.ndarray, "slots vocab"] | None = None,
    top: Bool[Array, ""] | bool = False,
    draft_tokens: int = 0,
) -> tuple[State, Written]:
    """Generates in all slots until every text has ended, or for `num_rounds`.

    Args:
      state: its buffers are given to the new state.
      remaining: tokens that each slot may still get; 0 for a free slot.
      num_rounds: at most ROUNDS.
      until_one_ends: whether to return as soon as a text has ended, to make room for a waiting prompt.
      allowed: tokens that may be sampled; only for one round and without a draft.
      top: whether to return the most probable tokens, too.
      draft_tokens: proposals of the draft model per round.
    """
    # The loop runs on the device, so that no token waits for the host.
    remaining = jnp.asarray(remaining)
    slots, width = remaining.shape[0], ROUNDS * (1 + draft_tokens)
    began = remaining > 0
    no_tokens, no_scores = jnp.full((slots, width), NO_TOKEN), jnp.zeros((slots, width))
    tops = (slots, width, sampling.TOP)
    written = Written(
        sampling.Drawn(no_tokens, no_scores, jnp.zeros(tops, jnp.int32), jnp.zeros(tops)), jnp.zeros(slots, jnp.int32)
    )

    # Slots that were free from the start do not count as `ended`: with `until_one_ends` they would stop the loop.
    def unfinished(carry):
        round_, _, remaining, _, _ = carry
        ended = began & (remaining == 0)
        return (round_ < num_rounds) & jnp.any(remaining > 0) & ~(until_one_ends & jnp.any(ended))

    def write_tokens(carry):
        round_, state, remaining, count, written = carry
        active = remaining > 0
        state, drawn = _round(architectures, params, state, active, allowed, top, draft_tokens)
        tokens = drawn.tokens
        # A round may write too many: keep tokens up to the first that ends the text, and at most `remaining`.
        places = jnp.arange(1 + draft_tokens)
        ends = (tokens[:, :, None] == state.end_ids[:, None, :]).any(-1) & (tokens != NO_TOKEN)
        after_end = jnp.cumsum(ends, axis=1) - ends > 0
        taken = (tokens != NO_TOKEN) & ~after_end & (places < remaining[:, None])
        new = taken.sum(1)
        ended = (ends & taken).any(1)
        # Tokens that are not taken go to column `width`, which does not exist: mode="drop" drops them.
        at = jnp.arange(slots)[:, None], jnp.where(taken, count[:, None] + places, width)
        written = Written(
            jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), written.drawn, drawn),
            written.rounds + active,
        )
        return round_ + 1, state, jnp.where(ended, 0, remaining - new), count + new, written

    # The state stays split over the mesh; what the host reads is copied to every device.
    carry = 0, state, remaining, jnp.zeros(slots, jnp.int32), written
    _, state, _, _, written = jax.lax.while_loop(unfinished, write_tokens, carry)
    return _split(state), jax.tree.map(_replicate, written)


def _round(
    architectures: Architectures,
    params: AllParams,
    state: State,
    active: Bool[Array, "slots"],
    allowed: Bool[Array, "slots vocab"] | Bool[np.ndarray, "slots vocab"] | None,
    top: Bool[Array, ""] | bool,
    draft_tokens: int,
) -> tuple[State, sampling.Drawn]:
    """One pass of the model: the next token of each slot, and the proposals that the model agrees with.

    Returns the new state and the kept tokens [slots, 1 + draft_tokens], filled up with NO_TOKEN. Inactive slots are
    computed, too; they write to a place of the cache that no other token reads.
    """
    rows, positions = jnp.arange(active.shape[0]), state.positions
    controls = sampling.only(active, state.controls)
    biases = state.biases._replace(values=jnp.where(active[:, None], state.biases.values, 0))

    def draw(logits, counts, ahead):
        keys = jax.vmap(jax.random.fold_in)(state.keys, positions + ahead)
        seen = state.seen | (counts > 0)
        return sampling.sample(logits, seen, controls, keys, counts=counts, biases=biases, allowed=allowed)

    # 1. The next token, from the logits of the round before. The draft then proposes the tokens after it.
    token, log_probability = draw(state.logits, state.counts, 0)
    drawn = [sampling.drawn(state.logits, token, log_probability, top)]
    proposals, counts = [token], [state.counts.at[rows, token].add(1)]
    caches = list(state.caches)
    for ahead in range(draft_tokens):
        block, at = proposals[-1][:, None], positions[:, None] + ahead
        if ahead == 0:  # if the model kept all proposals, the draft has not read the last one yet
            before = jnp.maximum(positions - 1, 0)[:, None]
            block = jnp.concatenate([jnp.take_along_axis(state.caches[0].tokens, before, axis=1), block], axis=1)
            at = jnp.concatenate([before, at], axis=1)
        logits, caches[1] = _extend(architectures[1], params[1], block, at, caches[1])
        proposal, _ = draw(_fit(logits[:, -1], state.logits.shape[1]), counts[-1], ahead + 1)
        proposals.append(proposal)
        counts.append(counts[-1].at[rows, proposal].add(1))

    # 2. The model reads all of them at once, and samples at each position; equal proposals are kept up to the first
    # that differs.
    block, ahead = jnp.stack(proposals, axis=1), jnp.arange(1 + draft_tokens)
    logits, caches[0] = _extend(architectures[0], params[0], block, positions[:, None] + ahead, caches[0])
    agreed = [active]
    for i in range(draft_tokens):
        token, log_probability = draw(logits[:, i], counts[i], i + 1)
        drawn.append(sampling.drawn(logits[:, i], token, log_probability, top))
        agreed.append(agreed[-1] & (token == proposals[i + 1]))
    # 3. The state after the last kept token.
    agreed = jnp.stack(agreed, axis=1)
    last = jnp.maximum(agreed.sum(1) - 1, 0)
    state = state._replace(
        caches=tuple(caches),
        logits=jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0] if draft_tokens else logits[:, 0],
        positions=positions + agreed.sum(1),
        counts=jnp.stack(counts, axis=0)[last, rows] if draft_tokens else counts[0],
    )
    drawn = jax.tree.map(lambda *pieces: jnp.stack(pieces, axis=1), *drawn)
    return state, drawn._replace(tokens=jnp.where(agreed, block, NO_TOKEN))


def _extend(
    architecture: Architecture, params: gpt.Params, tokens: Array, positions: Array, cache: Cache
) -> tuple[Float[Array, "slots length vocab"], Cache]:
    """(scores of the token after each of `tokens`, the cache with `tokens`)."""
    model, layers = _bind(architecture, params)
    hidden, cache = model.hidden(tokens, positions=positions, cache=cache, layers=layers)
    return model.logits(hidden), cache


def _fit(logits: Float[Array, "slots vocab"], vocab: int) -> Float[Array, "slots padded_vocab"]:
    """Scores, cut or padded to the padded vocabulary of the other model."""
    return jnp.pad(logits[:, :vocab], [(0, 0), (0, max(vocab - logits.shape[1], 0))], constant_values=MASKED)


def _bind(architecture: Architecture, params: gpt.Params) -> tuple[gpt.GPT, tuple[gpt.Params, ...]]:
    layers = params["blocks"]
    return gpt.bind(architecture, {**params, "blocks": layers[0]}), layers


def _rows_of_cache(cache: Cache, slots: Int[Array, "batch"]) -> Cache:
    """The rows of `cache` in the given slots."""
    total = cache.tokens.shape[0]

    def take(x: Array) -> Array:
        by_slot = x.reshape(total, -1, *x.shape[1:])[slots]
        return by_slot.reshape(-1, *x.shape[1:])

    return jax.tree.map(take, cache)


def _insert_cache(cache: Cache, new: Cache, slots: Int[Array, "batch"]) -> Cache:
    """`cache` with the rows of `new` in the given slots."""
    total, batch = cache.tokens.shape[0], new.tokens.shape[0]

    def put(old: Array, new: Array) -> Array:
        by_slot = old.reshape(total, -1, *old.shape[1:])
        rows = new.reshape(batch, -1, *new.shape[1:])[:, :, : old.shape[1]]
        return by_slot.at[slots, :, : rows.shape[2]].set(rows).reshape(old.shape)

    return jax.tree.map(put, cache, new)


def _split(state: State) -> State:
    """`state` with its slots split over the mesh, if there is one. Caches are already split by the model."""

    def constrain(x: Array) -> Array:
        return sharding.constrain(x, sharding.BATCH, *[None] * (x.ndim - 1))

    logits = sharding.constrain(state.logits, sharding.BATCH, "tensor")
    rows = jax.tree.map(constrain, tuple(state[2:]))
    return State(state.caches, logits, *rows)


def _replicate(x: Array) -> Array:
    """`x` copied to every device of the mesh, so that every process can read it."""
    return sharding.constrain(x, *[None] * x.ndim)
