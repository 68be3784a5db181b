"""A small part of tools/bad_inputs.py: nonsense values are refused in plain words."""

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptjax import cli, train
from gptjax.config import flat_options, get_default, validate
from gptjax.config.validation import option_problem
from gptjax.errors import UserError

TOOL = Path(__file__).parent.parent / "tools" / "bad_inputs.py"
# Verbs of which all cases are known to pass, and how many are tried.
NUMBERS = {"train": 60, "plan": 240, "serve": 60}


@pytest.fixture(scope="module")
def bad_inputs():
    spec = importlib.util.spec_from_file_location("bad_inputs", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("verb", NUMBERS)
def test_nonsense_is_refused_in_plain_words(bad_inputs, verb, tmp_path):
    with contextlib.chdir(tmp_path):
        bad_inputs.write_inputs(Path())
        failures = list(bad_inputs.run(bad_inputs.cases(0, NUMBERS[verb], verbs=[verb])))
    assert not failures, "\n".join(f"{f.reason[-300:]}\n{f.case.argv}"[:1000] for _, f in failures)


def test_every_flag_and_every_option_gets_bad_values(bad_inputs):
    cases = list(bad_inputs.cases(0, 5000))
    assert {case.verb for case in cases} == set(bad_inputs.cli.VERBS)
    text = "\n".join(argument for case in cases for argument in case.argv[1:])
    for verb in bad_inputs.cli.VERBS:
        for name in bad_inputs.flags_of(verb):
            assert f"-{name}" in text or (verb, name) in bad_inputs.LEFT_OUT, name
    for path in bad_inputs.config_lib.flat_options():
        assert f"config.{path}" in text, path


def changed(changes):
    config = get_default()
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize("path", flat_options())
def test_any_value_of_an_option_is_valid_or_refused_in_plain_words(path, bad_inputs):
    option = flat_options()[path]
    odd = [None, True, [], {}, object(), 1.5, -1, 2**64, 10**5000, float("nan"), float("inf"), 1j, b"", np.zeros(3)]
    for value in [*bad_inputs.VALUES, *odd]:
        message = option_problem(path, option, value) or path
        assert not bad_inputs.FOREIGN.search(message), message
        assert path in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train.num_steps": "1.5"}, "train.num_steps is '1.5', not a duration"),
        ({"optimizer.learning_rate": 1e-300}, "optimizer.learning_rate is 1e-300, too near to 0"),
        ({"model.logit_softcap": "1e-40"}, "model.logit_softcap is '1e-40', too near to 0"),
        ({"model.sliding_window": 512}, "model.sliding_window 512 is larger than model.context_length 256"),
        ({"model.lora_dropout": 0.1}, "there are no adapters"),
        (
            {"model.positions": "none", "model.rope_scaling": "linear"},
            "needs model.positions rope; model.positions is none",
        ),
        ({"schedule.name": "cosine_restarts", "train.num_steps": 3}, "schedule.cycles 4 is more than train.num_steps"),
        (
            {"schedule.name": "wsd", "schedule.warmup": "80%", "schedule.decay": "80%", "train.num_steps": "1 epoch"},
            "together longer than the run",
        ),
        ({"model": 5}, "the config has 1 problem: model is 5; it is a section of options"),
        ({"data.source": "\udc80"}, "a text must be UTF-8"),
    ],
)
def test_nonsense_between_options_is_refused_at_the_start(changes, problem):
    with pytest.raises(UserError) as caught:
        validate(changed(changes))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule.name": "wsd", "schedule.warmup": "50%", "schedule.decay": "50%", "train.num_steps": 3},
        {"train.num_steps": "1 epoch", "schedule.warmup": 10**6},
        {"optimizer.learning_rate": 0},
        {"model.sliding_window": 512, "init_from": "hf:somewhere"},
    ],
)
def test_what_looks_odd_and_is_meant(changes):
    validate(changed(changes))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys\nsys.exit()", "calls sys.exit()"),
        ("def get_config():\n    raise SystemExit(0)", "calls sys.exit()"),
        ("def get_config(a, b):\n    return get_default()", "its get_config must take no argument or one"),
        ("def get_config(*, a):\n    return get_default()", "its get_config must take no argument or one"),
        ("def get_config():\n    c = get_default()\n    c[5] = 1\n    return c", "the name of an option is not text"),
        (
            "def get_config():\n    c = get_default()\n    c.seed = object()\n    return c",
            "seed is a value of another kind",
        ),
        ("def get_config():\n    c = get_default()\n    c.model = 5\n    return c", "model is 5; it is a section"),
        ("def get_config():\n    return get_config()", "failed at line 3: RecursionError"),
    ],
)
def test_a_config_file_that_makes_no_config(body, message, tmp_path, capsys):
    path = tmp_path / "odd.py"
    path.write_text(f"from gptjax.config import get_default\n{body}\n", "utf-8")
    assert cli.run(train.main, ["train", f"--config={path}", "--workdir=x"]) == 2
    assert message in capsys.readouterr().err


def test_control_characters_of_a_value_do_not_reach_the_terminal(capsys):
    assert cli.run(train.main, ["train", "--config=\x1b[31m\x07", "--workdir=x"]) == 2
    assert "\x1b" not in (message := capsys.readouterr().err) and "\\x1b[31m" in message


def test_a_traceback_is_a_failure(bad_inputs, monkeypatch):
    def main(argv):
        raise ValueError("invalid literal for int()")

    monkeypatch.setattr(bad_inputs, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(main=main)))
    found = bad_inputs.failure(bad_inputs.Case("train", ["train"]))
    assert found is not None and "Traceback" in found.said
