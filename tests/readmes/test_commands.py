"""Every command and every line of Python in the READMEs is run, in the order in which a reader comes to them.

`needed.py` makes what the commands read, `reader.py` runs them. The words of a command stay as they are; what follows
them here makes models tiny and runs short (`shortened`).
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import needed

REPOSITORY = Path(__file__).parents[2]
READMES = (
    "README.md",
    "README.zh.md",
    "configs/README.md",
    "experiments/README.md",
    "tools/README.md",
    "tests/README.md",
)
PROGRAMS = ("gptjax", "python", "make", "srun", "cat", "curl")

SHARED = os.environ.get("GPTJAX_SHARED_DATA")  # with the example of E2E, whose scores are compared to the digit

# Beginnings of commands that cannot run in a test, and why.
NOT_RUN = {
    "make quickstart": "trains for five minutes; its commands are tested one by one",
    "make test": "would run this test",
    "make chat-quickstart": "trains for seven minutes; tests/test_chat_quickstart.py",
    "srun ": "needs Slurm; tests/test_slurm.py",
    "gptjax plan --setup": "installs the TPU's compiler; tests/test_plan.py",
    "gptjax plan --config=configs/gpt2_1558m.py --topology=v6e:4x4": "needs the TPU's compiler; tests/test_plan.py",
    "gptjax plan --config=configs/gpt2_355m.py --topology=v5e:4x4": "needs the TPU's compiler; tests/test_plan.py",
    "gptjax train --config=FILE --workdir=/shared/runs/a --coordinator": "two machines; processes/test_distributed.py",
    "python tools/bench_decode.py": "minutes on a model of 124M parameters",
    "python tools/bench_serve_peer.py": "minutes, beside the server of transformers",
    "python tools/bench_lora.py": "minutes on a model of 124M parameters",
}
# Beginnings of what needs a program that `make setup` does not install: whether it is there, and which it is.
IF_INSTALLED = {
    "from openai": (importlib.util.find_spec("openai") is not None, "openai, of the extra `oracles`"),
    "curl ": (shutil.which("curl") is not None, "curl"),
}
# Beginnings of what is in a block and is no command, Python or output of the command before it.
NO_COMMAND = {
    '[{"user": "小明"': "a record of the data",
    "location / {": "for nginx",
    "2,558,016 parameters": "what make quickstart prints",
    "failed: process 1 (host n1) of 2": "needs two machines",
}
# What a reader has made before, or has another way: copies of what `ready` makes.
THERE = {
    "README.md": {
        "runs/a": "text", "runs/b": "other", "models/mine": "hf", "models/large": "hf_chat", "models/gpt2": "gpt2",
    },
    "README.zh.md": {"models/gpt2-chinese": "chinese"},
    "configs/README.md": {"runs/quickstart": "quickstart", "models/gpt2": "gpt2"},
    "experiments/README.md": {
        "runs/a": "text", "runs/b": "other", "runs/mine": "text", "runs/other": "other", "runs/dialogue": "chat",
        "runs/reward": "reward",
    },
    "tools/README.md": {
        "runs/mine": "text", "runs/large": "text", "runs/small": "other", "runs/dialogue": "chat", "runs/base": "text",
        "runs/lora_a": "lora", "runs/lora_b": "lora", "models/gpt2": "gpt2",
    },
    "tests/README.md": {},
}  # fmt: skip
# gpt2 stands for the name on the hub.
READ = """
FILE DATA configs experiments tools books wikitext pages outputs input.txt keys.txt references.txt weibo.json chat.json
dialogues.jsonl pairs.jsonl questions.jsonl prompts.jsonl gsm8k_train.jsonl copa.jsonl hellaswag_val.jsonl
"""
SERVICE = {"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1", "SM_CHANNEL_TRAINING": "books", "SM_MODEL_DIR": "job"}
TINY = ["num_layers=1", "num_heads=2", "num_kv_heads=0", "head_dim=0", "embed_dim=16", "mlp_dim=0", "context_length=64"]
BRIEF = ["batch_size=4", "accumulation=1"]


def blocks(path: Path) -> list[list[str]]:
    """The lines of each indented block, with continued lines joined."""
    found, lines = [], path.read_text("utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    ") and line.strip():
            if not before.startswith("    "):
                found.append([])
            found[-1].append(line[4:])
    return [re.sub(r"\\\n\s*", "", "\n".join(block)).splitlines() for block in found]


def is_python(line: str) -> bool:
    try:
        ast.parse(line)
    except SyntaxError:
        return False
    return "(" in line or line.startswith(("import ", "from "))


def typed(readme: str) -> list[dict[str, Any]]:
    """The things to type in it, and `promised`, the lines below a command that are shown as its output."""
    items: list[dict[str, Any]] = []
    for block in blocks(REPOSITORY / readme):
        begun = len(items)
        for number, line in enumerate(block):
            if any(line.startswith(beginning) for beginning in NO_COMMAND):
                assert number == 0, f"{readme}: {line}"
                break
            if line.split()[0] in PROGRAMS:
                items.append({"text": line, "promised": []})
            elif is_python(line):
                if len(items) > begun and items[-1].get("kind") == "python":
                    items[-1]["text"] += f"\n{line}"
                else:
                    items.append({"kind": "python", "text": line, "promised": []})
            else:
                assert len(items) > begun, f"{readme}: neither a command nor Python nor the output of one: {line}"
                items[-1]["promised"].append(line)
    left_out = [*NOT_RUN, *(beginning for beginning, (there, _) in IF_INSTALLED.items() if not there)]
    return [item for item in items if not item["text"].startswith(tuple(left_out))]


def shortened(verb: str, words: list[str]) -> list[str]:
    """The flags that are appended to a command so that it takes a second."""
    given = dict(word.lstrip("-").partition("=")[::2] for word in words)
    steps = max(2, int(given.get("config.train.num_steps", "400").split()[0].replace("5", "500")[:3]) // 100)
    config = [f"--config.train.{setting}" for setting in BRIEF] + [
        f"--config.train.num_steps={steps}",
        "--config.schedule.warmup=1",
    ]
    begun = "config.init_from" in given or given.get("config") == "configs/finetune_gpt2.py"
    config += [] if begun else [f"--config.model.{setting}" for setting in TINY]
    config += ["--config.objective.max_new_tokens=8", "--config.objective.group_size=2"]
    config += ["--config.evaluation.max_tokens=2000", "--config.logging.samples=0", "--config.evaluation.every=50%"]
    if verb == "train":
        return [] if "describe" in given else config
    if verb == "plan":
        return config
    if verb == "evaluate":
        return ["--max_new_tokens=8", "--max_prompts=4"] if "workdir" in given else []
    if verb in ("generate", "chat"):
        return ["--max_new_tokens=8"]
    if verb == "serve":
        return ["--port=0", "--nowarm_up", "--slots=2"]
    if verb == "launch":
        return [] if "dry_run" in given else ["--dry_run"]
    if verb == "ablate" and "search" in given:
        return ["--search.trials=2", "--workers=1", *config]
    if verb == "ablate" and "coordinates" in given:
        return ["--widths=1,2", "--steps=2", "--seeds=1", *config]
    if verb == "ablate" and "reproduce" in given:
        return ["--steps=2"]
    if verb == "ablate" and "study" in given:
        tiny = [f"--study.base.model.{setting}" for setting in TINY] + ["--study.base.train.num_steps=2"]
        tiny += ["--study.base.data.source=text:books/*.txt"]
        return ["--study.seeds=2", "--pack=on", *tiny] + (["--dry_run"] if "launcher" in given else [])
    return []


def run_by_reader(items: list[dict[str, Any]], directory: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The items with their results."""
    (directory / "typed.json").write_text(json.dumps(items))
    command = [sys.executable, str(Path(__file__).parent / "reader.py"), "typed.json", "results.jsonl"]
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    results = directory / "results.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    assert ended.returncode == 0, f"{found[-1:]}\n{ended.stdout}{ended.stderr}"
    return found


def item(text: str) -> dict[str, Any]:
    """The thing to do for a command of a README."""
    words = shlex.split(text, comments=True)
    if words[0] != "gptjax":
        added = {
            "tools/abuse_serve.py": ["--clients=4", "--seconds=1"],
            "tools/bench_serve.py": ["--clients=2", "--seconds=1"],
        }
        return {"kind": "shell", "text": text, "words": words + added.get(words[1], [])}
    verb, words = words[1], words[1:]
    if "..." in words:  # the reader's own
        words[words.index("...") : words.index("...") + 1] = ["--config=configs/quickstart.py", "--workdir=runs/lora"]
    words = [word.replace("/shared/", "shared/") for word in words]
    end = words.index("--") if "--" in words else len(words)  # what follows is of another verb
    words[end:end] = shortened(verb, words[:end])
    service = SERVICE if words[:2] == ["launch", "managed"] else {}
    return {"kind": "serve" if verb == "serve" else "gptjax", "text": text, "words": words, "environment": service}


def with_clients(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Commands that name the address of a server run while the last server before them is running."""
    found: list[dict[str, Any]] = []
    for each in items:
        if "127.0.0.1:8000" in each["text"] and each["kind"] != "serve":
            server = next(one for one in reversed(found) if one["kind"] == "serve")
            server["clients"].append(each)
        else:
            found.append({**each, "clients": []} if each["kind"] == "serve" else each)
    return found


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment of a reader with two cores; compiled programs are shared."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "NO_PROXY": "*"}
    found["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return found


@pytest.fixture(scope="module")
def ready(tmp_path_factory, environment) -> Path:
    """The inputs of commands, and the models and runs that READMEs assume to exist."""
    directory = tmp_path_factory.mktemp("ready")
    needed.make(directory)
    for name in ("configs", "experiments", "tools"):
        (directory / name).symlink_to(REPOSITORY / name)
    if SHARED:
        shutil.rmtree(directory / "DATA/e2e/metrics_example")
        shutil.copytree(Path(SHARED) / "e2e/metrics_example", directory / "DATA/e2e/metrics_example")
    letters = "".join(chr(code) for code in range(0x4E00, 0x4F00))
    (directory / "bert").mkdir()
    (directory / "bert/vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"。，的我是", *letters])
    )
    (directory / "bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    gpt2 = [
        "positions=learned",
        "norm=layernorm",
        "activation=gelu_tanh",
        "use_bias=true",
        "qk_norm=false",
        "tie_embeddings=true",
    ]
    gpt2 = " ".join(f"--config.model.{setting}" for setting in gpt2)
    qwen = "--config.model.activation=swiglu"
    text, train = "--config.data.source='text:books/*.txt'", "gptjax train --config=configs/quickstart.py"
    commands = [
        f"{train} --workdir=text {text} --config.seed=0 {qwen}",
        f"{train} --workdir=other {text} --config.seed=1 {qwen}",
        f"{train} --workdir=quickstart",
        f"{train} --workdir=lora --config.init_from=text --config.model.lora_rank=8 {text}",
        "gptjax prepare --source=messages:dialogues.jsonl --cleaning=dialogue --output=stores/dialogues",
        f"gptjax train --config=configs/dialogue.py --workdir=chat {qwen}",
        f"{train} --workdir=reward --config.init_from=chat --config.objective.name=reward_model "
        "--config.data.source=preference:pairs.jsonl",
        f"{train} --workdir=gpt2_run {text} {gpt2}",
        f"{train} --workdir=chinese_run --config.data.source='jsonl:weibo.json#text' --config.tokenizer=hf:bert {gpt2}",
        "gptjax convert --from=text --to=hf:hf",
        "gptjax convert --from=chat --to=hf:hf_chat",
        "gptjax convert --from=gpt2_run --to=hf:gpt2",
        "gptjax convert --from=chinese_run --to=hf:chinese",
    ]
    results = run_by_reader([item(command) for command in commands], directory, environment)
    failed = [result for result in results if result["status"]]
    assert not failed, told(failed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "chinese" / name).unlink(missing_ok=True)
    for path in (directory / "bert").iterdir():
        shutil.copy(path, directory / "chinese")
    shutil.rmtree(directory / "stores")
    return directory


def told(results: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"$ {result['text']}\nexit status {result['status']}\n{result['output']}" for result in results)


def words_of(line: str) -> str:
    """A line up to its second number, with single spaces: the part that does not depend on the model's size."""
    return " ".join("#".join(re.split(r"[\d.]+", line)[:2]).split())


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES)
def test_a_reader_gets_what_is_promised(readme, ready, environment, tmp_path):
    for name in ("gpt2", *READ.split()):
        (tmp_path / name).symlink_to(ready / name)
    for name, source in THERE[readme].items():
        shutil.copytree(ready / source, tmp_path / name)
    items = [
        {**(each if "kind" in each else item(each["text"])), "promised": each["promised"]} for each in typed(readme)
    ]
    results = run_by_reader(with_clients(items), tmp_path, environment) if items else []
    failed = [result for result in results if result["status"]]
    assert not failed, told(failed)
    assert len(results) == len(items)
    for result in results:
        exact = SHARED and "e2e/metrics_example" in result["text"]
        printed = result["output"] if exact else " ".join(re.sub(r"[\d.]+", "#", result["output"]).split())
        missing = [line for line in result["promised"] if (line if exact else words_of(line)) not in printed]
        assert not missing, f"{missing}\n{told([result])}"


def test_what_is_not_run_is_in_a_readme():
    lines = [line for readme in READMES for block in blocks(REPOSITORY / readme) for line in block]
    gone = [text for text in (*NOT_RUN, *NO_COMMAND, *IF_INSTALLED) if not any(line.startswith(text) for line in lines)]
    assert not gone
