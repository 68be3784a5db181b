import json

import numpy as np
import pytest
from scipy import stats

from gptjax.config import get_default
from gptjax.reporting import bands

DATA = {"source_fingerprint": "abc"}


def config(**changes) -> dict:
    options = get_default()
    options.data.source = "text:*.txt"
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            options[section][name] = value
        else:
            options[section] = value
    return options.to_dict()


@pytest.mark.parametrize(
    "changes",
    [{"seed": 3}, {"data__source": "text:/elsewhere/*.txt"}, {"mesh__fsdp": 2}, {"model__remat": "full"},
     {"logging__every": 7}, {"train__accumulation": 2}],
)  # fmt: skip
def test_what_does_not_decide_about_the_loss_keeps_the_identity(changes):
    assert bands.identity(config(**changes), DATA) == bands.identity(config(), DATA)


@pytest.mark.parametrize(
    "changes",
    [{"model__num_layers": 5}, {"optimizer__learning_rate": 0.1}, {"tokenizer": "char"}, {"data__cleaning": "web"}],
)
def test_what_decides_changes_it(changes):
    assert bands.identity(config(**changes), DATA) != bands.identity(config(), DATA)


def test_the_text_is_part_of_it_except_pythons_own_documentation():
    assert bands.identity(config(), DATA) != bands.identity(config(), {"source_fingerprint": "other"})
    docs = config(data__source="python_docs")
    assert bands.identity(docs, DATA) == bands.identity(docs, {"source_fingerprint": "other"})


def test_an_option_that_came_later_changes_nothing():
    older = config()
    del older["model"]["sliding_window"]
    assert bands.identity(older, DATA) == bands.identity(config(), DATA)


def test_the_interval_is_that_of_student():
    """Of three values 1, 2, 3: mean 2, s 1, t(2) = 4.3027."""
    runs = [[(10, value), (20, value)] for value in (1.0, 2.0, 3.0)]
    band = bands.fit(runs)
    margin = 4.3027 * np.sqrt(4 / 3)
    np.testing.assert_allclose(band["high"], 2 + margin, rtol=1e-4)
    np.testing.assert_allclose(band["low"], 2 - margin, rtol=1e-4)
    assert stats.t.ppf(0.975, 2) == pytest.approx(4.3027, rel=1e-4)


def test_it_covers_a_new_run_as_often_as_it_says():
    random, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        *seen, new = random.normal(size=(4, 1))
        band = bands.fit([[(0, float(x[0]))] for x in seen])
        inside += band["low"][0] <= new[0] <= band["high"][0]
    assert 930 < inside < 970


def test_runs_at_different_steps_are_refused():
    with pytest.raises(ValueError, match="same steps"):
        bands.fit([[(10, 1.0)], [(20, 1.0)]])


BAND = bands.Band("quickstart", "seeds 0-2", (10, 20), (2.0, 1.0), (3.0, 2.0))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(10, 2.5), (20, 1.5)], "at 2 of 2 evaluations; at step 20 the loss is normal"),
        ([(15, 2.0), (20, 2.25)], "at 1 of 2 evaluations; at step 20 it is 0.2500 nats above: not normal"),
        ([(20, 0.75)], "0.2500 nats below: better than expected"),
        ([(30, 1.0)], ""),
    ],
)
def test_verdict(points, words):
    assert words in BAND.verdict(points)
    assert bool(BAND.verdict(points)) == bool(words)


def test_the_bands_that_are_shipped_can_be_read():
    for path in bands.DIRECTORY.glob("*.json"):
        entry = json.loads(path.read_text())
        assert len(entry["steps"]) == len(entry["low"]) == len(entry["high"]), path
        assert all(np.array(entry["low"]) < np.array(entry["high"]))


def test_a_band_is_found_by_config_and_data(tmp_path, monkeypatch):
    monkeypatch.setattr(bands, "DIRECTORY", tmp_path)
    entry = {"identity": bands.identity(config(), DATA), "about": "seeds 0-2", "steps": [1], "low": [0], "high": [1]}
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    assert bands.find(config(seed=5), DATA).name == "mine"
    assert bands.find(config(tokenizer="char"), DATA) is None
