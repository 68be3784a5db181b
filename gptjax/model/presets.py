"""Published shapes of models, and the project's own: `config.model.update(presets.get("gpt2-124m"))`.

This module imports little, so that a config file costs no start-up time. Every preset sets all options that say what
the model computes, and has a layout that `convert` can export.
"""

from typing import Any

from gptjax.config import affecting, flat_options

GPT2 = {  # Radford et al. 2019, table 2; the hub's openai-community/gpt2* (config.json)
    "context_length": 1024,
    "vocab_size": 50257,
    "norm": "layernorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu_tanh",
    "positions": "learned",
    "qk_norm": False,
    "use_bias": True,
    "tie_embeddings": True,
}
LLAMA = {  # Touvron et al. 2023, "LLaMA", section 2.2
    "norm": "rmsnorm",
    "norm_epsilon": 1e-5,
    "activation": "swiglu",
    "positions": "rope",
    "qk_norm": False,
    "use_bias": False,
}
LLAMA3_2 = LLAMA | {  # Meta 2024; meta-llama/Llama-3.2-* (config.json)
    "context_length": 131072,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "rope_scaling": "llama3",
    "rope_factor": 32.0,
    "tie_embeddings": True,
}
QWEN2_5 = LLAMA | {  # Qwen Team 2024, "Qwen2.5 Technical Report", table 1; Qwen/Qwen2.5-* (config.json)
    "context_length": 32768,
    "vocab_size": 151936,
    "norm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "qkv_bias": True,
    "tie_embeddings": True,
}
QWEN3 = LLAMA | {  # Qwen Team 2025, "Qwen3 Technical Report", section 2; Qwen/Qwen3-* (config.json)
    "context_length": 40960,
    "vocab_size": 151936,
    "norm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "qk_norm": True,
    "head_dim": 128,
}


def _size(num_layers: int, num_heads: int, num_kv_heads: int, embed_dim: int, mlp_dim: int) -> dict[str, int]:
    return {
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "embed_dim": embed_dim,
        "mlp_dim": mlp_dim,
    }


def _smollm2(*size: int) -> dict[str, Any]:
    """HuggingFaceTB/SmolLM2-* (config.json): small, tied, 8,192 tokens of context."""
    vocabulary = {"context_length": 8192, "vocab_size": 49152, "tie_embeddings": True, "rope_theta": 1e5}
    return LLAMA | vocabulary | _size(*size)


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": GPT2 | _size(12, 12, 12, 768, 3072),
    "gpt2-355m": GPT2 | _size(24, 16, 16, 1024, 4096),
    "gpt2-774m": GPT2 | _size(36, 20, 20, 1280, 5120),
    "gpt2-1558m": GPT2 | _size(48, 25, 25, 1600, 6400),
    "llama-135m": _smollm2(30, 9, 3, 576, 1536),
    "llama-360m": _smollm2(32, 15, 5, 960, 2560),
    # TinyLlama/TinyLlama-1.1B; meta-llama/Llama-2-7b-hf; meta-llama/Meta-Llama-3-8B (config.json)
    "llama-1.1b": LLAMA
    | {"context_length": 2048, "vocab_size": 32000, "rope_theta": 1e4, "tie_embeddings": False}
    | _size(22, 32, 4, 2048, 5632),
    "llama2-7b": LLAMA
    | {"context_length": 4096, "vocab_size": 32000, "rope_theta": 1e4, "tie_embeddings": False}
    | _size(32, 32, 32, 4096, 11008),
    "llama3-8b": LLAMA
    | {"context_length": 8192, "vocab_size": 128256, "rope_theta": 5e5, "tie_embeddings": False}
    | _size(32, 32, 8, 4096, 14336),
    "llama3.2-1b": LLAMA3_2 | _size(16, 32, 8, 2048, 8192),
    "llama3.2-3b": LLAMA3_2 | _size(28, 24, 8, 3072, 8192),
    # Jiang et al. 2023, "Mistral 7B"; mistralai/Mistral-7B-v0.1 (config.json)
    "mistral-7b": LLAMA
    | {"context_length": 32768, "vocab_size": 32000, "rope_theta": 1e4, "tie_embeddings": False, "sliding_window": 4096}
    | _size(32, 32, 8, 4096, 14336),
    "qwen2.5-0.5b": QWEN2_5 | _size(24, 14, 2, 896, 4864),
    "qwen2.5-1.5b": QWEN2_5 | _size(28, 12, 2, 1536, 8960),
    "qwen3-0.6b": QWEN3 | {"tie_embeddings": True} | _size(28, 16, 8, 1024, 3072),
    "qwen3-1.7b": QWEN3 | {"tie_embeddings": True} | _size(28, 16, 8, 2048, 6144),
    "qwen3-4b": QWEN3 | {"tie_embeddings": True} | _size(36, 32, 8, 2560, 9728),
    "qwen3-8b": QWEN3 | {"tie_embeddings": False} | _size(36, 32, 8, 4096, 12288),
}
PUBLISHED_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama-135m": 134_515_008,
    "llama-360m": 361_821_120,
    "llama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}
# The defaults of all options that say what a model computes, for options that a preset does not name.
OFF = {path.removeprefix("model."): flat_options()[path].default for path in sorted(affecting("model"))}


def get(name: str) -> dict[str, Any]:
    """The options of `config.model` in a preset; "modern-d12" is the project's own preset with 12 layers.

    Raises ValueError for an unknown name.
    """
    family, _, depth = name.partition("-d")
    if family == "modern" and depth.isdecimal() and int(depth) > 0:
        return modern(int(depth))
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; these are: {', '.join(PRESETS)}, modern-dDEPTH")
    return OFF | PRESETS[name]


def modern(depth: int) -> dict[str, Any]:
    """The project's own preset: `depth` layers, a width of 64 x depth, heads of 64.

    The layout is that of Qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU, no biases), tied; the vocabulary is the tokenizer's.
    """
    shape = _size(depth, depth, depth, 64 * depth, 0)
    rest = {"context_length": 1024, "vocab_size": 0, "head_dim": 64, "tie_embeddings": True}
    return OFF | LLAMA | shape | rest | {"norm_epsilon": 1e-6, "qk_norm": True}
