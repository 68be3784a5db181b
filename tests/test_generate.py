"""The verb, on a checkpoint of a model that was never trained."""

import json
import subprocess
import sys

import jax
import optax
import pytest

from gptjax import cli, generate
from gptjax import config as config_lib
from gptjax.artifacts.checkpoints import Checkpoints
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.training.state import create_state


def save_checkpoint(workdir, tokenizer):
    config = config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=32)
    config.model.vocab_size = tokenizer.vocab_size
    params = gpt.initialise(Architecture.from_config(config.model, 0), jax.random.key(0))
    state = create_state(params, optax.identity(), ema=False)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, state, config=config, tokenizer=tokenizer, metrics={"validation_loss": 1.0})
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), build_tokenizer("byte"))


@pytest.fixture
def run(workdir, capsys):
    """Runs the verb; returns its exit status, standard output and the last line of standard error."""

    def run(*arguments, workdir=workdir):
        status = cli.run(generate.main, ["generate", f"--workdir={workdir}", "--max_new_tokens=5", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.strip()

    return run


def test_the_same_command_prints_the_same_text(run):
    first, second, other = (run("--prompt=ab", f"--seed={seed}") for seed in (1, 1, 2))
    assert first[0] == 0
    assert first == second != other


def test_samples_of_one_prompt_differ(run):
    status, out, _ = run("--prompt=", "--num_samples=2", "--checkpoint=1", "--ignore_eos")
    assert status == 0
    _, first, second = out.split("--- ")
    assert first.startswith("1 of 2\n") and second.startswith("2 of 2\n")
    assert first[7:] != second[7:]


def test_file_to_file_keeps_the_objects_and_their_order(run, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    requests = [{"id": 7, "prompt": "一"}, {"prompt": "much longer"}, {"prompt": "", "tags": ["x"]}]
    prompts.write_text("\n\n".join(json.dumps(request) for request in requests))
    status, out, _ = run(f"--prompts={prompts}", f"--output={output}", "--num_samples=2", "--batch_size=4")
    assert status == 0 and str(output) in out
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [{k: line[k] for k in line if k not in ("completion", "finish_reason")} for line in lines] == [
        request for request in requests for _ in range(2)
    ]
    assert all(line["finish_reason"] in ("stop", "length") for line in lines)
    assert len({line["completion"] for line in lines}) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_a_search(run, tmp_path):
    status, out, _ = run("--prompt=ab", "--beams=3", "--num_best=2", "--ignore_eos", "--temperature=0")
    assert status == 0
    scores = [float(line.rpartition(" ")[2]) for line in out.splitlines() if line.startswith("--- ")]
    assert len(scores) == 2 and scores[0] >= scores[1]
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "id": 1}\n{"prompt": "c"}')
    status, out, _ = run(f"--prompts={tmp_path / 'p.jsonl'}", "--beams=3", "--num_best=2", "--ignore_eos")
    first, second = map(json.loads, out.splitlines())
    assert first["id"] == 1 and second["completion"] == second["best"][0]["completion"]
    assert first["score"] == pytest.approx(scores[0], abs=1e-4) == pytest.approx(first["logprob"] / 5, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--beams=2", "--top_k=5", "--stop=x"], "--beams=2 does not sample; leave out --stop, --top_k"),
        (["--beams=2", "--draft=runs/x"], "leave out --draft"),
        (["--beams=2", "--num_best=3"], "num_best is 3; expected from 1 to the number of beams, 2"),
        (["--length_penalty=2"], "--length_penalty is for beam search; add --beams=4"),
    ],
)
def test_flags_that_exclude_a_search(run, flags, reason):
    status, _, err = run("--prompt=ab", *flags)
    assert status == 2 and reason in err


def test_prompts_of_a_table(run, tmp_path):
    (tmp_path / "test.csv").write_text("mr,ref\nab,x\ncd,y\nab,z\n")
    status, out, _ = run(f"--prompts={tmp_path}/test.csv#mr,ref")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(line["prompt"], line["references"]) for line in lines] == [("ab", ["x", "z"]), ("cd", ["y"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "line 2"),
        (b"[1]", "line 2: expected an object"),
        (b'{"text": "x"}', 'line 2: "prompt" must be a text'),
        (b'{"prompt": 3}', "line 2"),
        (b'{"prompt": "\xff"}', "line 2"),
        (b'{"prompt": "\\ud800"}', "line 2"),
    ],
)
def test_a_bad_line_is_named(run, tmp_path, line, message):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    status, _, err = run(f"--prompts={prompts}", f"--output={output}")
    assert status == 2 and message in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt=TEXT or --prompts="),
        (["--prompt=a", "--prompts=b"], "either"),
        (["--prompts=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--prompt=a", "--output=/nowhere/out.jsonl"], "/nowhere/out.jsonl"),
        (["--prompt=a", "--temperature=-1", "--top_p=2"], "--temperature=-1: expected a number from 0 to 1000"),
        (["--prompt=a", "--num_samples=0"], "--num_samples=0: expected a whole number from 1 to 100000"),
        (["--prompt=a", "--draft_tokens=100000"], "expected a whole number from 1 to 64"),
        (["--prompt=a", "--checkpoint=9"], "--checkpoint=9"),
        (["--prompt=" + "long" * 20], "81 tokens"),
        (["--prompt=a", "--temprature=1"], "temperature"),
        (["--prompt=a", "--stop="], "stop"),
    ],
)
def test_wrong_requests(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_logprobs_of_the_tokens(run):
    status, out, _ = run("--prompt=ab", "--logprobs", "--num_samples=2", "--ignore_eos")
    assert status == 0
    first, second = map(json.loads, out.splitlines())
    assert first["prompt"] == "ab" and first["completion"] != second["completion"]
    for line in (first, second):
        assert len(line["tokens"]) == len(line["logprobs"]) == 5
        assert all(value < 0 for value in line["logprobs"])


def test_several_stop_texts(run):
    _, out, _ = run("--prompt=ab", "--max_new_tokens=25", "--ignore_eos")
    text = out.removesuffix("\n")
    stops = [text[9], text[6]]
    _, stopped, _ = run("--prompt=ab", "--max_new_tokens=25", "--ignore_eos", *(f"--stop={stop}" for stop in stops))
    assert stopped.removesuffix("\n") == text[: min(map(text.index, stops))]


def test_a_draft_changes_speed_and_not_text(run, workdir):
    plain = run("--prompt=ab", "--ignore_eos")
    status, out, err = run("--prompt=ab", "--ignore_eos", f"--draft={workdir}", "--draft_tokens=2")
    assert (status, out) == plain[:2]
    assert "draft: 3 of 4 proposals accepted; 2.50 tokens per pass" in err


def test_a_draft_with_another_tokenizer_is_refused(run, workdir, tmp_path):
    draft = save_checkpoint(tmp_path / "draft", build_tokenizer("char", ["abc"]))
    status, _, err = run("--prompt=ab", f"--draft={draft}")
    assert status == 2
    assert str(draft) in err and str(workdir) in err and "another tokenizer" in err


def test_a_workdir_without_checkpoints(run, tmp_path):
    status, _, err = run("--prompt=a", workdir=tmp_path / "missing")
    assert status == 2 and "no checkpoint" in err


def test_a_character_that_the_model_does_not_know(run, tmp_path):
    workdir = save_checkpoint(tmp_path / "run", build_tokenizer("char", ["abc"]))
    assert run("--prompt=ab", workdir=workdir)[0] == 0
    status, _, err = run("--prompt=aé", workdir=workdir)
    assert status == 2 and "'é'" in err


def test_help_shows_every_flag_without_importing_jax():
    code = "import sys; from gptjax import cli, generate; cli.run(generate.main, ['generate', '--help'])"
    check = f"try:\n    {code.replace('; ', chr(10) + '    ')}\nfinally:\n    assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for flag in (
        "--workdir",
        "--prompts",
        "--temperature",
        "--repetition_penalty",
        "--stop",
        "--draft_tokens",
        "e.g. --top_p=0.95",
    ):
        assert flag in result.stdout


def test_nothing_is_imported_that_a_completion_does_not_need(workdir):
    code = "import sys; from gptjax import generate; generate.main(sys.argv); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, f"--workdir={workdir}", "--prompt=ab", "--max_new_tokens=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(result.stderr.splitlines()[-1].split())
    assert {"jax", "tokenizers", "gptjax.generation.engine"} <= imported
    absent = {"tensorflow_datasets", "grain", "pyarrow", "sacrebleu", "trafilatura", "lxml", "datasets", "torch"}
    rooms = ("data.building", "data.sources", "training", "optim", "evaluation", "reporting", "planning")
    assert not imported & (absent | {f"gptjax.{room}" for room in rooms})
