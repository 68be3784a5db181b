"""The sampler and the training model give the same log-probabilities: their ratio is 1.

Learning from rewards depends on it. In float32, by the cache and without it, for every option of the architecture.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Model
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt, presets
from gptjax.objectives import policy_gradient

OPTIONS = [
    {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "use_bias": True, "qk_norm": False},
    {"norm_placement": "post", "positions": "alibi", "activation": "relu", "num_kv_heads": 1} | {"mup_base_width": 16},
    {"positions": "none", "activation": "swiglu", "tie_embeddings": False, "qkv_bias": True, "num_kv_heads": 2},
    {"activation": "gelu", "logit_softcap": 3.0, "sliding_window": 8, "ngram_order": 3, "ngram_rows": 64}
    | {"attention_gate": True, "value_embeddings": 1, "rope_scaling": "llama3", "rope_original_length": 16},
    {"num_experts": 4, "experts_per_token": 2, "value_embeddings": 2, "residual_scalars": True}
    | {"rope_scaling": "linear", "rope_factor": 2.0, "head_dim": 10, "lora_rank": 2},
]
SIZES = {"num_layers": 2, "num_heads": 4, "embed_dim": 32, "context_length": 64, "vocab_size": 257, "mlp_dim": 48}
PRESETS = ("gpt2-124m", "llama3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "modern-d6")


def of_preset(name: str) -> dict:
    """A preset's options at a small size."""
    options = {**presets.get(name), **SIZES, "head_dim": 0}
    return options | {"num_kv_heads": 2 if options.get("num_kv_heads") else 0}


CASES = [*OPTIONS, *(pytest.param(of_preset(name), marks=pytest.mark.slow) for name in PRESETS)]


@pytest.mark.parametrize("options", CASES, ids=[*map(str, OPTIONS), *PRESETS])
def test_both_say_the_same(random_model, options):
    architecture, params = random_model(**options)
    generator = Generator(Model.prepare(architecture, params), build_tokenizer("byte"), capacity=48)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 256, length).astype(np.int32) for length in (3, 9, 14, 16)]
    sampling = SamplingParams(max_new_tokens=24, seed=1, ignore_eos=True)
    completions = generator.complete_tokens(prompts, sampling)

    tokens, sampled = np.zeros((4, 65), np.int32), np.zeros((4, 64))
    answers = np.zeros((4, 64), bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = np.concatenate([prompt, completion.tokens])
        tokens[row, : len(text)] = text
        answer = slice(len(prompt) - 1, len(text) - 1)
        answers[row, answer], sampled[row, answer] = True, completion.log_probabilities
    positions = jnp.broadcast_to(jnp.arange(64), (4, 64))

    @jax.jit
    def trained(params):
        model = gpt.bind(architecture, params)
        hidden, _ = model.hidden(jnp.asarray(tokens[:, :-1]), positions=positions)
        return policy_gradient.score(architecture, hidden, model.table(), jnp.asarray(tokens[:, 1:]))

    scores = trained(params)
    assert np.std(sampled[answers]) > 0.1
    assert np.abs(np.asarray(scores.log_probability) - sampled)[answers].max() < 1e-5
    assert scores.entropy.min() > 0 and scores.entropy.max() <= np.log(257) + 1e-5
