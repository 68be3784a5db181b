"""A better checkpoint replaces the served one while requests are running."""

import json
import threading

import jax
import numpy as np
import pytest

from gptjax.generation import decoding
from gptjax.generation.params import SamplingParams
from gptjax.server import models as models_lib
from gptjax.server.reloading import Reloader
from gptjax.server.served import EngineOptions

OPTIONS = EngineOptions(slots=2, chunk=16, rounds=2, max_waiting=16)
ASK = {"prompt": "what was read before is not read again", "max_tokens": 24, "seed": 1, "ignore_eos": True}


@pytest.fixture
def run(tmp_path, make_trained, save_run):
    save_run(tmp_path / "run", 1, make_trained(seed=1), loss=2.0)
    return tmp_path / "run"


@pytest.fixture
def served(run):
    models = models_lib.load([f"run={run}"], OPTIONS, reload=True)
    for model in models:
        model.start(warm_up=False)
    yield models
    for model in models:
        model.close(0)


def test_a_stream_over_the_swap_ends_with_the_parameters_that_it_began_with(run, served, live, make_trained, save_run):
    import httpx2

    model, reloader = served.find("run"), Reloader(served, every=1e9, patience=60)
    before, may_step = model.engine, threading.Event()
    may_step.set()
    step = before.step
    before.step = lambda: (may_step.wait(), step())[1]  # so that the swap comes while the text is written

    with httpx2.Client(base_url=live(served), timeout=60, trust_env=False) as http:

        def ask() -> dict:
            return http.post("/v1/completions", json=ASK).raise_for_status().json()

        old = ask()
        assert ask()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        programs = [program._cache_size() for program in (decoding.insert, decoding.decode, decoding.new_state)]
        with http.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            texts = [json.loads(next(lines)[6:])["choices"][0]["text"]]
            may_step.clear()
            save_run(run, 2, make_trained(seed=2), loss=1.0)
            looking = threading.Thread(target=reloader.look)
            looking.start()
            while model.engine is before:
                assert looking.is_alive()
                looking.join(timeout=0.01)
            new = ask()
            assert looking.is_alive() and model.load[1] == 1
            may_step.set()
            texts += [json.loads(line[6:])["choices"][0]["text"] for line in lines]
        looking.join()
    assert "".join(texts) == old["choices"][0]["text"] != new["choices"][0]["text"]
    assert new["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [program._cache_size() for program in (decoding.insert, decoding.decode, decoding.new_state)] == programs
    assert model.load == (0, 0, 2) and model.path == run / "checkpoints" / "2"
    (again,) = models_lib.load([f"run={run}"], OPTIONS)
    again.start(warm_up=False)
    params = SamplingParams(max_new_tokens=24, seed=1, ignore_eos=True)
    with again.pumping() as pump:
        stream = pump.submit(again.encode(ASK["prompt"]), params)
    assert "".join(event.text for event in stream) == new["choices"][0]["text"]
    again.close(0)


def test_what_is_no_better_or_of_another_model_or_damaged_changes_nothing(run, served, make_trained, save_run, caplog):
    model, reloader = served.find("run"), Reloader(served, every=1e9, patience=60)
    assert reloader.look() == []
    save_run(run, 2, make_trained(seed=2), loss=3.0)
    assert reloader.look() == []
    save_run(run, 3, make_trained(seed=2, mlp_dim=32), loss=1.0)
    assert reloader.look() == [] and "belongs to another model" in caplog.text
    save_run(run, 4, make_trained(seed=2), loss=0.5)
    for path in (run / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert reloader.look() == [] and model.path == run / "checkpoints" / "1"
    save_run(run, 5, make_trained(seed=2), loss=0.4)
    assert reloader.look() == ["run"] and model.path == run / "checkpoints" / "5"
    assert np.isfinite(model.embed(np.arange(4))).all() and model.pump.alive


def test_a_run_in_a_bucket_is_followed_and_a_bucket_that_does_not_answer_changes_nothing(
    store, run, make_trained, save_run, caplog
):
    from gptjax.buckets import Bucket

    def put() -> None:
        bucket.put([path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()], run)

    bucket = Bucket("gs://gptjax-test/followed")
    put()
    (served,) = (models := models_lib.load([f"run={bucket.url}"], OPTIONS, reload=True))
    reloader = Reloader(models, every=1e9, patience=0)
    assert reloader.look() == []
    save_run(run, 2, make_trained(seed=2), loss=1.0)
    put()
    store.status = 403
    assert reloader.look() == []
    assert (
        "run: could not look for a better checkpoint: gs://gptjax-test/followed: there is no permission" in caplog.text
    )
    store.status = 0
    assert reloader.look() == ["run"]
    assert served.path.name == "2"
    (again,) = models_lib.load([f"run={run}"], OPTIONS)
    for one, other in zip(jax.tree.leaves(served.model.params), jax.tree.leaves(again.model.params), strict=True):
        np.testing.assert_array_equal(one, other)
