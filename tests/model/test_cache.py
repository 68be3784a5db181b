import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import gpt
from gptjax.model.cache import empty_cache


def written_slots(architecture, positions) -> list[list[int]]:
    """Slots of each row that are not zero after a forward pass over tokens at these positions."""
    graphdef, _ = gpt.abstract_model(architecture)
    model = gpt.bind(graphdef, gpt.initialise(architecture, jax.random.key(0)))
    positions = jnp.asarray(positions)
    tokens = jnp.arange(positions.size).reshape(positions.shape)
    _, cache = model.hidden(tokens, positions=positions, cache=empty_cache(architecture, len(positions), 6))
    assert cache.keys.shape == cache.values.shape == (architecture.num_layers, len(positions), 6, 2, 8)
    written = np.array([abs(tensor).sum((-1, -2)) > 0 for tensor in (cache.keys, cache.values)])
    assert (written == written[0, 0]).all(), "keys and values of all layers are written to the same slots"
    return [np.flatnonzero(row).tolist() for row in written[0, 0]]


def test_tokens_are_written_at_their_positions(tiny_architecture):
    assert written_slots(tiny_architecture, [[0, 1, 2], [3, 4, 5]]) == [[0, 1, 2], [3, 4, 5]]


def test_what_lies_beyond_the_capacity_is_not_written(tiny_architecture):
    """Padding of ragged prompts is given such positions."""
    assert written_slots(tiny_architecture, [[0, 6, 7], [4, 5, 1000]]) == [[0], [4, 5]]
