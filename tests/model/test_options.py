"""Value embeddings, residual scalars, gates, placement of norms and initial factors, by hand in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.attention import Visibility
from gptjax.model.layers import Block

LENGTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM, EPSILON = 6, 16, 4, 2, 4, 1e-5
PLAIN = {  # what every variant below has in common, so that the mathematics by hand stays short
    "positions": "none", "qk_norm": False, "activation": "relu", "tie_embeddings": False, "vocab_multiple": 1
}  # fmt: skip
VARIANTS = {
    "none": {},
    "value embeddings, one table": {"value_embeddings": 1},
    "value embeddings, two tables for three layers": {"value_embeddings": 2},
    "residual scalars": {"residual_scalars": True},
    "residual scalars, post-norm": {"residual_scalars": True, "norm_placement": "post"},
    "attention gate": {"attention_gate": True},
    "post-norm": {"norm_placement": "post"},
    "post-norm, layer norm": {"norm_placement": "post", "norm": "layernorm"},
    "all": {"value_embeddings": 3, "residual_scalars": True, "attention_gate": True},
}


def architecture_of(**options) -> Architecture:
    model = config_lib.get_default().model
    model.update(num_layers=3, num_heads=HEADS, num_kv_heads=KV_HEADS, embed_dim=WIDTH, context_length=LENGTH, **PLAIN)
    model.update(**options)
    return Architecture.from_config(model, 11)


def random_params(architecture: Architecture) -> gpt.Params:
    """Random values for every parameter, also for those that start at zero or one."""
    random = np.random.default_rng(0)
    abstract = gpt.abstract_params(architecture)
    return jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), abstract)


def initial(architecture: Architecture) -> gpt.Params:
    return jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))


def by_path(params: gpt.Params) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def logits_of(architecture: Architecture, params: gpt.Params, tokens: np.ndarray) -> jax.Array:
    @jax.jit
    def compute(params, tokens):
        model = gpt.bind(architecture, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model.hidden(tokens, positions=positions)[0])

    return compute(params, jnp.asarray(tokens, jnp.int32))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalised(kind: str, x: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def by_hand(a: Architecture, params: gpt.Params, tokens: np.ndarray) -> np.ndarray:
    """The logits of one text in float64, from the papers' formulas."""
    p = {path: np.float64(leaf) for path, leaf in by_path(params).items()}
    x = p["embedding/embedding"][tokens]
    x0 = normalised("rmsnorm", x)
    for layer in range(a.num_layers):
        block = {path.removeprefix("blocks/"): leaf[layer] for path, leaf in p.items() if path.startswith("blocks/")}

        def norm(x, name, block=block):
            return normalised(a.norm, x, block[f"{name}/scale"])

        if a.residual_scalars:
            x = block["residual_scale"] * x + block["embedding_scale"] * x0
        h = x if a.norm_placement == "post" else norm(x, "attention_norm")
        q = (h @ block["attention/query/kernel"]).reshape(-1, HEADS, HEAD_DIM)
        k, v = ((h @ block[f"attention/{name}/kernel"]).reshape(-1, KV_HEADS, HEAD_DIM) for name in ("key", "value"))
        if a.value_embeddings:  # table number `layer` mod their count, gated per head, twice as wide as a sigmoid
            rows = p["value_embedding/embedding"][tokens]
            table = np.split(rows, a.value_embeddings, axis=-1)[layer % a.value_embeddings]
            gate = 2 * sigmoid(h @ block["attention/value_gate/kernel"])
            v = v + gate[..., None] * table.reshape(-1, KV_HEADS, HEAD_DIM)
        mixed = np.zeros_like(q)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, group].T / np.sqrt(HEAD_DIM)
            weights = np.where(np.tri(len(tokens), dtype=bool), np.exp(scores), 0)
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        if a.attention_gate:
            mixed = mixed * sigmoid(h @ block["attention/gate/kernel"])[..., None]
        x = x + mixed.reshape(len(tokens), -1) @ block["attention/out/kernel"]
        x = norm(x, "attention_norm") if a.norm_placement == "post" else x
        h = x if a.norm_placement == "post" else norm(x, "mlp_norm")
        x = x + np.maximum(h @ block["mlp/up/kernel"], 0) @ block["mlp/down/kernel"]
        x = norm(x, "mlp_norm") if a.norm_placement == "post" else x
    x = normalised(a.norm, x, p["final_norm/scale"]) if a.norm_placement == "pre" else x
    return x @ p["head/kernel"]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_the_formulas(options):
    architecture = architecture_of(**options)
    params = random_params(architecture)
    tokens = np.array([3, 3, 10, 0, 7, 3])
    expected = by_hand(architecture, params, tokens)
    np.testing.assert_allclose(logits_of(architecture, params, tokens[None])[0], expected, rtol=1e-3, atol=1e-3)


def test_other_parameters_start_at_the_same_values():
    """So that arms of a study that differ only in these options are paired."""
    without = by_path(initial(architecture_of()))
    options = architecture_of(value_embeddings=2, residual_scalars=True, attention_gate=True)
    found = by_path(initial(options))
    for path, leaf in without.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    new = {path: leaf for path, leaf in found.items() if path not in without}
    assert {path: leaf.shape for path, leaf in new.items()} == {
        "value_embedding/embedding": (11, 2 * KV_HEADS * HEAD_DIM),
        "blocks/residual_scale": (3,),
        "blocks/embedding_scale": (3,),
        "blocks/attention/gate/kernel": (3, WIDTH, HEADS),
        "blocks/attention/value_gate/kernel": (3, WIDTH, KV_HEADS),
    }
    assert (new["blocks/residual_scale"] == 1).all() and not new["blocks/embedding_scale"].any()
    assert not new["blocks/attention/gate/kernel"].any() and not new["blocks/attention/value_gate/kernel"].any()
    assert new["value_embedding/embedding"].std() == pytest.approx(0.02, rel=0.1)


def test_residual_scalars_are_not_rounded_to_bfloat16():
    """A block whose branches add nothing gives the exact mixture, rounded once."""
    architecture = architecture_of(
        residual_scalars=True, compute_dtype="bfloat16", init_multipliers="blocks/(attention/out|mlp/down)/kernel=0"
    )
    block = Block(architecture, rngs=nnx.Rngs(0))
    block.residual_scale[...], block.embedding_scale[...] = jnp.float32(1.003), jnp.float32(0.0103)
    random = np.random.default_rng(0)
    x, embedded = (jnp.asarray(random.normal(size=(1, 8, WIDTH)), jnp.bfloat16) for _ in range(2))
    found, *_ = block(
        x,
        layer=jnp.int32(0),
        embedded=embedded,
        dropout_keys=None,
        cache=None,
        visibility=Visibility.causal(8),
        angles=None,
        positions=jnp.arange(8)[None],
    )
    expected = jnp.asarray(1.003 * np.float64(x) + 0.0103 * np.float64(embedded), jnp.bfloat16)
    assert (found == expected).mean() > 0.99  # a sum in float32 may lie on the other side of a tie
    assert (found != x).any()


def test_residual_scalars_change_nothing_at_the_start():
    tokens = np.arange(LENGTH)[None]
    plain, scaled = (architecture_of(residual_scalars=on) for on in (False, True))
    np.testing.assert_array_equal(*(logits_of(a, initial(a), tokens) for a in (plain, scaled)))


def test_gates_are_counted_in_flops_and_tables_are_not():
    """Per token and layer: one product of WIDTH by the heads, forward and backward."""
    plain = architecture_of().flops_per_token()
    assert architecture_of(attention_gate=True).flops_per_token() - plain == 6 * 3 * WIDTH * HEADS
    assert architecture_of(value_embeddings=2).flops_per_token() - plain == 6 * 3 * WIDTH * KV_HEADS
    assert architecture_of(residual_scalars=True).flops_per_token() == plain


def test_output_projections_of_zeros_make_a_model_of_its_embeddings():
    outputs = "blocks/(attention/out|mlp/down)/kernel=0"
    architecture = architecture_of(init_multipliers=f"{outputs} embedding/.*=3 head/kernel=0.5")
    found, plain = by_path(initial(architecture)), by_path(initial(architecture_of()))
    factors = {"embedding/embedding": 3, "head/kernel": 0.5}
    factors |= {f"blocks/{name}/kernel": 0 for name in ("attention/out", "mlp/down")}
    for path, leaf in plain.items():
        np.testing.assert_allclose(found[path], leaf * factors.get(path, 1), rtol=1e-6, err_msg=path)
    tokens = np.arange(LENGTH)
    embedded = np.float64(found["embedding/embedding"])[tokens]
    expected = normalised("rmsnorm", embedded) @ np.float64(found["head/kernel"])
    np.testing.assert_allclose(logits_of(architecture, initial(architecture), tokens[None])[0], expected, atol=1e-5)


def test_experts_can_start_at_zero():
    options = {"num_experts": 2, "init_multipliers": "blocks/mlp/expert_down/kernel=0"}
    assert not initial(architecture_of(**options))["blocks"]["mlp"]["expert_down"]["kernel"].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head/kernal=0", r"model.init_multipliers: 'head/kernal' matches no parameter; these are: .*head/kernel"),
        ("final_norm/scale=2", "'final_norm/scale' matches no parameter"),  # starts at one, not at random
        ("head/kernel", "is not PATTERN=FACTOR"),
        ("head/kernel=nan", "is not PATTERN=FACTOR"),
        ("head/kernel=-1", "with a factor of 0 or more"),
        ("head/(kernel=0", "is not PATTERN=FACTOR"),
    ],
)
def test_factors_that_cannot_be_used(text, message):
    with pytest.raises(UserError, match=message):
        gpt.abstract_params(architecture_of(init_multipliers=text))


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        ({"num_layers": 2, "value_embeddings": 3}, "adamw", "model.value_embeddings 3 is more than model.num_layers 2"),
        ({"attention_gate": True, "mup_base_width": 64}, "adamw", "mup_base_width is set with model.attention_gate"),
        ({"init_multipliers": "head/.*=2 .*/out/.*=0"}, "muonh", "starts blocks/attention/out/kernel at zero, and"),
    ],
)
def test_options_that_contradict_each_other_are_refused(model, optimizer, message):
    config = config_lib.get_default()
    config.model.update(model)
    config.optimizer.name = optimizer
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)
    config.model.update(num_layers=3, mup_base_width=0, init_multipliers="head/kernel=0")
    config_lib.validate(config)


def test_remaining_kinds_of_computation_agree():
    """bfloat16 differs by its rounding only."""
    exact = architecture_of(value_embeddings=2, residual_scalars=True, attention_gate=True)
    half = dataclasses.replace(exact, compute_dtype="bfloat16")
    params, tokens = random_params(exact), np.arange(LENGTH)[None]
    expected, found = logits_of(exact, params, tokens), logits_of(half, params, tokens)
    assert 0 < abs(found - expected).max() < 0.05 * abs(expected).max()
