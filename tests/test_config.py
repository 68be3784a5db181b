import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import FieldReference

from gptjax import config as config_lib
from gptjax.config import (
    apply_arg,
    flat_options,
    from_json,
    get_default,
    resolve_duration,
    to_json,
    validate,
)
from gptjax.config.__main__ import main as options_main
from gptjax.config.durations import duration_problem
from gptjax.config.options import AFFECTS
from gptjax.config.validation import problems
from gptjax.errors import UserError

CONFIG_FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def load_config(path: Path, arg: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def problems_of(config) -> list[str]:
    found = problems(config)
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert message.startswith(f"the config has {len(found)} problem{'s' * (len(found) != 1)}: {found[0]}")
    assert "\n" not in message and len(message) < 2000
    return found


def test_every_option_is_documented_in_words():
    for path, option in flat_options().items():
        assert len(option.help) >= 5, f"{path} has no help"


def test_the_names_that_others_rely_on_exist():
    contract = {
        "data": ["source", "data_dir"],
        "model": ["num_layers", "num_heads", "embed_dim", "context_length"],
        "optimizer": ["name", "learning_rate", "weight_decay"],
        "schedule": ["name", "warmup"],
        "train": ["num_steps", "batch_size", "accumulation", "checkpoint_every"],
        "evaluation": ["every"],
        "mesh": ["data", "fsdp", "expert", "context", "tensor"],
    }
    names = {f"{section}.{name}" for section, names in contract.items() for name in names}
    assert names | {"init_from", "seed", "tokenizer"} <= set(flat_options())


def test_the_table_is_printed_with_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert options_main() == 0
    printed = capsys.readouterr().out
    for path, option in flat_options().items():
        assert path in printed
        assert all(choice in printed for choice in option.choices)


def test_every_option_begins_a_line_of_its_own_where_the_table_goes_to_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert options_main() == 0
    first_cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell for cell in first_cells if cell] == list(flat_options())


def test_the_defaults_are_valid_and_those_of_the_table():
    config = get_default()
    validate(config)
    flat = {k: v for k, v in config.to_dict().items() if not isinstance(v, dict)}
    flat |= {f"{s}.{k}": v for s, d in config.to_dict().items() if isinstance(d, dict) for k, v in d.items()}
    assert flat == {path: option.default for path, option in flat_options().items()}


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_config_file_and_its_small_form_are_valid(path):
    full, small = load_config(path), load_config(path, "runlocal")
    validate(full)
    validate(small)
    assert full.keys() == small.keys()
    assert small.train.num_steps <= 20 and small.model.embed_dim <= 32
    assert f"--config=configs/{path.name}" in path.read_text("utf-8"), "the docstring states the command"


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_another_argument_is_refused(path):
    with pytest.raises(UserError, match=r"'runlokal'.*'runlocal'"):
        load_config(path, "runlokal")


def test_runlocal_does_not_lengthen_a_short_context():
    config = get_default()
    config.model.context_length = 8
    assert apply_arg(config, "runlocal").model.context_length == 8


def test_all_problems_are_told_at_once():
    config = get_default()
    config.model.update(norm="layernrom", dropout=1.5, embed_dim=130, num_kv_heads=3, context_length=255)
    config.model.update(rope_scaling="llama3", rope_low_freq_factor=4.0, use_bias=True, qkv_bias=True)
    config.optimizer.learning_rate = -1.0
    config.schedule.warmup = "soon"
    config.train.update(batch_size=30, accumulation=4)
    config.mesh.update(tensor=3, context=2)
    config.evaluation.stride = 512
    config.optimizer.momentum = 0.9
    config.modle = "gpt2"
    found = problems_of(config)
    expected = [
        "model.norm is 'layernrom'; choose from rmsnorm, layernorm; did you mean layernorm?",
        "model.dropout is 1.5; it must be at most 0.99",
        "optimizer.learning_rate is -1.0; it must be at least 0",
        "schedule.warmup is 'soon', not a duration; use steps (500), '2%', '1 epoch' or '10M tokens'",
        "model.embed_dim 130 is not divisible by model.num_heads 4",
        "model.num_heads 4 is not divisible by model.num_kv_heads 3",
        "model.rope_low_freq_factor 4.0 is not less than model.rope_high_freq_factor 4.0",
        "model.qkv_bias is True together with model.use_bias, which includes those biases; set only one of them",
        "train.batch_size 30 is not divisible by train.accumulation 4",
        "model.context_length 255 is not divisible by mesh.context 2",
        "model.num_heads 4 is not divisible by mesh.tensor 3",
        "evaluation.stride 512 is larger than model.context_length 255",
        "optimizer.momentum is not an option",
        "modle is not an option",
    ]
    for text in expected:
        assert sum(problem.startswith(text) for problem in found) == 1, f"{text!r} is not once in {found}"


@pytest.mark.parametrize(
    ("section", "changes", "problem"),
    [
        ("model", {"num_heads": 0}, "model.num_heads is 0; it must be at least 1"),
        ("model", {"embed_dim": 12}, "the head dimension is 3; rotary positions need an even one"),
        ("mesh", {"data": 0}, "mesh.data is 0; it must be a number of devices or -1"),
        ("mesh", {"data": -2}, "mesh.data is -2; it must be a number of devices or -1"),
        ("mesh", {"data": 5}, "a micro-batch of 32 rows .* not divisible by mesh.data x mesh.fsdp x mesh.expert = 5"),
        ("mesh", {"expert": 2}, r"mesh.expert is 2, and a model without experts .* use mesh.data or mesh.fsdp"),
        ("train", {"num_steps": -5}, "train.num_steps is -5; a duration is not negative"),
        ("train", {"num_steps": "50%"}, "train.num_steps is '50%', a share of itself"),
        (
            "optimizer",
            {"learning_rate": float("nan")},
            "optimizer.learning_rate is nan; it must be a finite number",
        ),
        (
            "data",
            {"validation_fraction": 0.6, "test_fraction": 0.4},
            "data.validation_fraction .* leave nothing",
        ),
    ],
)
def test_one_problem(section, changes, problem):
    config = get_default()
    config[section].update(changes)
    (found,) = problems_of(config)
    assert re.match(problem, found), found


@pytest.mark.parametrize(
    ("mesh", "problem"),
    [
        ({"expert": 4}, r"model.num_experts 6 is not divisible by mesh.expert x mesh.tensor = 4"),
        ({"expert": 3, "tensor": 4}, r"model.num_experts 6 is not divisible by mesh.expert x mesh.tensor = 12"),
        ({"expert": 6}, r"a micro-batch of 32 rows .* by mesh.data x mesh.fsdp x mesh.expert = 6"),
    ],
)
def test_experts_that_do_not_divide(mesh, problem):
    config = get_default()
    config.model.num_experts = 6
    config.train.batch_size = 32 if "rows" in problem else 36
    config.mesh.update(mesh)
    (found,) = problems_of(config)
    assert re.match(problem, found), found


def test_a_missing_option_is_told_with_its_default():
    config = get_default()
    del config.model.qk_norm
    assert problems_of(config) == ["model.qk_norm is missing; the default is True"]


def test_a_locked_config_refuses_unknown_names():
    config = get_default().lock()
    with pytest.raises(AttributeError, match=r"num_layer\b"):
        config.model.num_layer = 3
    with pytest.raises(KeyError):
        config.model.update(num_layer=3)


WRITTEN = [
    ("train.batch_size", "8", 8),
    ("train.batch_size", "8.0", 8),
    ("train.batch_size", 8.0, 8),
    ("train.batch_size", " 1e1 ", 10),
    ("train.batch_size", "1_000", 1000),
    ("train.batch_size", "１６", 16),
    ("train.batch_size", np.int64(8), 8),
    ("train.batch_size", np.float32(8), 8),
    ("train.batch_size", np.array(8), 8),
    ("train.batch_size", "+1.6e1", 16),
    ("seed", "0xff", 255),
    ("train.num_steps", "1e3", 1000),
    ("schedule.warmup", "1e3 steps", "1e3 steps"),
    ("train.num_steps", 2e3, 2000),
    ("train.num_steps", np.int32(7), 7),
    ("train.num_steps", "10M tokens", "10M tokens"),
    ("model.dropout", ".5", 0.5),
    ("model.dropout", 0, 0.0),
    ("model.dropout", np.float32(0.5), 0.5),
    ("optimizer.learning_rate", "1e-3", 1e-3),
    ("model.qk_norm", "No", False),
    ("model.qk_norm", "TRUE", True),
    ("model.qk_norm", 0, False),
    ("model.qk_norm", np.bool_(True), True),
    ("init_from", Path("a/b"), "a/b"),
]


@pytest.mark.parametrize(("path", "given", "value"), WRITTEN)
def test_a_value_is_read_however_it_is_written(path, given, value):
    config = get_default()
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = given
    validate(config)
    put = dict(config_lib.flat_values(config))[path]
    assert (put, type(put)) == (value, type(value))
    json.loads(to_json(config))


@pytest.mark.parametrize(
    ("path", "given", "words"),
    [
        ("train.batch_size", "many", "is 'many'; it must be a whole number"),
        ("train.batch_size", "", "is ''; it must be a whole number"),
        ("train.batch_size", 8.5, "is 8.5; it must be a whole number"),
        ("train.batch_size", True, "is True; it must be a whole number"),
        ("train.batch_size", [8], "is [8]; it must be a whole number"),
        ("train.batch_size", "1,000", "is '1,000', which can be read in two ways; for 1000 write 1000"),
        ("train.batch_size", "1.000", "is '1.000', which can be read in two ways; for 1000 write 1000"),
        ("train.batch_size", "4K", "is '4K'; write the number out, since K can mean 1000 or 1024"),
        ("train.batch_size", float("nan"), "is nan; it must be a whole number"),
        ("train.batch_size", "1e9999", "it must be at most 1048576"),
        pytest.param("train.batch_size", 10**5000, "it must be at most 1048576", id="digits"),
        ("train.batch_size", 2147483648, "is 2147483648; it must be at most 1048576"),
        ("train.num_steps", "1e400", "it must be at most 10000000 steps"),
        ("train.num_steps", 10**12, "it must be at most 10000000 steps"),
        ("train.num_steps", 0, "is 0; it must be more than 0"),
        ("train.checkpoint_every", "0%", "is '0%'; it must be more than 0"),
        ("train.checkpoint_every", "200%", "is '200%'; it must be at most 100%"),
        ("schedule.warmup", 10**24, "it must be at most 10000000 steps"),
        ("seed", 2**64, "it must be at most 4294967295"),
        ("model.ngram_order", 1000, "it must be at most 32"),
        ("logging.samples", 2**31, "it must be at most 1000"),
        ("optimizer.learning_rate", "1,5", "write the fraction after a point: 1.5"),
        ("optimizer.learning_rate", "2%", "it must be a number: 0.02 instead of 2%"),
        ("optimizer.learning_rate", "inf", "it must be a finite number"),
        ("optimizer.learning_rate", "1e400", "it must be a finite number"),
        ("model.qk_norm", "maybe", "is 'maybe'; it must be true or false"),
        ("model.qk_norm", 2, "is 2; it must be true or false"),
        ("tokenizer", 5, "is 5; it must be a text"),
        ("data.source", "a\0b", "a text has no zero byte"),
        pytest.param("data.source", "x" * 200_000, "a text has at most 65536 characters", id="long"),
    ],
)
def test_what_cannot_be_read_is_refused_in_plain_words(path, given, words):
    config = get_default()
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = given
    (problem,) = problems_of(config)
    assert problem.startswith(f"{path} is ") and words in problem
    assert len(problem) < 200


def test_every_number_has_a_limit():
    for path, option in flat_options().items():
        if option.duration or (isinstance(option.default, int | float) and not isinstance(option.default, bool)):
            assert option.maximum is not None and math.isfinite(option.maximum), path


@pytest.mark.parametrize(
    ("schedule", "num_steps", "words"),
    [
        ({"name": "wsd", "warmup": "80%", "decay": "80%"}, 100, r"\(80 steps\) .* are together longer than .* 100"),
        ({"name": "cosine", "warmup": 101}, 100, "the peak would never be reached"),
        ({"name": "cosine", "warmup": "1M tokens"}, 100, "the peak would never be reached"),
        ({}, "3 tokens", "less than half a step of 8192 tokens"),
        ({}, "1e18 tokens", "a run has at most 10000000"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run(schedule, num_steps, words):
    config = get_default()
    config.schedule.update(schedule)
    config.train.num_steps = num_steps
    (problem,) = problems_of(config)
    assert re.search(words, problem), problem


def test_lengths_in_epochs_are_compared_once_the_data_are_known():
    config = get_default()
    config.schedule.update(name="wsd", warmup="80%", decay="0.8 epochs")
    config.train.num_steps = "1 epoch"
    validate(config)
    with pytest.raises(UserError, match="together longer"):
        config_lib.resolve(config, 300, 100.0)


def test_what_is_written_in_a_config_file_may_be_a_reference():
    config = get_default()
    steps = FieldReference(10, field_type=int)
    config.train.num_steps, config.schedule.decay = steps, steps * 0.5
    config_lib.override(config, "train.num_steps", "1e3")
    validate(config)
    assert (config.train.num_steps, config.schedule.decay) == (1000, 500)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (500, 500),
        ("500", 500),
        ("1K", 1000),
        ("2%", 40),
        ("0.05%", 1),
        ("100 %", 2000),
        ("1 epoch", 120),
        ("2.5 epochs", 301),
        ("10M tokens", 2500),
        ("0.5B tokens", 125_000),
        ("8000 tokens", 2),
        (" 300 steps ", 300),
        ("1e3 steps", 1000),
        ("1_000", 1000),
        (".5 epoch", 60),
        ("5e-1 epoch", 60),
        ("１０％", 200),
    ],
)
def test_durations_in_steps(value, steps):
    """2,000 steps in all, 4,000 tokens per step, 120.4 steps per epoch."""
    assert resolve_duration(value, total=2000, tokens_per_step=4000, steps_per_epoch=120.4) == steps
    assert duration_problem(value) is None


@pytest.mark.parametrize(
    "value",
    ["", "soon", "2 %%", "-5", -5, "-5%", "1 epoch 2", "1e", "5K%", "1,000", "2 days", True, 2.5, None],
)
def test_what_is_not_a_duration(value):
    assert repr(value) in duration_problem(value)


def test_the_length_of_a_run_is_not_a_share_of_itself():
    with pytest.raises(ValueError, match="50%"):
        resolve_duration("50%", total=None, tokens_per_step=1, steps_per_epoch=1.0)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans()))
def test_any_value_is_a_duration_or_a_problem_in_words(value):
    problem = duration_problem(value)
    if problem is None:
        assert resolve_duration(value, total=10, tokens_per_step=1, steps_per_epoch=1.0) >= 0
    else:
        assert repr(value) in problem


def test_json_round_trip():
    config = get_default()
    config.train.num_steps = "3 epochs"
    config.model.dropout = 0.25
    config.init_from = "runs/wörld"
    again = from_json(to_json(config))
    assert again == config.lock()
    assert to_json(again) == to_json(config)
    assert config_lib.sha256(again) == config_lib.sha256(config)
    assert again.is_locked


def test_json_does_not_depend_on_the_order_of_options():
    config, other = get_default(), get_default()
    dropout = other.model.dropout
    del other.model.dropout
    other.model.dropout = dropout
    assert to_json(other) == to_json(config)
    assert config_lib.sha256(other) == config_lib.sha256(config)


def test_different_configs_have_different_hashes():
    config, other = get_default(), get_default()
    other.seed = 1
    assert config_lib.sha256(config) != config_lib.sha256(other)


def test_a_config_of_an_earlier_version_takes_defaults_for_what_came_later():
    old = json.loads(to_json(get_default()))
    del old["model"]["logit_softcap"], old["logging"]
    old["model"]["num_layers"] = 7
    config = from_json(json.dumps(old))
    assert config.model.num_layers == 7
    assert config.model.logit_softcap == get_default().model.logit_softcap
    assert config.logging == get_default().lock().logging


def test_every_option_says_what_it_affects():
    options = config_lib.flat_options()
    assert {option.affects for option in options.values()} == set(AFFECTS)
    scalars = {
        path for path in config_lib.affecting("hyper") if path.startswith(("optimizer.", "objective.", "train."))
    }
    assert all(isinstance(options[path].default, float) for path in scalars), "inputs of a step are numbers"
