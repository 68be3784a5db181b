"""Every implementation of attention equals the reference, forward and gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MESH_AXES
from gptjax.errors import UserError
from gptjax.model import blocked, kernels
from gptjax.model.attention import Visibility, alibi_slopes, reference

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 256, 4, 16


def inputs(kv_heads: int, length: int = LENGTH) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [jax.random.normal(key, (BATCH, length, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True)]


def documents(length: int = LENGTH) -> jax.Array:
    """One row of documents of different lengths, one of a single document."""
    begins = np.zeros((BATCH, length), int)
    begins[0, [3, 70, 71, 200]] = 1
    return jnp.asarray(begins.cumsum(1), jnp.int32)


CASES = {
    "causal": {},
    "packed": {"packed": True},
    "window": {"window": 50},
    "packed and window": {"packed": True, "window": 50},
    "window of one block and more": {"window": 129},
}


def sight(packed: bool = False, length: int = LENGTH, **options) -> Visibility:
    return Visibility.causal(length, documents(length) if packed else None, **options)


def few_keys_a_block(monkeypatch, tokens: int) -> None:
    for module in (blocked, kernels):
        monkeypatch.setattr(module, "BLOCK", tokens)


def assert_equal(name: str, visibility: Visibility, tensors: list[jax.Array], **tolerance):
    q, k, v, cotangent = tensors

    def run(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, visibility), q, k, v)
        return out, *pull(cotangent)

    found = jax.jit(lambda: run(lambda *xs: kernels.attend(*xs, implementation=name)))()
    expected = jax.jit(lambda: run(reference))()
    for what, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, err_msg=what, **tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["xla", "splash"])
def test_equals_the_reference(name, case, kv_heads, monkeypatch):
    few_keys_a_block(monkeypatch, 128)
    assert_equal(name, sight(**CASES[case]), inputs(kv_heads), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 100, 129, 250])
def test_blocks_need_not_divide_the_row(length, monkeypatch):
    few_keys_a_block(monkeypatch, 64)
    segments = jnp.asarray(np.arange(length) // 60, jnp.int32)[None].repeat(BATCH, 0)
    for visibility in (Visibility.causal(length), Visibility.causal(length, segments, window=7)):
        assert_equal("xla", visibility, inputs(2, length), rtol=1e-4, atol=2e-5)


def test_blocks_know_alibi(monkeypatch):
    few_keys_a_block(monkeypatch, 64)
    assert_equal("xla", sight(packed=True, slopes=alibi_slopes(HEADS)), inputs(2), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"context": 2, "tensor": 2}, {"context": 4}], ids=str)
@pytest.mark.parametrize("name", ["reference", "xla", "ring", "splash"])
def test_on_a_mesh(name, axes, monkeypatch):
    """With rows, heads and queries sharded."""
    if name == "splash" and axes == {"context": 4}:
        pytest.skip("a block of splash is 128 tokens, a part of the row 64")
    few_keys_a_block(monkeypatch, 128)
    sizes = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))
    tensors = inputs(2)
    for visibility in (sight(), sight(packed=True, window=50)):
        expected = reference(*tensors[:3], visibility)
        with jax.set_mesh(mesh):
            placed = jax.device_put(tensors[:3], jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "context", "tensor")))
            found = jax.jit(lambda *xs: kernels.attend(*xs, visibility, implementation=name))(*placed)  # noqa: B023
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "axes"),
    [*((case, {"context": 8}) for case in CASES), ("alibi", {"data": 2, "context": 2, "tensor": 2})],
    ids=str,
)
def test_gradients_go_around_the_ring(case, axes, monkeypatch):
    """With shards of 32 or 128 keys, which blocks of 20 do not divide."""
    few_keys_a_block(monkeypatch, 20)
    visibility = sight(**CASES[case]) if case != "alibi" else sight(packed=True, slopes=alibi_slopes(HEADS))
    sizes = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    with jax.set_mesh(jax.make_mesh(sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))):
        assert_equal("ring", visibility, inputs(2), rtol=1e-4, atol=2e-5)


def test_no_device_of_a_ring_holds_a_row():
    """Neither pass gathers: a long row on eight devices takes the memory of an eighth of it on one device."""

    def bytes_of(devices: int, length: int, name: str) -> int:
        sizes = tuple(devices if axis == "context" else 1 for axis in MESH_AXES)
        mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))
        rows = jax.ShapeDtypeStruct(
            (1, length, 2, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "context"))
        )

        def loss(q, k, v):
            return kernels.attend(q, k, v, Visibility.causal(length), implementation=name).sum()

        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(rows, rows, rows).compile()
        assert devices == 1 or name != "ring" or "all-gather" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    one, ring = bytes_of(1, 2048, "xla"), bytes_of(8, 16384, "ring")
    assert ring < 1.3 * one


def test_masks_of_all_blocks_are_not_kept_for_all_layers(monkeypatch):
    """Masks depend on no parameter, so rematerialisation could compute and keep all of them at once."""
    few_keys_a_block(monkeypatch, 64)
    length, layers = 512, 3

    def loss(scales, x):
        @jax.checkpoint
        def layer(x, scale):
            x = x * scale
            return kernels.attend(x, x, x, Visibility.causal(length), implementation="xla"), None

        return jax.lax.scan(layer, x, scales)[0].sum()

    x = jnp.ones((1, length, 2, HEAD_DIM))
    text = jax.jit(jax.grad(loss)).lower(jnp.ones(layers), x).compile().as_text()
    masks = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"pred\[([\d,]+)\]", text)]
    assert 0 < max(masks) <= 2 * length * 64  # heads x queries x keys of a block


def test_a_part_of_the_row_that_no_block_divides_is_refused():
    mesh = jax.make_mesh((1, 1, 1, 4, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="multiple of 128"):
        kernels.attend(*inputs(2)[:3], sight(), implementation="splash")


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("cudnn", {"dtype": jnp.float32}, "bfloat16"),
        ("cudnn", {"packed": True}, "packed"),
        ("cudnn", {"context": 2}, "mesh.context"),
        ("cudnn", {"head_dim": 256}, "head dimension"),
        ("cudnn", {"alibi": True}, "ALiBi"),
        ("splash", {"alibi": True}, "ALiBi"),
        ("splash", {"length": 100}, "128"),
    ],
)
def test_what_a_kernel_cannot_do(name, changes, problem):
    usual = kernels.Task(jnp.bfloat16, length=1024, head_dim=64, packed=False)
    assert kernels.limits(name, usual) is None
    assert problem in kernels.limits(name, usual._replace(**changes))


def test_the_message_names_the_alternative():
    with pytest.raises(UserError, match=r"model.attention=cudnn.*model.compute_dtype.*use xla or auto"):
        kernels.attend(*inputs(2)[:3], sight(), implementation="cudnn")


def test_automatic_choice():
    task = kernels.Task(jnp.bfloat16, length=1024, head_dim=64, packed=False)
    assert kernels.choose(task, "tpu") == "splash"
    assert kernels.choose(task, "gpu") == "cudnn"
    assert kernels.choose(task._replace(packed=True, length=2048), "gpu") == "xla"
    assert kernels.choose(task, "cpu") == "reference"
    assert kernels.choose(task._replace(length=4096), "cpu") == "xla"
    assert kernels.choose(task._replace(length=131072, context=16), "tpu") == "ring"
    assert kernels.choose(task._replace(length=8192, context=16), "tpu") == "splash"
