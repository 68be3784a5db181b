"""The two compiled programs of generation: read the prompts, then decode token after token on the device."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from gptjax.generation import sampling
from gptjax.model import gpt
from gptjax.model.cache import Cache, empty_cache
from gptjax.parallel import partition

DECODE_STEPS = 16  # tokens between two looks of the host at the text
NO_TOKEN = -1

CACHE = PartitionSpec(None, ("data", "fsdp"), None, "tensor", None)


class State(NamedTuple):
    """A batch of texts in the middle of being written.

    Attributes:
      cache: keys and values of all tokens so far.
      logits: scores of the next token.
      positions: the position that the next token will have.
      seen: tokens that are in the text so far.
      keys: a random key for each row; folded with the position, it is that of one draw.
    """

    cache: Cache
    logits: Float[Array, "batch vocab"]
    positions: Int[Array, "batch"]
    seen: Bool[Array, "batch vocab"]
    keys: Key[Array, "batch"]


@partial(jax.jit, static_argnames=("graphdef", "capacity", "mesh"))
def prefill(
    graphdef: nnx.GraphDef,
    params: gpt.Params,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    indices: Int[Array, "batch"],
    seed: UInt[Array, ""],
    *,
    capacity: int,
    mesh: Mesh | None = None,
) -> State:
    """Reads prompts of different lengths, padded on the right; scores only what follows their last tokens.

    Args:
      tokens: prompts; what a row has beyond its length is padding.
      lengths: tokens in each prompt.
      indices: together with `seed`, they decide the random key of each row.
      capacity: tokens that prompt and completion may have together.
    """
    model = gpt.bind(graphdef, params)
    batch, length = tokens.shape
    rows, columns = jnp.arange(batch)[:, None], jnp.arange(length)[None, :]
    real = columns < lengths[:, None]
    cache = empty_cache(model.architecture, batch, capacity)
    hidden, cache = model.hidden(tokens, positions=jnp.where(real, columns, capacity), cache=cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits = model.logits(last)[:, 0]
    vocab = logits.shape[-1]
    seen = jnp.zeros((batch, vocab), bool).at[rows, jnp.where(real, tokens, vocab)].set(True, mode="drop")
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(indices)
    keys_and_values = _constrain((cache.keys, cache.values), mesh, CACHE)
    cache = Cache(*keys_and_values, _constrain(cache.tokens, mesh, partition.ROWS))
    return State(cache, logits, lengths, seen, keys)


@partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef,
    params: gpt.Params,
    state: State,
    controls: sampling.Controls,
    remaining: Int[Array, "batch"],
    eot_id: Int[Array, ""],
    num_steps: Int[Array, ""],
    *,
    mesh: Mesh | None = None,
) -> tuple[State, Int[Array, "batch steps"], Float[Array, "batch steps"]]:
    """Generates until every row has ended, or for `num_steps` tokens.

    Args:
      state: its buffers are given to the new state.
      remaining: tokens that each row may still get; 0 for a row that has ended.
      eot_id: the token that ends a row (it is part of it), or -1.
      num_steps: at most DECODE_STEPS.

    Returns:
      The new state, the tokens, -1 where a row had ended, and their log-probabilities in nats.
    """
    rows = jnp.arange(remaining.shape[0])

    def unfinished(carry):
        step, _, remaining, _, _ = carry
        return (step < num_steps) & jnp.any(remaining > 0)

    def write_token(carry):
        step, state, remaining, tokens, log_probabilities = carry
        active = remaining > 0
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.positions)
        token, log_probability = sampling.sample(state.logits, state.seen, controls, keys)
        # A row that has ended computes on, in a slot that no other token reads.
        model = gpt.bind(graphdef, params)
        hidden, cache = model.hidden(token[:, None], positions=state.positions[:, None], cache=state.cache)
        state = State(
            cache=cache,
            logits=model.logits(hidden)[:, 0],
            positions=state.positions + active,
            seen=state.seen.at[rows, token].set(True),
            keys=state.keys,
        )
        tokens = tokens.at[:, step].set(jnp.where(active, token, NO_TOKEN))
        log_probabilities = log_probabilities.at[:, step].set(log_probability)
        remaining = jnp.where(active & (token != eot_id), remaining - 1, 0)
        return step + 1, state, remaining, tokens, log_probabilities

    tokens = jnp.full((remaining.shape[0], DECODE_STEPS), NO_TOKEN)
    log_probabilities = jnp.zeros(tokens.shape)
    _, state, _, tokens, log_probabilities = jax.lax.while_loop(
        unfinished, write_token, (0, state, remaining, tokens, log_probabilities)
    )
    return state, *_constrain((tokens, log_probabilities), mesh, PartitionSpec())


def place(rows: dict[str, jax.typing.ArrayLike], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Arrays whose first axis is the batch, on the device or split over the mesh."""
    return jax.device_put(rows, NamedSharding(mesh, partition.ROWS) if mesh else None)


def _constrain(tree, mesh: Mesh | None, spec: PartitionSpec):
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))
