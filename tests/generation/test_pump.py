"""The thread that drives an engine: no error of a request or of the engine ends it."""

import asyncio
import threading
import time

import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.engine import Busy, Engine, Model
from gptjax.generation.params import SamplingParams
from gptjax.generation.pump import Closed, Pump

BYTES = build_tokenizer("byte")
PROMPT = np.arange(7, dtype=np.int32)
SHORT = SamplingParams(max_new_tokens=9, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=50, ignore_eos=True)


@pytest.fixture(scope="module")
def prepared(random_model):
    return Model.prepare(*random_model())


@pytest.fixture
def pump(prepared):
    pump = Pump(Engine(prepared, BYTES, slots=2, rounds=2, capacity=64, max_waiting=40))
    yield pump
    pump.close()


def tokens_of(stream) -> list[int]:
    return [token for event in stream for token in event.tokens]


def test_threads_and_tasks_read_their_own_events(pump):
    expected = [tokens_of(pump.submit(PROMPT, SHORT, index=i)) for i in range(6)]
    assert len({tuple(tokens) for tokens in expected}) == 6

    async def one(i):
        stream = pump.submit(PROMPT, SHORT, index=i)
        return [token async for event in stream for token in event.tokens], stream

    async def many():
        return await asyncio.gather(*map(one, range(6)))

    for (tokens, stream), own in zip(asyncio.run(many()), expected, strict=True):
        assert tokens == own
        assert (stream.prompt_tokens, stream.completion_tokens, stream.ended) == (7, 9, True)
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: tokens_of(pump.submit(PROMPT, SHORT, index=i))}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(6)] == expected


def test_a_hundred_cancelled_requests_lose_no_slot(pump):
    expected = tokens_of(pump.submit(PROMPT, SHORT))
    for number in range(100):
        stream = pump.submit(PROMPT, LONG)
        if number % 2:
            next(iter(stream))
        stream.cancel()
        stream.cancel()
        if number % 10 == 0:
            assert list(stream)[-1].finish_reason == "cancelled"
            stream.cancel()
    assert tokens_of(pump.submit(PROMPT, SHORT)) == expected
    assert pump.engine.load == (0, 0, 2)


def test_a_deadline_ends_a_request(pump):
    blocked = [pump.submit(PROMPT, LONG) for _ in range(20)]
    late = pump.submit(PROMPT, LONG, seconds=0.0)
    assert list(late)[-1].finish_reason == "cancelled" and late.expired
    assert [list(stream)[-1].finish_reason for stream in blocked] == ["length"] * 20
    assert not any(stream.expired for stream in blocked)


@pytest.mark.parametrize("name", ["insert", "decode"])
@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), SystemExit()], ids=["error", "exit"])
def test_an_error_of_the_engine_ends_requests_but_not_the_thread(pump, monkeypatch, name, error):
    expected = tokens_of(pump.submit(PROMPT, SHORT))
    with monkeypatch.context() as patch:
        program = getattr(decoding, name)

        def half_way(*arguments, **options):
            program(*arguments, **options)  # takes the buffers of the state
            raise error

        patch.setattr(decoding, name, half_way)
        (event,) = pump.submit(PROMPT, SHORT)
        assert event.finish_reason == "error" and event.error is error
    assert pump.alive
    assert tokens_of(pump.submit(PROMPT, SHORT)) == expected


def test_an_error_outside_of_the_engines_care_ends_requests_but_not_the_thread(pump, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_leave", lambda self: 1 / 0)
        patch.setattr(Engine, "_fail", lambda self, error: 1 / 0)
        assert list(pump.submit(PROMPT, SHORT))[-1].finish_reason == "error"
    while pump.engine.busy:  # what the engine still has of it
        time.sleep(0.01)
    assert len(tokens_of(pump.submit(PROMPT, SHORT))) == 9


def test_what_is_refused_is_raised_where_it_is_submitted(prepared, pump):
    with pytest.raises(UserError, match="the prompt is empty"):
        pump.submit([], SHORT)
    full = Pump(Engine(prepared, BYTES, slots=1, max_waiting=0))
    with pytest.raises(Busy):
        full.submit(PROMPT, SHORT)
    full.close()
    with pytest.raises(Closed):
        full.submit(PROMPT, SHORT)


def test_closing_finishes_what_is_there_within_its_time(prepared):
    pump = Pump(Engine(prepared, BYTES, slots=1, rounds=2, capacity=64))
    streams = [pump.submit(PROMPT, SHORT) for _ in range(3)]
    pump.close(seconds=60)
    assert [list(stream)[-1].finish_reason for stream in streams] == ["length"] * 3
    assert not pump.alive
    pump = Pump(Engine(prepared, BYTES, slots=1, rounds=1, capacity=64))
    streams = [pump.submit(PROMPT, LONG) for _ in range(30)]
    pump.close(seconds=0)
    assert {list(stream)[-1].finish_reason for stream in streams} <= {"cancelled", "length"}
