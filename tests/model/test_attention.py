import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.model import attention, presets
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import layouts

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 12, 4, 8
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 6, [1] * 12])


def random_qkv(kv_heads: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(BATCH, LENGTH, heads, HEAD_DIM)) for heads in (HEADS, kv_heads, kv_heads))


def attention_by_hand(q, k, v, segments=None, window=0, slopes=None) -> np.ndarray:
    """Query by query, in float64, over the keys of the same document that are not later and within the window."""
    out = np.zeros_like(q)
    for row, position, head in np.ndindex(q.shape[:3]):
        kv_head = head // (q.shape[2] // k.shape[2])
        seen = [j for j in range(position + 1) if segments is None or segments[row, j] == segments[row, position]]
        seen = [j for j in seen if not window or position - j < window]
        scores = k[row, seen, kv_head] @ q[row, position, head] / np.sqrt(q.shape[3])
        if slopes is not None:
            scores -= slopes[head] * (position - np.array(seen))
        weights = np.exp(scores - scores.max())
        out[row, position, head] = weights / weights.sum() @ v[row, seen, kv_head]
    return out


def sight(length, segments=None, **options) -> attention.Visibility:
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    return attention.Visibility.causal(length, segments, **options)


def reference(q, k, v, segments=None, **options):
    return attention.reference(q, k, v, sight(q.shape[1], segments, **options))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "packed"])
def test_reference_equals_numpy(kv_heads, segments):
    q, k, v = random_qkv(kv_heads)
    found = reference(*map(jnp.float32, (q, k, v)), segments)
    np.testing.assert_allclose(found, attention_by_hand(q, k, v, segments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "packed"])
def test_windows_and_alibi_equal_numpy(segments):
    q, k, v = random_qkv(2)
    slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8])  # of four heads in the paper
    np.testing.assert_allclose(attention.alibi_slopes(4), slopes)
    found = reference(*map(jnp.float32, (q, k, v)), segments, window=3, slopes=attention.alibi_slopes(4))
    np.testing.assert_allclose(found, attention_by_hand(q, k, v, segments, 3, slopes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "packed"])
def test_gradients_equal_finite_differences(segments):
    """The maximum is kept out of the gradient, which must not change it."""
    tensors = random_qkv(2)
    direction = random_qkv(2, seed=1)
    cotangent = np.random.default_rng(2).normal(size=(BATCH, LENGTH, HEADS, HEAD_DIM))

    gradients = jax.grad(lambda *qkv: (reference(*qkv, segments) * cotangent).sum(), argnums=(0, 1, 2))(
        *map(jnp.float32, tensors)
    )
    found = sum((np.float64(g) * d).sum() for g, d in zip(gradients, direction, strict=True))
    step = 1e-5
    ahead, behind = (
        (attention_by_hand(*(t + s * d for t, d in zip(tensors, direction, strict=True)), segments) * cotangent).sum()
        for s in (step, -step)
    )
    assert found == pytest.approx((ahead - behind) / (2 * step), rel=1e-3)


def test_no_gradient_reaches_the_future_or_another_document():
    q, k, v = map(jnp.float32, random_qkv(4))
    gradient = jax.grad(lambda v: reference(q, k, v, SEGMENTS)[0, 7].sum())(v)
    reached = np.flatnonzero(abs(gradient[0]).sum((1, 2)))
    np.testing.assert_array_equal(reached, [6, 7])  # the document of position 7 begins at 6
    assert not gradient[1].any()


def test_huge_scores_stay_finite():
    q, k, v = (jnp.float32(t) * 1e4 for t in random_qkv(4))
    assert jnp.isfinite(reference(q, k, v)).all()


def test_a_row_with_nothing_to_see_gives_numbers():
    q, k, v = map(jnp.float32, random_qkv(4))
    nothing = attention.Visibility(jnp.zeros((1, LENGTH), int), jnp.ones((1, LENGTH), int))
    assert not nothing.mask().any()
    assert jnp.isfinite(attention.reference(q, k, v, nothing)).all()


def test_a_window_as_long_as_the_row_is_none():
    whole, windowed, narrower = (attention.Visibility.causal(LENGTH, window=w) for w in (0, LENGTH, LENGTH - 1))
    assert windowed.window == 0
    np.testing.assert_array_equal(windowed.mask(), whole.mask())
    np.testing.assert_array_equal(whole.mask()[0] & ~narrower.mask()[0], np.eye(LENGTH, k=1 - LENGTH, dtype=bool))


def test_the_cache_mask_shows_slots_up_to_the_position():
    mask = attention.Visibility.cached(jnp.array([[0, 2], [3, 4]]), 5).mask()
    expected = [[[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def rotated(x: np.ndarray, positions: np.ndarray, theta: float = 100.0) -> np.ndarray:
    frequencies = theta ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = attention.rotary_angles(jnp.asarray(positions), frequencies)
    return np.asarray(attention.rotate(jnp.float32(x), angles))


def test_frequencies_are_scaled_by_their_turns_in_the_original_context(tiny_architecture):
    """Llama 3.1's cases, by wavelength: short ones are kept, long ones divided, linear interpolation in between."""
    a = dataclasses.replace(tiny_architecture, head_dim=16, rope_theta=1e4, rope_factor=8.0, rope_original_length=100)
    a = dataclasses.replace(a, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0)
    plain = 1e4 ** (-np.arange(8) / 8)
    expected = []
    for frequency in plain:
        length = 2 * np.pi / frequency
        if length < 100 / 4:
            expected.append(frequency)
        elif length > 100 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (100 / length - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len({round(ratio, 6) for ratio in np.array(expected) / plain}) == 3
    for scaling, frequencies in {"none": plain, "linear": plain / 8, "llama3": expected}.items():
        ours = attention.rotary_frequencies(dataclasses.replace(a, rope_scaling=scaling))
        np.testing.assert_allclose(ours, frequencies, rtol=1e-6)


def test_frequencies_of_llama_3_2_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = config_lib.get_default().model
    model.update(presets.get("llama3.2-1b"))
    a = Architecture.from_config(model, 0)
    options = layouts.LAYOUTS["llama"].write_config(a)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**options), torch.device("cpu"))
    assert factor == 1
    np.testing.assert_allclose(attention.rotary_frequencies(a), expected.numpy(), rtol=1e-6)


def test_pairs_are_rotated_by_their_angle():
    """Element i of the first half and of the second half are one plane, turned by position / theta^(2i/d)."""
    x, positions, theta = random_qkv(4)[0], np.array([np.arange(LENGTH), np.arange(LENGTH) * 3]), 100.0
    half = HEAD_DIM // 2
    angles = positions[:, :, None, None] / theta ** (2 * np.arange(half) / HEAD_DIM)
    planes = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    expected = np.concatenate([planes.real, planes.imag], axis=-1)
    np.testing.assert_allclose(rotated(x, positions, theta), expected, rtol=1e-4, atol=1e-4)


def test_only_the_distance_of_two_positions_matters():
    q, k, _ = random_qkv(4)
    positions = np.tile(np.arange(LENGTH), (BATCH, 1))
    scores = [
        np.einsum("bqhd,bkhd->bhqk", rotated(q, positions + shift), rotated(k, positions + shift)) for shift in (0, 500)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_position_zero_and_lengths_are_kept():
    x = random_qkv(4)[0]
    np.testing.assert_array_equal(rotated(x, np.zeros((BATCH, LENGTH), int)), np.float32(x))
    turned = rotated(x, np.tile(np.arange(LENGTH), (BATCH, 1)))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def row_keys(rows: int):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(rows))


def test_dropout_keeps_the_expectation():
    x = jnp.ones((64, 1000))
    dropped = attention.dropout(x, 0.3, row_keys(64), 0)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    assert dropped.mean() == pytest.approx(1, abs=4 * np.sqrt(0.3 / 0.7 / dropped.size))


def test_a_row_is_dropped_alike_whatever_its_batch():
    x = jax.random.normal(jax.random.key(1), (6, 50))
    keys = row_keys(6)
    whole = attention.dropout(x, 0.5, keys, 3)
    for row in (0, 5):
        np.testing.assert_array_equal(attention.dropout(x[row : row + 1], 0.5, keys[row : row + 1], 3)[0], whole[row])


def test_rows_and_sites_are_dropped_differently():
    ones, keys = jnp.ones((2, 200)), row_keys(2)
    first, second = attention.dropout(ones, 0.5, keys, 1), attention.dropout(ones, 0.5, keys, 2)
    for a, b in ((first[0], first[1]), (first[0], second[0])):
        assert 0.3 < (a != b).mean() < 0.7


@pytest.mark.parametrize(("rate", "with_keys"), [(0.5, False), (0.0, True)])
def test_without_keys_or_rate_nothing_is_dropped(rate, with_keys):
    x = jnp.ones((2, 5))
    np.testing.assert_array_equal(attention.dropout(x, rate, row_keys(2) if with_keys else None, 0), x)
