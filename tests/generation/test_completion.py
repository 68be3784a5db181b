import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Model
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import partition

BYTES = build_tokenizer("byte")
CONTEXT = 64


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(num_heads=2, context_length=CONTEXT)


@pytest.fixture
def generator(model):
    return Generator(Model.prepare(*model), BYTES)


def writer(model, text: str) -> Generator:
    """A generator whose model writes `text`, one byte per position, whatever the prompt, then ends.

    Its residual stream is the position embedding alone; the head reads the next token from it.
    """
    architecture, _ = model
    architecture = dataclasses.replace(
        architecture, positions="learned", tie_embeddings=False, embed_dim=CONTEXT, norm="layernorm"
    )
    abstract = gpt.abstract_params(architecture)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    params["final_norm"]["scale"] += 1.0
    params["position_embedding"]["embedding"] = jnp.eye(CONTEXT)
    tokens = [*BYTES.encode(text), *[BYTES.eot_id] * (CONTEXT - len(text.encode()))]
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = kernel.at[jnp.arange(CONTEXT), jnp.array(tokens)].set(100.0)
    return Generator(Model.prepare(architecture, params), BYTES)


def test_greedy_equals_an_uncached_loop(model, generator):
    architecture, params = model
    prompts = ["", "a", "The quick brown", "你好"]
    sampling = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    completions = generator.complete(prompts, sampling)
    forward = jax.jit(
        lambda params, tokens, positions: gpt.bind(architecture, params).logits(
            gpt.bind(architecture, params).hidden(tokens, positions=positions)[0]
        )
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        text = [BYTES.eot_id, *BYTES.encode(prompt)]
        for _ in range(12):
            padded = np.zeros((1, CONTEXT), np.int32)
            padded[0, : len(text)] = text
            logits = forward(params, padded, np.arange(CONTEXT)[None])
            text.append(int(logits[0, len(text) - 1].argmax()))
        assert completion.tokens.tolist() == text[-12:]
        assert completion.finish_reason == "length"


def test_what_a_row_draws_does_not_depend_on_its_neighbours(model, generator):
    params = SamplingParams(max_new_tokens=40, top_k=40, seed=7)
    prompts = ["alpha", "b", "a much longer prompt than the others", "", "alpha"]
    together = generator.complete(prompts, params)
    one_by_one = Generator(Model.prepare(*model), BYTES, batch_size=1)
    for a, b in zip(together, one_by_one.complete(prompts, params), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
    (last,) = one_by_one.complete(prompts[4:], params, indices=[4])
    assert last.tokens.tolist() == together[4].tokens.tolist()


def test_equal_prompts_differ_by_index_and_seed(generator):
    first = generator.complete(["x"] * 4, SamplingParams(seed=7))
    second = generator.complete(["x"] * 4, SamplingParams(seed=8))
    assert len({tuple(completion.tokens) for completion in [*first, *second]}) == 8


def test_draws_differ_from_position_to_position(model):
    """From a uniform distribution; one random key for all positions would give equal tokens."""
    architecture, params = model
    uniform = Generator(Model.prepare(architecture, jax.tree.map(jnp.zeros_like, params)), BYTES)
    (completion,) = uniform.complete([""], SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert len(set(completion.tokens.tolist())) > 25
    np.testing.assert_allclose(completion.log_probabilities, -np.log(BYTES.vocab_size), rtol=1e-5)


def test_log_probabilities_belong_to_the_tokens(model, generator):
    architecture, params = model
    prompt = np.array([BYTES.eot_id, 65, 66], np.int32)
    (completion,) = generator.complete_tokens([prompt], SamplingParams(max_new_tokens=9, ignore_eos=True))
    text = np.concatenate([prompt, completion.tokens])
    bound = gpt.bind(architecture, params)
    hidden, _ = bound.hidden(jnp.asarray(text)[None], positions=jnp.arange(len(text))[None])
    expected = jax.nn.log_softmax(bound.logits(hidden)[0])[np.arange(2, len(text) - 1), text[3:]]
    np.testing.assert_allclose(completion.log_probabilities, expected, atol=1e-4)


def test_end_of_text_stops(model):
    generator = writer(model, "hello")
    (completion,) = generator.complete([""], SamplingParams(temperature=0))
    assert (completion.text, completion.finish_reason, completion.stop) == ("hello", "stop", None)
    assert completion.tokens.tolist() == [*b"hello", BYTES.eot_id]
    assert len(completion.log_probabilities) == 6
    (completion,) = generator.complete([""], SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True))
    assert (completion.text, len(completion.tokens), completion.finish_reason) == ("hello", 8, "length")


@pytest.mark.parametrize("streaming", [False, True])
def test_stop_text_over_several_tokens(model, streaming):
    generator = writer(model, "first line\n\nsecond line and more of it")
    pieces = []
    (completion,) = generator.complete(
        [""],
        SamplingParams(temperature=0, stop=("never", "\n\nsec")),
        on_text=(lambda place, text: pieces.append((place, text))) if streaming else None,
    )
    assert (completion.text, completion.finish_reason, completion.stop) == ("first line", "stop", "\n\nsec")
    assert completion.tokens.tolist() == list(b"first line\n\nsec")
    assert len(completion.log_probabilities) == len(completion.tokens)
    if streaming:
        assert "".join(text for _, text in pieces) == "first line"
        assert all(place == 0 and text for place, text in pieces)


def test_streaming_shows_whole_characters(model):
    text = "你好，世界 🚀🚀 ok"
    pieces = []
    (completion,) = writer(model, text).complete(
        [""], SamplingParams(temperature=0), on_text=lambda _, piece: pieces.append(piece)
    )
    assert "".join(pieces) == completion.text == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_cut_in_the_middle_of_a_character_leaves_it_out(model):
    (completion,) = writer(model, "世界").complete([""], SamplingParams(temperature=0, max_new_tokens=5))
    assert (completion.text, completion.finish_reason) == ("世", "length")


def test_generation_ends_where_the_context_is_full(generator):
    params = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    prompts = [np.full(length, 65, np.int32) for length in (10, CONTEXT - 1, CONTEXT)]
    completions = generator.complete_tokens(prompts, params)
    assert [len(c.tokens) for c in completions] == [CONTEXT - 10, 1, 0]
    assert {c.finish_reason for c in completions} == {"length"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.full(CONTEXT + 1, 65), rf"prompt 1 has {CONTEXT + 1} tokens.*{CONTEXT}"),
        (np.array([], np.int32), "prompt 1 is empty"),
        (np.array([65, BYTES.vocab_size]), "prompt 1 has a token id outside 0 to 256"),
    ],
)
def test_prompts_that_cannot_be_continued(generator, prompt, message):
    with pytest.raises(UserError, match=message):
        generator.complete_tokens([np.array([65]), prompt], SamplingParams())


def test_no_prompts_give_no_completions(generator):
    assert generator.complete([], SamplingParams()) == []


def test_settings_and_similar_sizes_share_compiled_programs(model):
    generator = Generator(Model.prepare(*model), BYTES)
    generator.complete(["abc"] * 3, SamplingParams(max_new_tokens=20))
    programs = decoding.insert._cache_size(), decoding.decode._cache_size()
    generator.complete(["abcdef"] * 4, SamplingParams(max_new_tokens=9, temperature=0, stop=("x",), seed=3))
    others = SamplingParams(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.1)
    Generator(Model.prepare(*model), BYTES).complete(["x"] * 3, others)
    assert (decoding.insert._cache_size(), decoding.decode._cache_size()) == programs


def test_a_mesh_gives_the_same_completions(model, generator):
    architecture, params = model
    mesh = mesh_lib.make_mesh(config_lib.get_default().mesh)
    placed = jax.device_put(params, partition.parameter_shardings(params, mesh))
    on_mesh = Generator(Model.prepare(architecture, placed), BYTES, mesh=mesh)
    sampling = SamplingParams(max_new_tokens=20)
    prompts = ["alpha", "b", "gamma delta"]
    for a, b in zip(generator.complete(prompts, sampling), on_mesh.complete(prompts, sampling), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()


def test_an_error_leaves_no_half_results(generator, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(decoding, "decode", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        generator.complete(["a", "bc"], SamplingParams())
