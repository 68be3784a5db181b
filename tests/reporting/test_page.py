import html.parser
import json
import math

import pytest

from gptjax.reporting.page import write_report

ATTACK = "<script>alert('&')</script><img src=x onerror=alert(1)>"


class Page(html.parser.HTMLParser):
    """The page as a browser shows it: every start tag with its attributes, the visible text, and tables as rows."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.rows, self.open = [], "", [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def count(self, name):
        return sum(tag == name for tag, _ in self.tags)


def read(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def workdir(tmp_path):
    """A run of 100 steps that was continued at step 50, and whose best checkpoint is not its last."""
    train = [
        {
            "step": step,
            "split": "train",
            "loss": 5 - step / 50,
            "tokens_seen": step * 1000,
            "tokens_per_second": 900.0 if step > 10 else 10.0,
            "learning_rate": 0.001,
            "gradient_norm": 1.5,
            "wall_time_s": (step if step <= 50 else step - 50) * 60.0,
        }
        for step in range(10, 101, 10)
    ]
    validation = [
        {
            "step": step,
            "split": "validation",
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": 1.25,
        }
        for step, loss in ((25, 4.0), (50, 3.125), (100, 3.5))
    ]
    workdir = tmp_path / "run-7"
    (workdir / "evaluation").mkdir(parents=True)
    write_lines(workdir / "metrics.jsonl", train + validation)
    write_lines(
        workdir / "samples.jsonl",
        [
            {"step": 50, "prompt": "Once", "text": " early"},
            {"step": 100, "prompt": "Once", "text": " upon 从前"},
        ],
    )
    results = {
        "perplexity": {
            "perplexity": {
                "value": 22.75,
                "ci95": [20.5, 25.0],
                "n": 12345,
                "signature": "context:64|stride:64",
            },
            "unigram_perplexity": {"value": 612.25},
        },
        "bleu": {"bleu": {"value": 7.5, "ci95": [None, None], "n": 1, "signature": "tok:13a"}},
    }
    evaluation = {"checkpoint": {"path": "p", "step": 50, "config_sha256": "c"}, "results": results}
    (workdir / "evaluation" / "best.json").write_text(json.dumps(evaluation))
    (workdir / "config.json").write_text(json.dumps({"model": {"num_layers": 4}, "seed": 12}))
    manifest = {
        "gptjax": "0.1.0",
        "git": {"commit": "abcdef0123456789", "diff_sha256": "99"},
        "packages": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 2},
        "mesh": {"data": 2},
        "data": {"source_fingerprint": "f00d"},
        "parameters": [
            {"path": "embedding", "shape": [300, 8], "decay": True},
            {"path": "scale", "shape": [8]},
        ],
    }
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    return workdir


def test_numbers_are_those_of_the_run(workdir):
    page = read(workdir)
    for text in (
        "run-7",
        "3.5000",  # the last validation loss
        "3.1250",  # the best
        "best 3.1250 at step 50",
        "33.115",  # exp(3.5)
        "1.2500",
        "100k",  # tokens seen
        "900",  # tokens per second, without the slow start
        "1h 40m",  # 50 min before and 50 min after the continuation
        "2.408k parameters",
        "2 × cpu",
        "commit abcdef0123 with changes",
    ):
        assert text in page.text
    assert page.count("svg") == 4


def test_evaluations_are_tables(workdir):
    rows = read(workdir).rows
    assert ["perplexity", "perplexity", "22.750", "20.500 – 25.000", "12,345", "context:64|stride:64"] in rows
    assert ["perplexity", "unigram_perplexity", "612.25", "", "", ""] in rows
    assert ["bleu", "bleu", "7.5000", "", "1", "tok:13a"] in rows


def test_settings_are_tables(workdir):
    rows = read(workdir).rows
    for row in (
        ["model.num_layers", "4"],
        ["seed", "12"],
        ["data.source_fingerprint", "f00d"],
        ["mesh.data", "2"],
    ):
        assert row in rows
    assert ["path", "shape", "decay"] in rows
    assert ["embedding", "[300, 8]", "true"] in rows
    assert ["scale", "[8]", ""] in rows


def test_earlier_samples_are_folded(workdir):
    page = read(workdir)
    assert page.text.index("Once upon 从前") < page.text.index("Earlier samples (1 steps)")
    assert page.text.index("Earlier samples (1 steps)") < page.text.index("Once early")


def test_nothing_is_fetched(workdir):
    source = write_report(workdir).read_text(encoding="utf-8")
    assert "http://" not in source
    assert "https://" not in source
    page = Page(source)
    assert not {"src", "href", "action"} & {name for _, attributes in page.tags for name in attributes}
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_everything_is_escaped(workdir):
    renamed = workdir.rename(workdir.with_name("<b>run"))
    metrics = [{"step": 1, "split": "validation", "loss": 1.0}]
    write_lines(renamed / "metrics.jsonl", metrics)
    write_lines(renamed / "samples.jsonl", [{"step": 1, "prompt": ATTACK, "text": ATTACK}])
    nested = {ATTACK: {ATTACK: {"value": 1.0, "signature": ATTACK}}}
    evaluation = {"checkpoint": {"step": ATTACK}, "results": nested}
    (renamed / "evaluation" / "best.json").write_text(json.dumps(evaluation))
    (renamed / "config.json").write_text(json.dumps({ATTACK: {ATTACK: ATTACK}}))
    manifest = {"git": {"commit": ATTACK}, "devices": {"kind": ATTACK}, "parameters": [{ATTACK: ATTACK}]}
    (renamed / "manifest.json").write_text(json.dumps(manifest))
    page = read(renamed)
    assert page.count("script") == 1
    assert page.count("img") == page.count("b") - 1 == 0  # <b> is the prompt of the one sample
    assert page.text.count(ATTACK) >= 10


@pytest.mark.parametrize("content", ["", "\n", "{", '{"step": 1', "[1]\n3\nnull\n"])
def test_a_run_without_metrics_has_a_page(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    page = read(tmp_path)
    assert tmp_path.name in page.text
    assert page.count("svg") == page.count("table") == 0


def test_an_empty_directory_has_a_page(tmp_path):
    assert tmp_path.name in read(tmp_path).text


def test_damage_is_left_out(tmp_path):
    damaged = [
        '{"step": 10, "split": "train", "loss": 2.5, "gradient_norm": null}',
        '{"step": 20, "split": "train", "loss": NaN, "tokens_seen": "many"}',
        '{"step": 30, "split": "train", "loss": 1' + "0" * 400 + "}",
        '{"step": null, "split": "train", "loss": 9.875}',
        '{"step": 40, "split": 3, "loss": 9.875}',
        '{"step": 50, "split": "train", "lo',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(damaged).encode() + b"\xff")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "a.json").write_text('{"results": {"t": {"m": {"value": null, "ci95": 3}}}}')
    (tmp_path / "evaluation" / "b.json").write_text('{"results": [1]}')
    (tmp_path / "evaluation" / "c.json").write_text("{")
    (tmp_path / "manifest.json").write_text('{"parameters": [3, {"shape": "x"}], "devices": 4, "git": null}')
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "text": "half \\ud800 a pair"}\n{"text": "no step"}\n')
    page = read(tmp_path)
    assert "training loss2.5000" in page.text
    assert "9.875" not in page.text
    assert ["t", "m", "", "", "", ""] in page.rows
    assert "half ? a pair" in page.text
    assert "no step" not in page.text


def test_the_last_word_about_a_step_counts(tmp_path):
    lines = [{"step": step, "split": "validation", "loss": loss} for step, loss in ((20, 1.0), (10, 3.0), (20, 2.0))]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = read(tmp_path)
    assert "best 2.0000 at step 20" in page.text
    assert "1.0000" not in page.text


def test_writing_again_replaces_the_page(workdir):
    write_report(workdir)
    (workdir / "samples.jsonl").unlink()
    assert "Samples" not in read(workdir).text
    assert [path.name for path in workdir.iterdir() if "report" in path.name] == ["report.html"]


def test_where_the_time_went(tmp_path):
    """From the line with the largest sum; damaged entries are left out."""
    lines = [
        {"step": 10, "split": "train", "loss": 2.0, "seconds/step": 6.0, "seconds/compile": 4.0},
        {
            "step": 10,
            "split": "validation",
            "loss": 2.0,
            "seconds/step": 15.0,
            "seconds/compile": 5.0,
            "seconds/x": None,
        },
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = read(tmp_path)
    assert "goodput 75.0%" in page.text
    assert [row for row in page.rows if row[0] in ("step", "compile", "x")] == [
        ["step", "15.0", "75.0%"],
        ["compile", "5.0", "25.0%"],
    ]
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "split": "train", "loss": 2.0, "seconds/step": 0.0}])
    assert "goodput" not in read(tmp_path).text


def test_what_was_changed_while_the_run_went_on_is_a_table(tmp_path):
    options = {"train.num_steps": [400, 800], "schedule.name": ["wsd", ATTACK], "seed": 3}
    (tmp_path / "manifest.json").write_text(json.dumps({"changes": [{"step": 400, "options": options}, 7, {}]}))
    page = write_report(tmp_path).read_text()
    assert "Options changed during the run" in page
    assert '<td class="key">train.num_steps</td><td class="code">400</td><td class="code">800</td>' in page
    assert ATTACK not in page
