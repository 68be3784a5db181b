"""Rewards: built-in ones, sums, and functions of users that raise, hang, die or return no number."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import RunError, UserError
from gptjax.rewards.processes import Item
from gptjax.rewards.rewards import Reward, parse

FUNCTIONS = """
import math, os, sys, time
print("imported")

def length(prompt, completion, reference):
    print("called", prompt, file=sys.stdout)
    return len(completion)

def mixed(prompt, completion, reference):
    if completion == "raise":
        raise ValueError("no such answer")
    if completion == "hang":
        time.sleep(1000)
    if completion == "spin":
        while True:
            pass
    if completion == "die":
        os._exit(3)
    if completion == "read":
        return len(sys.stdin.read()) + 1
    return {"nan": math.nan, "text": "1.0", "none": None, "infinite": math.inf, "true": True}.get(completion, 0.5)
"""


@pytest.fixture
def functions(tmp_path) -> Path:
    path = tmp_path / "of user.py"
    path.write_text(FUNCTIONS)
    return path


def reward(text: str, **options) -> Reward:
    config = config_lib.get_default()
    config.objective.update(reward=text, **options)
    return Reward(config, build_tokenizer("byte"))


def values(text: str, completions: list[str], reference: str = "2", **options) -> list[float]:
    function = reward(text, **options)
    scores = function([Item("p", c, reference) for c in completions], [f"q:{i}" for i in range(len(completions))])
    function.close()
    return scores.values.tolist()


def test_built_in_rewards():
    assert values("exact_match", [" 2\n", "2.", "22"]) == [1, 0, 0]
    assert values("number", ["so #### 1,002", "#### 1002.", "1002"], "... #### 1002") == [1, 1, 0]
    assert values("number", ["#### 7"], "7") == [1]
    assert values("format", ["a\nb #### 3", "#### x"]) == [1, 0]
    assert values("format", ["<a>x</a>", "<a>x</a>!"], reward_pattern="<a>.*</a>") == [1, 0]
    assert values("length", ["a" * n for n in (4, 5, 7, 10, 50)], reward_length=5) == [0, 0, -0.4, -1, -1]
    assert values("expression", ["1+1", "3 - 1", "3", "__import__('os')"]) == [1, 1, 0, 0]


def test_sums_have_weights():
    assert parse("exact_match + 0.2*format - .5*length") == [(1, "exact_match"), (0.2, "format"), (-0.5, "length")]
    assert parse("-1e-3*length") == [(-0.001, "length")]
    assert parse("my-dir/a+b.py:f + 2*exact_match") == [(1, "my-dir/a+b.py:f"), (2, "exact_match")]
    assert values("exact_match + 0.25*format", ["2", "3"], reward_pattern="[0-9]") == [1.25, 0.25]


@pytest.mark.parametrize("text", ["", "exact", "exact_match +", "2*", "exact_match + 0.2 format", "a.txt:f", "x.py:1a"])
def test_what_is_no_reward_is_refused(text):
    with pytest.raises(UserError, match="is not a reward; choose from exact_match, number"):
        parse(text)


def test_a_pattern_that_is_none_or_takes_for_ever():
    with pytest.raises(UserError, match="not a regular expression"):
        reward("format", reward_pattern="(")
    (value,) = values("format", ["a" * 60 + "b"], reward_pattern="(a|aa)+", reward_seconds=0.05, reward_errors="skip")
    assert value == 0 or math.isnan(value)


def test_a_reference_without_an_answer_is_named():
    with pytest.raises(RunError, match=r'number found no "#### NUMBER" in the reference \'x\' for the question q:0'):
        values("number", ["#### 1"], "x")


def test_a_function_of_the_user(functions, capfd):
    assert values(f"{functions}:length + exact_match", ["2", "abc"]) == [2, 3]
    assert "called p" in capfd.readouterr().err, "what it prints is not lost"
    many = [str(i) for i in range(100)]
    assert values(f"{functions}:length", many, reward_workers=3) == [len(text) for text in many]


def test_what_goes_wrong_is_counted_and_the_rest_is_rewarded(functions):
    function = reward(f"{functions}:mixed", reward_seconds=0.5, reward_errors="skip")
    bad = ["raise", "hang", "spin", "die", "nan", "text", "none", "infinite"]
    completions = ["fine", *bad, "true", "read", "fine"]
    began = time.monotonic()
    scores = function([Item("p", c, "r") for c in completions], [f"q:{i}" for i in range(len(completions))])
    assert time.monotonic() - began < 60
    function.close()
    np.testing.assert_array_equal(np.isnan(scores.values), [c in bad for c in completions])
    assert scores.values[[0, 9, 10, 11]].tolist() == [0.5, 1, 1, 0.5]
    told = {completions[failure.place]: failure.what for failure in scores.failures}
    assert "raised ValueError: no such answer for the question q:1" in told["raise"]
    assert "took more than 0.5 s" in told["hang"] and "took more than 0.5 s" in told["spin"]
    assert "ended (exit status 3)" in told["die"]
    assert "returned nan" in told["nan"] and "returned inf" in told["infinite"]
    assert "returned '1.0', not a number" in told["text"] and "returned None" in told["none"]


def test_it_ends_the_run_where_it_is_not_skipped(functions):
    function = reward(f"{functions}:mixed")
    with pytest.raises(RunError, match=r"mixed raised ValueError: no such answer for the question q:7; .*=skip"):
        function([Item("p", "raise", "r")], ["q:7"])
    function.close()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "f", "is not a file"),
        ("def g(): pass", "f", "has no function 'f'"),
        ("import no_such_module_at_all", "f", "ModuleNotFoundError"),
        ("def f(:", "f", "SyntaxError"),
        ("import sys; sys.exit(4)", "f", "SystemExit: 4"),
        ("import os; os._exit(4)", "f", "cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_loaded(tmp_path, content, name, message):
    path = tmp_path / "reward.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        reward(f"{path}:{name}")


def test_no_process_is_left(functions):
    function = reward(f"{functions}:mixed", reward_seconds=0.2, reward_errors="skip")
    function([Item("p", c, "r") for c in ("fine", "hang", "fine")], ["a", "b", "c"])
    processes = [p._process.pid for user in function._users for p in user._processes if p]
    function.close()
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
