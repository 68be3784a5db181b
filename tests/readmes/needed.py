"""Small inputs for the commands of the READMEs: texts, pages, dialogues, preferences, questions, data sets."""

import csv
import gzip
import json
import pydoc_data.topics
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# A config called FILE, as the READMEs call the reader's own.
CONFIG = """
from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "byte"
    return apply_arg(config, arg)
"""
PAGE = "<html><head><title>{title}</title></head><body><article><h1>{title}</h1>{text}</article></body></html>"
WHEN = ["今天", "昨天晚上", "上个星期", "每天早上", "去年夏天", "刚才", "周末", "放学以后", "下雨的时候", "过年那几天"]
WHO = ["我", "妈妈", "我的同学", "小明", "老师", "楼下的邻居", "他们一家", "那只猫", "我们几个朋友", "公司的同事"]
WHERE = ["在家里", "在学校", "在公园", "去图书馆", "到北京", "在火车上", "在海边", "在办公室", "去超市", "在山上"]
WHAT = [
    "看了一本很长的书",
    "做了一顿好吃的饭",
    "跑了五公里",
    "拍了很多照片",
    "听了一场音乐会",
    "学会了弹吉他",
    "丢了一把雨伞",
]
FEELING = [
    "，心情特别好",
    "，有点累",
    "，笑死我了",
    "，真的没想到",
    "，以后还想再来",
    "，大家都很开心",
    "，可惜天气太冷",
]
TAIL = ["！！！", "。", "呵呵", " [doge]", " https://t.cn/abc", "…", "～", " @小红"]


def make(directory: Path, seed: int = 0) -> None:
    """Writes everything below `directory`; equal seeds give equal files."""
    rng = random.Random(seed)
    english = sorted(text for text in pydoc_data.topics.topics.values() if 1500 < len(text) < 9000)
    rng.shuffle(english)
    chinese = [_post(rng) for _ in range(400)]
    _texts(directory, english, chinese)
    _questions(directory, rng, chinese)
    _corpora(directory / "DATA", rng, english, chinese)


def _post(rng: random.Random) -> str:
    sentences = ("".join(rng.choice(part) for part in (WHEN, WHO, WHERE, WHAT, FEELING, TAIL)) for _ in range(3))
    return "".join(sentences)


def _texts(directory: Path, english: Sequence[str], chinese: Sequence[str]) -> None:
    _write(directory / "FILE", CONFIG)
    _write(directory / "keys.txt", "a-key-of-the-reader\n")
    (directory / "keys.txt").chmod(0o600)
    _write(directory / "input.txt", "\n".join(english[:10]))
    _write(directory / "outputs/answers.txt", "The cat sat on the mat.\nIt rained all day.\n")
    _write(directory / "references.txt", "The cat sat on a mat.\nIt rained the whole day.\n")
    # So many that a split has documents enough to draw them for an interval.
    pieces = [text[i : i + 600] for text in sorted(pydoc_data.topics.topics.values()) for i in range(0, len(text), 600)]
    for number, text in enumerate(pieces[:700]):
        _write(directory / f"books/{number:03}.txt", text)
    for number, text in enumerate(english[:40]):
        _write(directory / f"wikitext/{number:02}.txt", text[:500])
        paragraphs = "".join(f"<p>{' '.join(part.split())}</p>" for part in text.split("\n\n") if len(part) > 80)
        _write(
            directory / f"pages/part{number % 3}/{number}.html", PAGE.format(title=text.split("\n")[0], text=paragraphs)
        )
    posts = [{"user": "小明", "time": f"2023-05-01 10:{i % 60:02}", "text": text} for i, text in enumerate(chinese)]
    _json(directory / "weibo.json", posts)


def _questions(directory: Path, rng: random.Random, chinese: Sequence[str]) -> None:
    sums = [(rng.randrange(50), rng.randrange(50)) for _ in range(200)]
    asked = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in sums]
    _lines(
        directory / "dialogues.jsonl",
        ({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in asked),
    )
    _lines(
        directory / "pairs.jsonl",
        ({"prompt": q, "chosen": a, "rejected": "I do not know."} for q, a in asked),
    )
    _lines(
        directory / "questions.jsonl",
        ({"prompt": q, "references": [a, a.split()[-1]]} for q, a in asked[:60]),
    )
    _lines(
        directory / "gsm8k_train.jsonl",
        ({"question": f"{a} apples and {b} more?", "answer": f"{a} + {b}\n#### {a + b}"} for a, b in sums),
    )
    _lines(directory / "prompts.jsonl", ({"prompt": text} for text in ("Once upon a time", "The with statement")))
    _lines(
        directory / "copa.jsonl",
        ({"query": q, "choices": [a, "No."], "gold": 0} for q, a in asked[:8]),
    )
    _lines(
        directory / "hellaswag_val.jsonl",
        (
            {"activity_label": "Sums", "ctx_a": q, "ctx_b": "it", "endings": [a, "No."], "label": "0"}
            for q, a in asked[:8]
        ),
    )
    _json(
        directory / "chat.json", [{"instruction": f"说说{text[:6]}", "input": "", "output": text} for text in chinese]
    )


def _corpora(data: Path, rng: random.Random, english: Sequence[str], chinese: Sequence[str]) -> None:
    """Corpora in the formats of the data sets that configs/README.md and experiments/README.md name."""
    for part in range(2):
        poems = [{"author": "佚名", "title": "诗", "paragraphs": text.split("。")} for text in chinese[part::2]]
        _json(data / f"chinese/poetry/poet.tang.{part}.json", poems)
    dialogues = [
        {"name": "电影", "messages": [{"message": part} for part in chinese[i : i + 4]]} for i in range(0, 400, 4)
    ]
    _json(data / "chat/kdconv/film_dev.json", dialogues)
    _json(
        data / "chat/oaast_sft_zh.json",
        [
            {"instruction": a, "input": "", "output": b, "history": [[f"{a[:9]}？", "你好！"]]}
            for a, b in _pairs(chinese)
        ],
    )
    turns = "".join(f"- - {json.dumps(a)}\n  - {json.dumps(b)}\n" for a, b in _pairs(chinese))
    _write(data / "chat/chatterbot/chinese/talk.yml", f"categories:\n- talk\nconversations:\n{turns}- - alone\n")
    _write(data / "text/wiki_demo.txt", "\n\n".join(english[:10]))
    (data / "eval").mkdir()
    (data / "eval/gsm8k_train.jsonl.gz").write_bytes(gzip.compress((data.parent / "gsm8k_train.jsonl").read_bytes()))
    (data / "e2e/metrics_example").mkdir(parents=True)
    _write(data / "e2e/metrics_example/baseline-output.txt", "The Mill is nice.\nThe Vaults is cheap.\n")
    _write(
        data / "e2e/metrics_example/devel-conc.txt",
        "The Mill is very nice.\nThe Mill is good.\n\nThe Vaults is not expensive.\nThe Vaults is cheap.\n\n",
    )
    names = [f"name[The {name}], area[{area}]" for name in ("Mill", "Vaults", "Plough") for area in range(40)]
    rows = [(mr, f"{mr[5:].partition(']')[0]} is {rng.choice(('nice', 'cheap', 'good'))}.") for mr in names * 2]
    with gzip.open(data / "e2e/trainset.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])
    with (data / "e2e/testset_w_refs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows[:20]])
    _catalogue(data / "tfds", "\n".join(english[:6]))


def _pairs(texts: Sequence[str]) -> Iterable[tuple[str, str]]:
    return zip(texts[::2], texts[1::2], strict=True)


def _catalogue(directory: Path, text: str) -> None:
    """tiny_shakespeare as TFDS has it: one example in each split."""
    import tensorflow_datasets as tfds

    class TinyShakespeare(tfds.core.GeneratorBasedBuilder):
        __module__ = "__main__"  # in a package, TFDS would look for checksums beside it
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, _):
            return {split: [(0, {"text": text})] for split in ("train", "validation", "test")}

        def _generate_examples(self):
            raise NotImplementedError

    TinyShakespeare(data_dir=directory, file_format="array_record").download_and_prepare()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, ensure_ascii=False))


def _lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
