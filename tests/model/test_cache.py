import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import gpt
from gptjax.model.cache import empty_cache


def written_slots(architecture, positions) -> list[list[int]]:
    """The slots of each row that are nonzero after a forward pass over tokens at these positions."""
    model = gpt.bind(architecture, gpt.initialise(architecture, jax.random.key(0)))
    positions = jnp.asarray(positions)
    tokens = jnp.arange(positions.size).reshape(positions.shape)
    _, cache = model.hidden(tokens, positions=positions, cache=empty_cache(architecture, len(positions), 6))
    tensors = np.array([cache.keys, cache.values]).reshape(2, architecture.num_layers, len(positions), 2, 6, 8)
    written = abs(tensors).sum((3, 5)) > 0
    assert (written == written[0, 0]).all(), "keys and values of all layers are written to the same slots"
    return [np.flatnonzero(row).tolist() for row in written[0, 0]]


def test_tokens_are_written_at_their_positions(tiny_architecture):
    assert written_slots(tiny_architecture, [[0, 1, 2], [3, 4, 5]]) == [[0, 1, 2], [3, 4, 5]]


def test_what_lies_beyond_the_capacity_is_not_written(tiny_architecture):
    """Padding of ragged prompts has such positions."""
    assert written_slots(tiny_architecture, [[0, 6, 7], [4, 5, 1000]]) == [[0], [4, 5]]


def test_a_new_cache_holds_what_decoding_would_have_written(tiny_architecture):
    model = gpt.bind(tiny_architecture, gpt.initialise(tiny_architecture, jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 5)), jnp.int32)
    positions = jnp.tile(jnp.arange(5), (3, 1))
    whole, new = model.hidden(tokens, positions=positions, new_cache=True)
    cache, parts = empty_cache(tiny_architecture, 3, 5), []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        hidden, cache = model.hidden(tokens[:, start:end], positions=positions[:, start:end], cache=cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new, cache)
