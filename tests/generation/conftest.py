from collections.abc import Callable

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.model import gpt
from gptjax.model.architecture import Architecture


@pytest.fixture(scope="session")
def random_model() -> Callable:
    """Makes (architecture, graphdef, params) of a small model of 257 tokens, every parameter of it random.

    Drawn with NumPy: to compile the model's own initialisation takes longer than the tests.
    """

    def make(**options):
        config = config_lib.get_default()
        config.model.update(num_layers=2, num_heads=4, embed_dim=32, context_length=64, scan_unroll=1)
        config.model.update(**options)
        architecture = Architecture.from_config(config.model, 257)
        graphdef, abstract = gpt.abstract_model(architecture)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)
        return architecture, graphdef, jax.device_put(params)

    return make
