"""The evaluate verb from end to end: tasks on a checkpoint, files of outputs, comparisons."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from gptjax import cli, convert, evaluate, train
from gptjax.artifacts import loading
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.generation import beam
from gptjax.generation.beam_params import BeamParams
from gptjax.generation.completion import Generator

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="document", validation_fraction=0.4)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=64)
    config.optimizer.learning_rate = 1e-2
    config.train.update(num_steps=40, batch_size=8, checkpoint_every=10, keep_checkpoints=4)
    config.evaluation.update(every=40, tasks="perplexity,bleu")
    config.logging.update(samples=0, tensorboard=False)
    return config
"""
QUESTIONS = [
    {"query": f"the cat sat on {i}", "choices": ["a mat", "xqzj kwv", "and saw one red bird sing"], "gold": i % 3}
    for i in range(24)
]
PROMPTS = [{"prompt": f"the cat sat {i}", "references": ["on a mat", "on the mat"]} for i in range(6)]


def run(*options: str) -> int:
    return cli.run(evaluate.main, ["evaluate", *options])


@pytest.fixture(scope="module")
def workdir(tiny_corpus, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    (directory / "config.py").write_text(CONFIG.format(corpus=tiny_corpus))
    options = [f"--config={directory}/config.py", f"--workdir={directory}/run"]
    assert cli.run(train.main, ["train", *options]) == 0
    return directory / "run"


@pytest.fixture
def files(tmp_path) -> Path:
    """questions.jsonl, prompts.jsonl."""
    for name, entries in (("questions", QUESTIONS), ("prompts", PROMPTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def results(path: Path) -> dict:
    return json.loads(path.read_text())["results"]


def test_all_kinds_of_tasks_in_one_run(workdir, files, tiny_corpus):
    kinds = "perplexity,bleu,ter,rouge,f1,diversity,multiple_choice"
    options = [f"--prompts={files}/prompts.jsonl", f"--examples={files}/questions.jsonl", "--max_new_tokens=10"]
    assert run(f"--workdir={workdir}", f"--tasks={kinds}", f"--output={files}/out.json", *options) == 0
    found = results(files / "out.json")
    assert {task: set(metrics) for task, metrics in found.items() if task != "diversity"} == {
        "perplexity": {"perplexity", "nll", "bits_per_byte", "accuracy", "word_perplexity", "unigram_perplexity"},
        "bleu": {"bleu", "chrf"},
        "ter": {"ter"},
        "rouge": {"rouge1", "rouge2", "rougeL"},
        "f1": {"f1", "exact_match"},
        "multiple_choice": {"accuracy", "accuracy_normalized"},
    }
    for metrics in found.values():
        for score in metrics.values():
            assert score.keys() == {"value", "ci95", "n", "signature"} and len(score["signature"]) > 10
    perplexity = found["perplexity"]
    words = int(re.search(r"words:(\d+)", perplexity["word_perplexity"]["signature"])[1])
    texts = [path.read_text() for path in tiny_corpus.glob("*.txt")]
    assert 0 < words < sum(len(text.split()) for text in texts)
    total = perplexity["nll"]["value"] * perplexity["nll"]["n"]
    # Without the nats of the tokens that end the texts, which lm-eval does not score
    assert 1 < perplexity["word_perplexity"]["value"] < math.exp(total / words)
    items = [json.loads(line) for line in (files / "out.items.jsonl").read_text().splitlines()]
    shown = next(item for item in items if item["task"] == "bleu" and "item" in item)
    assert shown["prompt"] == "the cat sat 0" and shown["references"] == ["on a mat", "on the mat"]
    assert "hypothesis" in shown and shown["sums"].keys() == {"bleu", "chrf"}


def test_a_question_is_scored_the_same_in_any_batch(workdir, files):
    found = []
    for size in (1, 7, 64):
        task = f"--tasks=multiple_choice:{files}/questions.jsonl"
        assert run(f"--workdir={workdir}", task, f"--batch_size={size}", f"--output={files}/{size}.json") == 0
        lines = [json.loads(line) for line in (files / f"{size}.items.jsonl").read_text().splitlines()]
        found.append([line["log_likelihoods"] for line in lines if "item" in line])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=2e-4)
    assert results(files / "1.json").keys() == {"multiple_choice:questions"}


def test_the_file_of_many_tasks_begins_with_the_first(workdir, files):
    text = (files / "questions.jsonl").read_text().splitlines()[0]
    names = [f"{number}-问题-{'of-some-length' * 2}" for number in range(4)]
    for name in names:
        (files / f"{name}.jsonl").write_text(text)
    before = set((workdir / "evaluation").glob("*.json"))
    for tasks in (names, [names[0], *reversed(names[1:])]):
        wanted = ",".join(f"multiple_choice:{files}/{name}.jsonl" for name in tasks)
        assert run(f"--workdir={workdir}", f"--tasks={wanted}") == 0
    new = set((workdir / "evaluation").glob("*.json")) - before
    assert len(new) == 2, "one does not replace the other"
    pattern = r"multiple_choice-0-问题-of-some-len\w*-and-3-more-validation-40-[0-9a-f]{6}\.json"
    for path in new:
        assert re.fullmatch(pattern, path.name)
        assert results(path).keys() == {f"multiple_choice:{name}" for name in names}


def test_another_source_is_scored_with_the_tokenizer_of_the_checkpoint(workdir, tiny_corpus, tmp_path):
    for number, path in enumerate(sorted(tiny_corpus.glob("*.txt"))[:30]):
        (tmp_path / f"{number}.txt").write_text(path.read_text())
    options = ["--tasks=perplexity", f"--data=text:{tmp_path}/*.txt", f"--output={tmp_path}/out.json"]
    assert run(f"--workdir={workdir}", *options) == 0
    scores = results(tmp_path / "out.json")["perplexity"]
    tokens = sum(len(path.read_bytes()) + 1 for path in tmp_path.glob("*.txt"))
    assert scores["nll"]["n"] == tokens and "unigram_perplexity" not in scores
    words = sum(len(path.read_text().split()) for path in tmp_path.glob("*.txt"))
    assert f"|split:all|context:64|stride:64|tokens:{tokens}|" in scores["nll"]["signature"]
    assert f"|words:{words}|" in scores["word_perplexity"]["signature"]


@pytest.fixture(scope="module")
def two_checkpoints(workdir, tmp_path_factory) -> Path:
    """A directory with 10.json and 40.json, the perplexity early in training and at the end."""
    directory = tmp_path_factory.mktemp("two")
    for step in (10, 40):
        options = [f"--checkpoint={step}", "--tasks=perplexity", f"--output={directory}/{step}.json"]
        assert run(f"--workdir={workdir}", *options) == 0
    return directory


@pytest.mark.parametrize("form", ["--compare {a} {b}", "--compare={a},{b}", "--compare={a} --compare={b}"])
def test_two_checkpoints_are_compared(two_checkpoints, tmp_path, capsys, form):
    a, b = (two_checkpoints / f"{step}.json" for step in (10, 40))
    arguments = [part.format(a=a, b=b) for part in form.split()]
    assert run(*arguments, f"--output={tmp_path}/compared.json") == 0
    printed = capsys.readouterr().out
    assert f"A = {a.with_suffix('.items.jsonl')}\nB = {b.with_suffix('.items.jsonl')}\n" in printed
    assert "B is better: perplexity perplexity, perplexity nll, perplexity bits_per_byte" in printed
    found = json.loads((tmp_path / "compared.json").read_text())["differences"]["perplexity"]["nll"]
    before, after = (results(two_checkpoints / f"{step}.json")["perplexity"]["nll"]["value"] for step in (10, 40))
    assert (found["a"], found["b"], found["difference"]) == pytest.approx((before, after, after - before))
    assert found["ci95"][0] < found["difference"] < found["ci95"][1] < 0 and found["p"] < 0.01


def test_outputs_of_systems(tmp_path, capsys):
    outputs = tmp_path / "outputs-of-systems" / ("with-a-long-name-" * 12)
    outputs.mkdir(parents=True)
    (outputs / "one.txt").write_text("The cat sat on the mat.\n\nA dog.\n")
    (outputs / "two.txt").write_text("the Cat sat on the mat.\nIt rains.\nA dog.\n")
    (tmp_path / "references.txt").write_text("The cat sat on the mat.\nA cat sat.\n\nIt rains.\n\nThe dog.\nA dog.\n")
    options = [f"--references={tmp_path}/references.txt", f"--output={tmp_path}/scores.json"]
    assert run(f"--hypotheses={outputs}", "--tasks=bleu,bleu_lowercase,f1,rouge", *options) == 0
    printed = capsys.readouterr()
    assert "1 of 3 are empty" in printed.err and str(outputs / "two.txt") in printed.out
    systems = json.loads((tmp_path / "scores.json").read_text())["systems"]
    assert systems["two.txt"]["bleu_lowercase"]["bleu_lowercase"]["value"] == pytest.approx(100)
    assert systems["two.txt"]["bleu"]["bleu"]["value"] < 100 == pytest.approx(systems["two.txt"]["f1"]["f1"]["value"])
    assert systems["one.txt"]["rouge"]["rouge1"]["signature"].endswith("|empty:1")
    for name in ("one", "two"):
        options[-1] = f"--output={tmp_path}/{name}.json"
        assert run(f"--hypotheses={outputs}/{name}.txt", "--tasks=f1,ter", *options) == 0
    assert run("--compare", f"{tmp_path}/one.json", f"{tmp_path}/two.json") == 0


def test_home_directories_and_what_is_not_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "more").mkdir(parents=True)
    for name in ("one.txt", ".hidden"):
        (tmp_path / "outputs" / name).write_text("it rains\n")
    (tmp_path / "references.txt").write_text("It rains.\n")
    options = ["--references=references.txt", "--tasks=f1", "--output=~/scores.json"]
    assert run("--hypotheses=~/outputs", *options) == 0
    assert (tmp_path / "scores.json").exists() and not (tmp_path / "~").exists()
    assert "not scored (hidden, or not a regular file): .hidden, more" in capsys.readouterr().err


def test_outputs_are_scored_against_the_rows_of_a_csv_file(tmp_path):
    (tmp_path / "test.csv").write_text("mr,ref\na,The cat sat.\nb,It rains.\na,A cat sat down.\n")
    (tmp_path / "out.txt").write_text("the cat sat\nit rains\n")
    options = [f"--references={tmp_path}/test.csv#mr,ref", "--tasks=f1", f"--output={tmp_path}/out.json"]
    assert run(f"--hypotheses={tmp_path}/out.txt", *options) == 0
    assert results(tmp_path / "out.json")["f1"]["exact_match"]["value"] == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks=multiple_choise:a.jsonl"], "unknown task 'multiple_choise'; .*did you mean multiple_choice?"),
        (["--tasks=multiple_choice:absent.jsonl"], "absent.jsonl cannot be read: there is no such file"),
        (["--tasks=multiple_choice"], "the task multiple_choice needs a file: --tasks=multiple_choice:FILE.jsonl"),
        (["--tasks=bleu:a.jsonl"], "the task bleu takes no file: 'bleu:a.jsonl'; prompts come from --prompts"),
        (["--tasks=multiple_choice:{}/bad.jsonl"], "bad.jsonl, line 2: gold is 3, but there are 3 choices; expected"),
        (["--tasks=lm_eval"], "the task lm_eval needs a name"),
        (["--tasks=arc:{0}/questions.jsonl,arc:{0}/questions.jsonl"], "two tasks are named arc:questions"),
        (
            ["--tasks=bleu", "--prompts={}/long.jsonl", "--too_long=fail"],
            "prompt 0 has 101 tokens, more than .* context_length 64",
        ),
        (["--tasks=exact_answer", "--prompts={}/prompts.jsonl"], "the reference of item 1 has no answer"),
        (["--compare", "{}/a.json"], "--compare takes two work directories or results, not 1"),
        (["--compare", "{}/a.json", "{}/b.json"], "there is no .*a.items.jsonl"),
        (["--hypotheses={}/two.txt", "--references={}/three.txt"], "two.txt has 2 .*three.txt has references for 3"),
        (["--hypotheses={}/two.txt"], "two.txt has no references; name them: --references=FILE"),
        (
            ["--hypotheses={}/absent.txt", "--references={}/three.txt"],
            "absent.txt cannot be read: there is no such file",
        ),
        (["--hypotheses={0}/two.txt", "--references={0}/two.txt", "--tasks=blue"], "unknown task 'blue'.*bleu"),
    ],
)
def test_a_wrong_request(workdir, files, capsys, options, message):
    (files / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(QUESTIONS[0] | {"gold": 3}) + "\n")
    (files / "long.jsonl").write_text(json.dumps({"prompt": "x" * 100, "reference": "y"}) + "\n")
    (files / "two.txt").write_text("a\nb\n")
    (files / "three.txt").write_text("a\nb\nc\n")
    capsys.readouterr()
    assert run(f"--workdir={workdir}", *(option.format(files) for option in options)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(message, last), last


@pytest.mark.parametrize("stride", [24, 7])
def test_strided_perplexity_is_that_of_a_loop_over_windows_in_transformers(tmp_path, stride):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    length, eot = 24, 256
    torch.manual_seed(0)
    shape = dict(vocab_size=257, n_positions=length, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=eot, eos_token_id=eot)).eval()
    model.save_pretrained(tmp_path / "hf")
    build_tokenizer("byte").save(tmp_path / "hf" / "tokenizer.json")
    texts = ["Short.", "A text of exactly 24 b.", "A text that is longer than one window. " * 4, "x" * 25]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)

    nll, count = 0.0, 0
    for text in texts:
        tokens = torch.tensor([eot, *text.encode(), eot])
        scored = 0  # predictions of this document that an earlier window has made
        for begin in range(0, len(tokens) - 1, stride):
            inputs, targets = tokens[begin : begin + length], tokens[begin + 1 : begin + length + 1].clone()
            inputs = inputs[: len(targets)]
            targets[: scored - begin] = -100
            with torch.no_grad():
                logits = model(inputs[None]).logits[0]
            nll += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            count += int((targets != -100).sum())
            scored = begin + len(targets)
            if scored == len(tokens) - 1:
                break
    assert count == sum(len(text) + 1 for text in texts)

    assert cli.run(convert.main, ["convert", f"--from=hf:{tmp_path}/hf", f"--to={tmp_path}/run"]) == 0
    options = ["--tasks=perplexity", f"--data=text:{tmp_path}/*.txt", f"--stride={stride}"]
    assert run(f"--workdir={tmp_path}/run", *options, f"--output={tmp_path}/out.json") == 0
    scores = results(tmp_path / "out.json")["perplexity"]
    assert scores["perplexity"]["n"] == count
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_completions_found_with_beams(workdir, files):
    options = [f"--workdir={workdir}", "--tasks=bleu", f"--prompts={files}/prompts.jsonl", "--max_new_tokens=5"]
    assert run(*options, "--beams=3", "--length_penalty=0.5", f"--output={files}/beam.json") == 0
    assert run(*options, f"--output={files}/greedy.json") == 0
    signatures = [results(files / f"{name}.json")["bleu"]["bleu"]["signature"] for name in ("beam", "greedy")]
    assert "|decoding:beam-3|length_penalty:0.5|" in signatures[0] and "|decoding:greedy|" in signatures[1]
    generator = Generator.from_trained(loading.load(workdir))
    params = BeamParams(beams=3, length_penalty=0.5, max_new_tokens=5)
    found = beam.search(generator, generator.encode([prompt["prompt"] for prompt in PROMPTS]), params)
    items = [json.loads(line) for line in (files / "beam.items.jsonl").read_text().splitlines()]
    hypotheses = [item["hypothesis"] for item in items if "item" in item]
    assert hypotheses == [best.text.strip() for best, *_ in found]


def test_one_prompt_that_is_too_long_does_not_end_all(workdir, files):
    entries = [*PROMPTS[:2], {"prompt": "x" * 100, "reference": "y"}]
    (files / "long.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for too_long, n in (("cut", 3), ("skip", 2)):
        options = [f"--prompts={files}/long.jsonl", f"--too_long={too_long}", f"--output={files}/{too_long}.json"]
        assert run(f"--workdir={workdir}", "--tasks=bleu,f1", "--max_new_tokens=5", *options) == 0
        score = results(files / f"{too_long}.json")["f1"]["f1"]
        assert score["n"] == n
        assert f"|{'left-truncated' if too_long == 'cut' else 'too-long-skipped'}:1/3" in score["signature"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tasks=nonsense", "unknown task 'nonsense'"),
        ("tasks=perplexity,arc:absent.jsonl", "absent.jsonl cannot be read: there is no such file"),
        ("prompts=absent.jsonl", "absent.jsonl cannot be read: there is no such file"),
    ],
)
def test_training_does_not_begin_with_tasks_that_cannot_end_it(tiny_corpus, tmp_path, capsys, option, message):
    (tmp_path / "config.py").write_text(CONFIG.format(corpus=tiny_corpus))
    options = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", f"--config.evaluation.{option}"]
    assert cli.run(train.main, ["train", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()


NASTY = ["", "abc", "nan", "inf", "-1", "1e30", "9" * 5000, "None", "0x10", "1.5", "[]", "\x00", "True", "１２", "--"]


@pytest.mark.parametrize("flag", ["stride", "batch_size", "max_prompts", "max_new_tokens"])
def test_what_is_no_number_within_the_limits_is_refused_in_plain_words(capsys, flag):
    for value in NASTY:
        status = run("--workdir=/absent", f"--{flag}={value}")
        said = capsys.readouterr().err
        assert status == 2 and "Traceback" not in said and "invalid literal" not in said, value
        assert "expected a whole number from" in said or "no checkpoint" in said, (value, said)


def test_a_result_is_written_where_told_and_a_device_stays_one(workdir, files, capsys):
    (files / "two.txt").write_text("a\nb\n")
    options = [f"--hypotheses={files}/two.txt", f"--references={files}/two.txt"]
    assert run(*options, "--output=/dev/null") == 0
    assert Path("/dev/null").is_char_device() and not Path("/dev/null.items.jsonl").exists()
    assert run(*options, f"--output={files}/made/out.json") == 0
    assert results(files / "made" / "out.json")["bleu"]["bleu"]["value"] == 0
    assert run(*options, f"--output={files}/two.txt/out.json") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not [path for path in (files / "made").iterdir() if path.name.startswith(".")]


def test_a_field_of_a_file_may_stand_beside_another_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").touch()
    for text, specs in (
        ("a.csv#ref", ["a.csv#ref"]),
        ("a.csv#mr,ref", ["a.csv#mr,ref"]),
        ("a.csv#ref,b.txt", ["a.csv#ref", "b.txt"]),
        ("b.txt,a.csv#mr,ref,b.txt", ["b.txt", "a.csv#mr,ref", "b.txt"]),
        ("a.csv#ref,a.csv#other", ["a.csv#ref", "a.csv#other"]),
    ):
        assert evaluate._split_specs(text) == specs
