"""A small part of what tools/bad_inputs.py tries: nonsense is refused in plain words."""

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "bad_inputs.py"
# Verbs of which all cases are known to pass, and how many are tried.
NUMBERS = {"train": 60, "plan": 240}


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


def test_a_traceback_is_a_failure(bad_inputs, monkeypatch):
    def main(argv):
        raise ValueError("invalid literal for int()")

    monkeypatch.setattr(bad_inputs.importlib, "import_module", lambda name: SimpleNamespace(main=main))
    found = bad_inputs.failure(bad_inputs.Case("train", ["train"]))
    assert found is not None and "Traceback" in found.said
