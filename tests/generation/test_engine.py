"""Continuous batching equals the full forward pass, for any schedule of requests."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config as config_lib
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.engine import Busy, Engine, Model
from gptjax.generation.params import SamplingParams
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import partition

BYTES = build_tokenizer("byte")
CONTEXT = 64
MODERN = {"positions": "rope", "num_kv_heads": 2, "qk_norm": True, "ngram_order": 3, "sliding_window": 9}
VARIANTS = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "use_bias": True, "qk_norm": False},
    "alibi, post-norm": {"positions": "alibi", "norm_placement": "post", "num_kv_heads": 1},
    "gates, scalars, value embeddings": {
        "attention_gate": True,
        "residual_scalars": True,
        "value_embeddings": 2,
        "num_kv_heads": 2,
        "ngram_order": 2,
    },
    "experts": {"positions": "none", "num_experts": 4, "experts_per_token": 2, "activation": "swiglu"},
}

KINDS = (
    {"temperature": 0.0},
    {},
    {"top_k": 5, "temperature": 0.7},
    {"top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.3},
    {"min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.5},
)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request, and the number of engine steps between the one before and it."""

    delay: int
    prompt_length: int
    max_new_tokens: int
    kind: int
    seed: int

    @property
    def prompt(self) -> np.ndarray:
        return np.random.default_rng(self.seed).integers(0, 257, self.prompt_length).astype(np.int32)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, seed=self.seed, **KINDS[self.kind])


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        delay=st.integers(0, 3),
        prompt_length=st.integers(1, CONTEXT),
        max_new_tokens=st.integers(1, 20),
        kind=st.integers(0, len(KINDS) - 1),
        seed=st.integers(0, 5),
    ),
    min_size=1,
    max_size=8,
)
# Prompts of up to 16 tokens: one length to which they are padded, and few programs.
FIXED = [Arrival(i % 3, 2 * i + 1, 3 + 2 * i, i % len(KINDS), i) for i in range(7)]


@pytest.fixture(scope="module")
def modern(random_model):
    return random_model(**MODERN)


@pytest.fixture(scope="module")
def draft(random_model):
    """Another model of the same vocabulary."""
    return as_model(random_model(num_layers=1, embed_dim=16, num_heads=2, vocab_multiple=1))


def as_model(model, params=None) -> Model:
    architecture, own = model
    return Model.prepare(architecture, own if params is None else params)


def run(engine: Engine, arrivals) -> dict[int, list]:
    """Events of each request, by handle, in a schedule of arrivals."""
    events, pending = {}, list(arrivals)
    clock = 0
    due = list(np.cumsum([arrival.delay for arrival in pending]))
    while pending or engine.busy:
        while pending and due[0] <= clock:
            due.pop(0)
            arrival = pending.pop(0)
            events[engine.submit(arrival.prompt, arrival.params, index=len(events))] = []
        for event in engine.step():
            events[event.handle].append(event)
        clock += 1
    return events


def check_all(check, model, arrivals, events) -> None:
    context = model[0].context_length
    for index, (arrival, own) in enumerate(zip(arrivals, events.values(), strict=True)):
        tokens = [token for event in own for token in event.tokens]
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + ["length"]
        assert len(tokens) == min(arrival.max_new_tokens, context - arrival.prompt_length)
        scores = [score for event in own for score in event.log_probabilities]
        check(model, arrival.prompt, arrival.params, index, tokens, scores)


@settings(max_examples=12)
@given(arrivals=ARRIVALS)
def test_any_schedule_equals_the_full_forward_pass(check, modern, arrivals):
    engine = Engine(as_model(modern), BYTES, slots=3, rounds=4)
    check_all(check, modern, arrivals, run(engine, arrivals))


@settings(max_examples=8)
@given(arrivals=ARRIVALS)
def test_a_draft_changes_nothing_in_any_schedule(check, modern, draft, arrivals):
    """Greedy and sampled: both models draw with the same noise."""
    engine = Engine(as_model(modern), BYTES, slots=3, rounds=2, draft=draft, draft_tokens=3)
    check_all(check, modern, arrivals, run(engine, arrivals))


def test_a_cpu_computes_in_float32(check, random_model):
    """A bfloat16 model writes the same as a float32 model with the same parameters."""
    model = random_model(compute_dtype="bfloat16")
    check_all(check, random_model(), FIXED, run(Engine(as_model(model), BYTES, slots=3, rounds=4), FIXED))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_architecture(check, random_model, options):
    model = random_model(**options)
    check_all(check, model, FIXED, run(Engine(as_model(model), BYTES, slots=3, rounds=4), FIXED))


def test_caches_grow_while_others_decode(check, random_model):
    model = random_model(context_length=256, num_layers=1)
    engine = Engine(as_model(model), BYTES, slots=2, rounds=4)
    arrivals = [Arrival(0, 5, 40, 1, 0), Arrival(2, 90, 20, 0, 1), Arrival(1, 250, 20, 1, 2)]
    check_all(check, model, arrivals, run(engine, arrivals))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_a_mesh_gives_the_same(check, random_model, modern, sizes):
    model = random_model(num_experts=4, num_kv_heads=2) if "expert" in sizes else modern
    architecture, params = model
    options = config_lib.get_default().mesh
    options.update(sizes)
    mesh = mesh_lib.make_mesh(options)
    placed = jax.device_put(params, partition.parameter_shardings(params, mesh))
    engine = Engine(as_model(model, placed), BYTES, slots=3, rounds=4, mesh=mesh)
    check_all(check, model, FIXED, run(engine, FIXED))
    keys = engine._state.caches[0].keys[0]
    assert keys.shape[0] == 4 * architecture.num_kv_heads
    assert keys.addressable_shards[0].data.shape[0] == 1, "slots and heads are split over the mesh"


def test_a_draft_as_good_as_the_model_saves_passes(modern):
    model = as_model(modern)
    for kind in (0, 2):
        engine = Engine(model, BYTES, slots=1, draft=model, draft_tokens=3)
        run(engine, [Arrival(0, 4, 20, kind, 0)])
        assert (engine.statistics.tokens, engine.statistics.passes) == (20, 5)
        assert engine.statistics.accepted == engine.statistics.proposed == 15


def test_a_draft_must_fit(modern, random_model):
    model = as_model(modern)
    short = dataclasses.replace(as_model(random_model(context_length=32)), name="runs/short")
    with pytest.raises(UserError, match="runs/short has a context_length of 32, less than the 64 of the model"):
        Engine(model, BYTES, draft=short)
    other = dataclasses.replace(short, architecture=dataclasses.replace(short.architecture, vocab_size=99))
    with pytest.raises(UserError, match="runs/short has a vocabulary of 99 tokens and the model one of 257"):
        Engine(model, BYTES, draft=other)
    with pytest.raises(UserError, match="draft_tokens is 0"):
        Engine(model, BYTES, draft=model, draft_tokens=0)


def test_any_of_several_tokens_ends_a_text(modern):
    """Generation ends at the first of these tokens in the unconstrained text."""
    arrival = Arrival(0, 4, 30, 1, 0)
    (free,) = run(Engine(as_model(modern), BYTES, slots=1), [arrival]).values()
    tokens = list(free[0].tokens + free[1].tokens)
    ends = (tokens[9], tokens[6])
    last = min(map(tokens.index, ends))
    engine = Engine(as_model(modern), BYTES, slots=2, end_ids=ends)
    engine.submit(arrival.prompt, arrival.params)
    engine.submit(arrival.prompt, dataclasses.replace(arrival.params, ignore_eos=True))
    engine.submit(arrival.prompt, arrival.params, end_ids=())
    written, reasons = {0: [], 1: [], 2: []}, {}
    while engine.busy:
        for event in engine.step():
            written[event.handle] += event.tokens
            reasons[event.handle] = event.finish_reason
    assert written == {0: tokens[: last + 1], 1: tokens, 2: tokens}
    assert reasons == {0: "stop", 1: "length", 2: "length"}


def test_cancelled_requests_make_room(modern):
    engine = Engine(as_model(modern), BYTES, slots=1, rounds=2)
    long, waiting, last = (engine.submit([1, 2], SamplingParams(max_new_tokens=50)) for _ in range(3))
    engine.step()
    engine.cancel(long)
    engine.cancel(waiting)
    engine.cancel(12345)
    events = engine.step()
    assert [(e.handle, e.finish_reason) for e in events] == [
        (long, "cancelled"),
        (waiting, "cancelled"),
        (last, None),
    ]


def break_at(monkeypatch, name: str, call: int, error: BaseException) -> None:
    """Call number `call` of a compiled program raises, after it has taken the state's buffers."""
    program, calls = getattr(decoding, name), []

    def broken(*arguments, **options):
        result = program(*arguments, **options)
        calls.append(name)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(decoding, name, broken)


@pytest.mark.parametrize(("name", "call"), [("insert", 1), ("insert", 2), ("decode", 1), ("decode", 3)])
def test_after_an_error_the_requests_that_wait_are_served_right(check, modern, monkeypatch, name, call):
    """Prompts of different lengths are read one by one: the second may fail when the first already has its slot."""
    error = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    break_at(monkeypatch, name, call, error)
    engine = Engine(as_model(modern), BYTES, slots=2, rounds=2)
    arrivals = [Arrival(0, length, 12, 1, length) for length in (20, 5, 30, 6, 3)]
    handles = [engine.submit(arrival.prompt, arrival.params, index=i) for i, arrival in enumerate(arrivals)]
    events = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            events[event.handle].append(event)
    failed = {handle for handle in handles if events[handle][-1].finish_reason == "error"}
    assert failed == ({0} if (name, call) == ("insert", 1) else {0, 1})
    assert all(events[handle][-1].error is error for handle in failed)
    for index in set(handles) - failed:
        tokens = [token for event in events[index] for token in event.tokens]
        scores = [score for event in events[index] for score in event.log_probabilities]
        assert len(tokens) == 12 and events[index][-1].finish_reason == "length"
        check(modern, arrivals[index].prompt, arrivals[index].params, index, tokens, scores)


def test_an_interrupt_is_raised_and_the_next_step_says_what_it_ended(check, modern, monkeypatch):
    break_at(monkeypatch, "decode", 2, KeyboardInterrupt())
    engine = Engine(as_model(modern), BYTES, slots=1, rounds=2)
    first, second = Arrival(0, 4, 20, 1, 0), Arrival(0, 9, 6, 1, 1)
    for index, arrival in enumerate((first, second)):
        engine.submit(arrival.prompt, arrival.params, index=index)
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    failed, event = engine.step()
    assert (failed.handle, failed.finish_reason) == (0, "error")
    events = [event, *(event for _ in range(2) for event in engine.step())]
    tokens, scores = (sum((getattr(e, name) for e in events), ()) for name in ("tokens", "log_probabilities"))
    check(modern, second.prompt, second.params, 1, tokens, scores)


def test_a_full_queue_says_so(modern):
    engine = Engine(as_model(modern), BYTES, slots=1, max_waiting=2)
    for _ in range(2):
        engine.submit([1], SamplingParams(max_new_tokens=1))
    with pytest.raises(Busy, match="2 requests are waiting"):
        engine.submit([1], SamplingParams())
    engine.step()
    engine.submit([1], SamplingParams())


def test_threads_submit_while_one_steps(check, modern):
    engine = Engine(as_model(modern), BYTES, slots=4, rounds=4)
    assert not engine.wait(timeout=0)
    arrivals = [Arrival(0, i + 1, 10, i % 3, i) for i in range(6)]
    indices = {}

    def submit(arrival):
        index = arrivals.index(arrival)
        indices[engine.submit(arrival.prompt, arrival.params, index=index)] = index

    threads = [threading.Thread(target=submit, args=[arrival]) for arrival in arrivals]
    for thread in threads:
        thread.start()
    texts, finished = {}, 0
    while finished < len(arrivals):
        assert engine.wait(timeout=60)
        for event in engine.step():
            texts.setdefault(event.handle, []).append(event)
            finished += event.finish_reason is not None
    for thread in threads:
        thread.join()
    ordered = {index: texts[handle] for handle, index in indices.items()}
    check_all(check, modern, arrivals, dict(sorted(ordered.items())))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ([1] * 65, "65 tokens.*context_length 64"), ([257], "outside 0 to 256")],
)
def test_prompts_that_cannot_be_continued(modern, prompt, message):
    with pytest.raises(UserError, match=message):
        Engine(as_model(modern), BYTES, slots=1).submit(prompt, SamplingParams())


def test_an_engine_of_fixed_capacity_refuses_more(modern):
    engine = Engine(as_model(modern), BYTES, slots=1, capacity=20)
    with pytest.raises(UserError, match="21 tokens, more than the 20 of this engine"):
        engine.submit([1] * 21, SamplingParams())
    arrivals = [Arrival(0, 15, 50, 1, 0)]
    (events,) = run(engine, arrivals).values()
    assert sum(len(event.tokens) for event in events) == 5
