"""tools/chat_quickstart.py: the questions, the counts and the report."""

import importlib.util
import json
from pathlib import Path

import pytest

from gptjax.errors import UserError

TOOL = Path(__file__).parent.parent / "tools" / "chat_quickstart.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("chat_quickstart", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_are_spread_over_the_split_and_held_out(tool, tmp_path):
    source = "toy:sort#length=3,size=200"
    train, held_out = (tool.questions_of(source, split) for split in ("train", "validation"))
    assert train and held_out and not {q["prompt"] for q in train} & {q["prompt"] for q in held_out}
    tool.write_questions(tmp_path / "q.jsonl", source, "train", 10)
    written = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(written) == 10 and written[-1] in train[len(train) // 2 :]
    (tmp_path / "one.jsonl").write_text(json.dumps({"q": "a", "a": "b"}) + "\n")
    with pytest.raises(UserError, match=r"has no question in its (validation|train) split; use more dialogues"):
        for split in ("validation", "train"):
            tool.chosen_questions(f"pairs:{tmp_path}/one.jsonl#q,a", split, 10)


def test_a_stage_that_took_several_commands_has_the_time_of_all(tool, tmp_path):
    now = tool.clocks()
    for _ in range(2):
        tool.add_time(tmp_path, "text", (now[0] - 60, now[1] - 30))
    clock, processor = json.loads((tmp_path / "seconds.json").read_text())["text"]
    assert clock >= 120 and 60 <= processor < 70


def test_both_reports_say_the_same(tool, tmp_path):
    for stage, name in tool._CURVES.items():
        (tmp_path / stage).mkdir()
        lines = [{"split": "validation", "step": step, name: 1 / (step + 1)} for step in (0, 9)]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = tool.Report(
        "A chat model: a<b",
        "1.0 minutes.",
        ["stage", "F1", "minutes", "CPU minutes"],
        [["text: read", "1.00 [0.50, 1.50]", "0.5", "0.4"]],
        [f"Rewards: {tool.from_to(tool.curve(tmp_path, 'reward', 'reward'))}."],
        [("What is <b>?", "a & b", {"text": "no idea"})],
    )
    markdown, page = tool.as_markdown(found), tool.as_html(found, tmp_path)
    assert "| text: read | 1.00 [0.50, 1.50] | 0.5 | 0.4 |" in markdown and "* Rewards: 1.000 to 0.100." in markdown
    assert "What is &lt;b&gt;?" in page and "a &amp; b" in page and "no idea" in page
    assert page.count("<svg") == len(tool.STAGES) and "Rewards: 1.000 to 0.100." in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
