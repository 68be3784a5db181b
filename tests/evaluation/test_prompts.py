"""Files of prompts, references and outputs."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from gptjax.errors import UserError
from gptjax.evaluation.prompts import oddities, read_hypotheses, read_prompts, read_references


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Q: 猫?", "references": ["a", "b\u2028c"]}\n\n{"prompt": "", "reference": "c"}\r\n',
        encoding="utf-8",
    )
    assert read_prompts(path) == [
        {"prompt": "Q: 猫?", "references": ["a", "b\u2028c"]},
        {"prompt": "", "references": ["c"]},
    ]


def test_rows_of_one_prompt_are_its_references(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text('mr,ref\n"name[A], food[x]",One.\nname[B],Two.\n"name[A], food[x]","Three,\nlong."\n')
    assert read_prompts(f"{path}#mr,ref") == [
        {"prompt": "name[A], food[x]", "references": ["One.", "Three,\nlong."]},
        {"prompt": "name[B]", "references": ["Two."]},
    ]


def test_fields_of_compressed_json_lines(tmp_path):
    with gzip.open(tmp_path / "math.jsonl.gz", "wt") as file:
        file.write('{"question": "1+1?", "answer": "#### 2"}\n')
    assert read_prompts(f"{tmp_path}/math.jsonl.gz#question,answer") == [{"prompt": "1+1?", "references": ["#### 2"]}]


ITEMS = [("name[A], food[x]", "One."), ("猫?", "Three,\nlong."), ("", "None.")]


def write_items(path):
    """A file of `ITEMS` with the columns mr and ref, compressed according to its suffix."""
    form = path.suffixes[0]
    rows = [{"mr": prompt, "ref": reference} for prompt, reference in ITEMS]
    if form == ".parquet":
        table, written = pyarrow.Table.from_pylist(rows), io.BytesIO()
        pyarrow.parquet.write_table(table, written, row_group_size=2)
        data = written.getvalue()
    elif form in (".jsonl", ".json"):
        data = "\n".join(map(json.dumps, rows)).encode() if form == ".jsonl" else json.dumps(rows).encode()
    else:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, ["mr", "ref"], dialect="excel-tab" if form == ".tsv" else "excel")
        table.writeheader()
        table.writerows(rows)
        data = text.getvalue().encode()
    with pyarrow.CompressedOutputStream(path, "zstd") if path.suffix == ".zst" else path.open("wb") as file:
        file.write(data)


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_generate_and_evaluate_read_the_same_prompts(tmp_path, form, suffix):
    path = tmp_path / f"test.{form}{suffix}"
    write_items(path)
    expected = [{"prompt": prompt, "references": [reference]} for prompt, reference in ITEMS]
    assert read_prompts(f"{path}#mr,ref") == expected
    assert read_prompts(f"{path}#mr,ref", references=False) == expected
    assert read_prompts(f"{path}#mr", references=False) == [{"prompt": prompt} for prompt, _ in ITEMS]


def test_prompts_without_references(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "id": 7, "tags": ["x"]}\n{"prompt": "b", "reference": 3}\n')
    assert read_prompts(path, references=False) == [
        {"prompt": "a", "id": 7, "tags": ["x"]},
        {"prompt": "b", "reference": 3},
    ]
    (tmp_path / "prompts.txt").write_text("one\n\n two \r\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt", references=False) == [{"prompt": "one"}, {"prompt": " two "}]
    with pytest.raises(UserError, match=r"prompts.txt has prompts without references"):
        read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl, line 1: it cannot be written as JSON in UTF-8"):
        read_prompts(path, references=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts.jsonl, line 2: not JSON"),
        ("[1]", r'prompts.jsonl, line 2: expected an object such as {"prompt"'),
        ('{"references": ["a"]}', r'prompts.jsonl, line 2: "prompt" must be a text, not null'),
        ('{"question": "a"}', r"fields: 'question'. Name others with FILE#PROMPT,REFERENCE"),
        ('{"prompt": "a"}', r"prompts.jsonl, line 2: no 'references' and no 'reference'; fields: 'prompt'"),
        ('{"prompt": "a", "references": []}', r'prompts.jsonl, line 2: "references" must be a list'),
        ('{"prompt": "a", "references": ["b", 3]}', r'prompts.jsonl, line 2: "references" must be a list'),
        ('{"prompt": "a", "references": ["b"], "reference": "c"}', r"prompts.jsonl, line 2: has both"),
        (
            '{"prompt": "\udcff"}',
            r"prompts.jsonl, line 2: byte 0xff at 12 of the line is not UTF-8; convert the file to UTF-8",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "reference": "b"}\n' + line, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(UserError, match=r"prompts.jsonl cannot be read: there is no such file"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"prompts.jsonl has no prompts"):
        read_prompts(path)
    with pytest.raises(UserError, match=r"after # come two names, FILE#PROMPT,REFERENCE; found 'mr'"):
        read_prompts(f"{path}#mr")
    (tmp_path / "test.csv").write_text("mr,ref\na,b\n")
    with pytest.raises(UserError, match=r"after # come two names, FILE#PROMPT,REFERENCE; found 'a,b,c'"):
        read_prompts(f"{path}#a,b,c", references=False)
    with pytest.raises(UserError, match=r"test.csv, line 2: no text 'text'; fields: 'mr', 'ref'"):
        read_prompts(f"{tmp_path}/test.csv#mr,text")


def test_references_with_blank_lines_between_items(tmp_path):
    (tmp_path / "groups.txt").write_text("a\nb\n\nc\n \n\nd\n\n")
    assert read_references([f"{tmp_path}/groups.txt"]).items == [["a", "b"], ["c"], ["d"]]
    (tmp_path / "lines.txt").write_text("a\r\nb\r\nc\r\n")
    assert read_references([f"{tmp_path}/lines.txt"]).items == [["a"], ["b"], ["c"]]
    (tmp_path / "more.txt").write_text("A\n\nC\n")
    assert read_references([f"{tmp_path}/groups.txt"], 8).items == [
        [line] for line in ("a", "b", "", "c", " ", "", "d", "")
    ]
    both = read_references([f"{tmp_path}/lines.txt", f"{tmp_path}/more.txt"])
    assert both.items == [["a", "A"], ["b", ""], ["c", "C"]]
    (tmp_path / "short.txt").write_text("A\n")
    with pytest.raises(UserError, match=r"short.txt has 1 lines, .*lines.txt has 3; line k of each"):
        read_references([f"{tmp_path}/lines.txt", f"{tmp_path}/short.txt"])


def test_references_in_records_need_no_prompt(tmp_path):
    jsonl, table, text = (tmp_path / name for name in ("r.jsonl", "r.csv", "r.txt"))
    jsonl.write_text('{"references": ["a", "b"]}\n{"reference": "c"}\n')
    table.write_text("mr,ref\nx,A\nx,C\n")
    text.write_text("1\n2\n")
    assert read_references([f"{jsonl}"]).items == [["a", "b"], ["c"]]
    assert read_references([f"{table}#ref"]).items == [["A"], ["C"]]
    assert read_references([f"{table}#mr,ref"]).items == [["A", "C"]]
    several = read_references([f"{jsonl}", f"{text}", f"{table}#ref"])
    assert several.items == [["a", "b", "1", "A"], ["c", "2", "C"]], "records are no lines of text"
    jsonl.write_text('{"answer": "a"}\n')
    with pytest.raises(UserError, match=r"line 1: no 'references' .*fields: 'answer'. Name others with FILE#PROMPT"):
        read_references([f"{jsonl}"])
    jsonl.write_text('{"references": []}\n')
    with pytest.raises(UserError, match=r'r.jsonl, line 1: "references" must be a list of one text or more, not \[\]'):
        read_references([f"{jsonl}"])


def test_another_encoding_is_named_with_what_converts_it(tmp_path):
    for encoding, name in (("utf-16", "UTF-16"), ("gb18030", "GB18030"), ("latin-1", "ENCODING")):
        (tmp_path / "out.txt").write_bytes(("今天天气很好" if "l" not in encoding else "é").encode(encoding))
        with pytest.raises(UserError, match=rf"is not UTF-8; convert the file first: iconv -f {name} -t UTF-8"):
            read_hypotheses(tmp_path / "out.txt")


def test_hypotheses(tmp_path):
    (tmp_path / "out.txt").write_text("one\n\nthree\n")
    assert read_hypotheses(tmp_path / "out.txt") == (["one", "", "three"], None)
    (tmp_path / "out.jsonl").write_text('{"prompt": "p", "references": ["r"], "completion": "c"}\n')
    assert read_hypotheses(tmp_path / "out.jsonl") == (["c"], [["r"]])
    with gzip.open(tmp_path / "out.txt.gz", "wt") as file:
        file.write("one\n\nthree\n")
    assert read_hypotheses(tmp_path / "out.txt.gz") == (["one", "", "three"], None)
    (tmp_path / "out.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(UserError, match=r"line 1: no text completion, hypothesis or prediction; fields: 'text'"):
        read_hypotheses(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text('{"completion": null}\n')
    with pytest.raises(UserError, match=r"line 1: completion is null; fields: 'completion'"):
        read_hypotheses(tmp_path / "out.jsonl")


def test_texts_that_look_equal_and_are_not_are_told():
    composed, apart = "caf\u00e9 \u304c", "cafe\u0301 \u304b\u3099"
    assert oddities([composed, "\u4eca\u5929"]) == []
    (told,) = oddities([composed, apart])
    assert told.startswith("1 of 2 are not in Unicode's composed form (NFC)")
