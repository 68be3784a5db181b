"""Prompts are read in chunks, and cached chunks are not read again."""

import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.generation import decoding
from gptjax.generation.engine import Engine, Model
from gptjax.generation.params import SamplingParams

BYTES = build_tokenizer("byte")
CHUNK = 16


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(context_length=128, positions="rope", num_kv_heads=2, ngram_order=3, sliding_window=40)


@pytest.fixture(scope="module")
def prepared(model):
    return Model.prepare(*model)


def server(prepared, **options) -> Engine:
    return Engine(prepared, BYTES, **{"slots": 3, "rounds": 4, "chunk": CHUNK, "capacity": 128} | options)


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 257, length).astype(np.int32)


def finish(engine: Engine) -> dict[int, list]:
    """The events of all requests, by handle."""
    events: dict[int, list] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.handle, []).append(event)
    return events


def written(events) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) of a request."""
    return [t for e in events for t in e.tokens], [v for e in events for v in e.log_probabilities]


def alone(prepared, prompt, params, **options):
    engine = server(prepared)
    engine.submit(prompt, params, **options)
    (events,) = finish(engine).values()
    return written(events)


PARAMS = SamplingParams(max_new_tokens=12, seed=3, temperature=0.9, repetition_penalty=1.2, ignore_eos=True)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 50, 100])
def test_a_prompt_in_chunks_equals_the_full_forward_pass(check, model, prepared, length):
    tokens, scores = alone(prepared, prompt_of(length), PARAMS, index=5)
    check(model, prompt_of(length), PARAMS, 5, tokens, scores)


def test_a_long_prompt_lets_others_write(prepared):
    engine = server(prepared, rounds=1)
    engine.submit(prompt_of(3), SamplingParams(max_new_tokens=20, ignore_eos=True))
    engine.step()
    engine.submit(prompt_of(100, 1), SamplingParams(max_new_tokens=1, ignore_eos=True))
    steps = [{event.handle for event in engine.step()} for _ in range(7)]
    assert steps == [{0}] * 6 + [{0, 1}], "seven chunks, and a token of the other after each"


def test_alone_or_among_others_the_bits_are_the_same(prepared):
    """Tokens and log-probabilities do not depend on other requests or on the slot."""
    prompts = [prompt_of(length, length) for length in (40, 3, 70, 16, 9, 33, 64)]
    expected = [alone(prepared, prompt, PARAMS, index=i) for i, prompt in enumerate(prompts)]
    engine = server(prepared)
    for i in (3, 0, 6, 2, 5, 1, 4):
        engine.submit(prompts[i], PARAMS, index=i)
        engine.step()
    events = finish(engine)
    # The first events were given out by the steps between: what is left is compared from its end.
    for handle, i in enumerate((3, 0, 6, 2, 5, 1, 4)):
        for ours, own in zip(written(events.get(handle, [])), expected[i], strict=True):
            assert ours == own[len(own) - len(ours) :]


def test_the_next_turn_reads_only_what_is_new_and_writes_the_same_bits(prepared, monkeypatch):
    read, insert = [], decoding.insert

    def counting(architectures, params, state, prompts, *rest):
        read.append(int(prompts.lengths.sum()))
        return insert(architectures, params, state, prompts, *rest)

    first = prompt_of(50)
    expected_first = alone(prepared, first, PARAMS)
    monkeypatch.setattr(decoding, "insert", counting)
    engine = server(prepared)
    engine.submit(first, PARAMS)
    (events,) = finish(engine).values()
    answer = written(events)
    assert answer == expected_first and sum(read) == 50
    for number, turn in enumerate((prompt_of(9, 7), prompt_of(3, 8))):
        prompt = np.concatenate([first, answer[0], turn]).astype(np.int32)
        read.clear()
        engine.submit(prompt, PARAMS)
        (events,) = finish(engine).values()
        assert events[0].cached_tokens == 48 and sum(read) == len(prompt) - 48, number
        assert written(events) == alone(prepared, prompt, PARAMS)


def test_equal_prompts_read_the_last_chunk_again(prepared):
    engine = server(prepared)
    for expected in (0, 16):
        engine.submit(prompt_of(32), PARAMS)
        (events,) = finish(engine).values()
        assert events[0].cached_tokens == expected
        assert written(events) == alone(prepared, prompt_of(32), PARAMS)


def test_conversations_keep_their_slots(prepared):
    """A new text takes the least recently used slot, not that of a conversation that continues."""
    engine = server(prepared, slots=2)
    prompts = {name: prompt_of(40, seed) for seed, name in enumerate("abc")}
    cached = []
    for name in "ababcbca":
        engine.submit(prompts[name], PARAMS)
        (events,) = finish(engine).values()
        cached.append(events[0].cached_tokens)
    assert cached == [0, 0, 32, 32, 0, 32, 32, 0]


def test_after_an_error_nothing_is_reused(prepared, monkeypatch):
    engine = server(prepared)
    engine.submit(prompt_of(40), PARAMS)
    finish(engine)
    engine.submit(prompt_of(40), PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", lambda *_, **__: 1 / 0)
        assert [event.finish_reason for event in engine.step()] == ["error"]
    engine.submit(prompt_of(40), PARAMS)
    (events,) = finish(engine).values()
    assert events[0].cached_tokens == 0 and written(events) == alone(prepared, prompt_of(40), PARAMS)


def test_after_the_warm_up_nothing_is_compiled(random_model):
    engine = server(Model.prepare(*random_model(context_length=128, embed_dim=16, num_layers=1)), chunk=64)
    engine.warm_up()
    programs = decoding.insert._cache_size(), decoding.decode._cache_size()
    for length in (1, 16, 17, 63, 64, 65, 80, 100, 127):
        engine.submit(prompt_of(length), PARAMS, top=5)
        engine.submit(prompt_of(length), SamplingParams(temperature=0, logit_bias=((3, 1.0),)), score_prompt=True)
    finish(engine)
    assert (decoding.insert._cache_size(), decoding.decode._cache_size()) == programs
    assert engine.load == (0, 0, 3)
