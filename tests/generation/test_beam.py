"""Beam search compared with all possible completions, with transformers, and alone with in a batch."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts import models
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation import beam
from gptjax.generation.beam_params import BeamParams
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Model
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import partition

BYTES = build_tokenizer("byte")
PROMPTS = [BYTES.encode(text) for text in ("a", "hello you", "the longest one", "z")]


@pytest.fixture(scope="module")
def generator(random_model):
    return Generator(Model.prepare(*random_model()), BYTES)


def test_one_beam_is_greedy(generator):
    greedy = generator.complete_tokens(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.0))
    found = beam.search(generator, PROMPTS, BeamParams(beams=1, max_new_tokens=12))
    for completion, (hypothesis,) in zip(greedy, found, strict=True):
        np.testing.assert_array_equal(hypothesis.tokens, completion.tokens)
        assert (hypothesis.text, hypothesis.finish_reason) == (completion.text, completion.finish_reason)
        np.testing.assert_allclose(hypothesis.log_probability, completion.log_probabilities.sum(), rtol=1e-4)


def test_a_wide_beam_finds_the_best_of_all_completions(random_model):
    """With three tokens, one of which ends the text, and as many beams as there are unfinished texts."""
    architecture, params = random_model(vocab_size=3, vocab_multiple=1, embed_dim=16, num_layers=1)
    generator = Generator(Model.prepare(architecture, params), BYTES)
    generator.end_ids = (2,)
    prompt, steps, penalty = np.array([0, 1]), 4, 0.7
    texts = [
        text
        for n in range(1, steps + 1)
        for text in itertools.product(range(3), repeat=n)
        if 2 not in text[:-1] and (text[-1] == 2 or n == steps)
    ]
    score = jax.jit(partial(_log_probability, architecture), static_argnums=1)
    sums = {text: float(score(params, 2, np.array([0, 1, *text]))) for text in texts}
    ranked = sorted(texts, key=lambda text: -sums[text] / len(text) ** penalty)
    (found,) = beam.search(
        generator,
        [prompt],
        BeamParams(beams=16, num_best=5, length_penalty=penalty, early_stopping="never", max_new_tokens=steps),
    )
    assert [tuple(hypothesis.tokens.tolist()) for hypothesis in found] == ranked[:5]
    for hypothesis in found:
        text = tuple(hypothesis.tokens.tolist())
        np.testing.assert_allclose(hypothesis.log_probability, sums[text], rtol=1e-5)
        np.testing.assert_allclose(hypothesis.score, sums[text] / len(text) ** penalty, rtol=1e-5)
        assert hypothesis.finish_reason == ("stop" if text[-1] == 2 else "length")


def _log_probability(architecture, params, prompt_length, text):
    model = gpt.bind(architecture, params)
    logits = model.logits(model.hidden(text[None], positions=jnp.arange(len(text))[None])[0])[0]
    scores = jax.nn.log_softmax(logits)[jnp.arange(len(text) - 1), text[1:]]
    return scores[prompt_length - 1 :].sum()


def test_alone_in_a_batch_and_on_a_mesh(random_model, generator):
    params = BeamParams(beams=3, num_best=3, max_new_tokens=10, length_penalty=0.0)
    together = beam.search(generator, PROMPTS, params)
    alone = [beam.search(generator, [prompt], params)[0] for prompt in PROMPTS]
    mesh = mesh_lib.make_mesh(config_lib.get_default().mesh, jax.devices()[:2])
    architecture, values = random_model()
    values = jax.device_put(values, partition.parameter_shardings(gpt.abstract_params(architecture), mesh))
    split = beam.search(Generator(Model.prepare(architecture, values), BYTES), PROMPTS, params, mesh=mesh)
    for one, *others in zip(together, alone, split, strict=True):
        for other in others:
            assert [h.tokens.tolist() for h in one] == [h.tokens.tolist() for h in other]
            np.testing.assert_allclose([h.score for h in one], [h.score for h in other], rtol=1e-4)


def test_where_the_context_ends(generator):
    context = generator.model.architecture.context_length
    prompts = [np.full(size, 65, np.int32) for size in (context, context - 1, context - 3)]
    found = beam.search(generator, prompts, BeamParams(beams=2, num_best=2, max_new_tokens=50, ignore_eos=True))
    assert [[len(h.tokens) for h in own] for own in found] == [[0], [1, 1], [3, 3]]
    assert {h.finish_reason for own in found for h in own} == {"length"}
    with pytest.raises(UserError, match="prompt 1 has 65 tokens"):
        beam.search(generator, [*prompts[:1], np.full(context + 1, 65)], BeamParams())
    with pytest.raises(UserError, match="num_best is 5; expected from 1 to the number of beams, 4"):
        beam.search(generator, prompts, BeamParams(num_best=5))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random GPT-2 of transformers, with the byte tokenizer; tokens that it prefers end a text."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.4, eos_token_id=256
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    likely = [int(model.generate(torch.tensor([[byte]]), max_new_tokens=6, do_sample=False)[0, -1]) for byte in b"ahz"]
    model.generation_config.update(eos_token_id=[256, *set(likely)], pad_token_id=256, bos_token_id=256)
    model.save_pretrained(directory)
    BYTES.save(directory / "tokenizer.json")
    return model, directory


@pytest.mark.parametrize(
    ("early_stopping", "beams"),
    [
        ("false", 4),
        pytest.param("true", 4, marks=pytest.mark.slow),
        ("never", 4),
        pytest.param("false", 2, marks=pytest.mark.slow),
    ],
)
def test_equal_to_transformers(published, early_stopping, beams):
    import torch

    model, directory = published
    generator = Generator.from_trained(models.find(f"hf:{directory}").load())
    rule = {"false": False, "true": True, "never": "never"}[early_stopping]
    prompts = [BYTES.encode(text) for text in ("a", "hello you")]
    reasons = set()
    for length_penalty, prompt in itertools.product((1.0, 0.0, -0.5, 2.0), prompts):
        params = BeamParams(beams, beams, length_penalty, early_stopping, max_new_tokens=12)  # type: ignore
        (own,) = beam.search(generator, [prompt], params)
        ids = torch.tensor(prompt[None].astype(np.int64))
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
            early_stopping=rule,
            max_new_tokens=12,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        sequences = [row[len(prompt) :].tolist() for row in theirs.sequences]
        for hypothesis, sequence, score in zip(own, sequences, theirs.sequences_scores.tolist(), strict=True):
            tokens = hypothesis.tokens.tolist()
            assert tokens == sequence[: len(tokens)] and set(sequence[len(tokens) :]) <= {256}
            np.testing.assert_allclose(hypothesis.score, score, rtol=1e-4)
            reasons.add(hypothesis.finish_reason)
    assert "stop" in reasons


def test_greedy_text_is_that_of_the_pipeline_of_transformers(published):
    import transformers

    _, directory = published
    pipeline = transformers.pipeline("text-generation", str(directory), device="cpu")
    generator = Generator.from_trained(models.find(f"hf:{directory}").load())
    texts = ["hello", "the cat", "你好"]
    ours = generator.complete(texts, SamplingParams(max_new_tokens=12, temperature=0.0))
    for text, completion in zip(texts, ours, strict=True):
        (theirs,) = pipeline(text, max_new_tokens=12, do_sample=False, return_full_text=False)
        assert completion.text == theirs["generated_text"].rstrip("\ufffd")
