"""Any damage to the files of a small model ends in a result or in an understandable message."""

import json
import shutil

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import cli, config, convert
from gptjax.artifacts import checkpoints
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import adapters
from gptjax.model.huggingface import weights as huggingface

WRONG = (None, True, 0, -1, 10**12, 1.5, float("nan"), "", "x", "x" * 5000, [], [[]], [None], {}, {"a": 1}, "\x00")
PYTHONS = ("Traceback", "NoneType", "object is not", "[Errno", "invalid literal", "bug in gptjax", "'dict'")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with all the files that are read, and an adapter."""
    directory = tmp_path_factory.mktemp("mutations") / "model"
    options = config.get_default().model
    options.update(num_layers=1, num_heads=2, embed_dim=8, context_length=16, vocab_multiple=1, tie_embeddings=False)
    options.update(activation="swiglu", qk_norm=False, lora_rank=2, rope_scaling="llama3", rope_original_length=8)
    a = Architecture.from_config(options, 258)
    params = gpt.initialise(a, jax.random.key(0))
    options.lora_rank = 0
    plain = Architecture.from_config(options, 258)
    huggingface.write_directory(directory, plain, lora.split(params)[1], eot_id=256, max_shard_bytes=4000)
    adapters.write_adapter(directory / "adapter", a, params, base=None)
    tokenizer = build_tokenizer("byte")
    tokenizer.save(directory / "tokenizer.json")
    token = {"content": "<|endoftext|>", "lstrip": False, "special": True, "normalized": False}
    files = {
        "generation_config.json": {"eos_token_id": [256], "do_sample": True, "temperature": 0.5, "top_k": 3},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "added_tokens_decoder": {"256": token},
            "eos_token": token,
            "chat_template": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        },
        "special_tokens_map.json": {"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|endoftext|>"]},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def places(value, path=()):
    yield from [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2] if isinstance(value, list) else ())
    for key, entry in list(entries)[:30]:
        yield from places(entry, (*path, key))


def damage(path, draw):
    data = path.read_bytes()
    if path.suffix == ".json" and draw(st.booleans()):
        content = json.loads(data)
        *parents, last = draw(st.sampled_from(list(places(content))))
        owner = content
        for key in parents:
            owner = owner[key]
        owner[last] = draw(st.sampled_from(WRONG))
        path.write_text(json.dumps(content))
        return
    kind = draw(st.sampled_from(["cut", "flip", "empty", "deep", "lost", "null", "device"]))
    place = draw(st.integers(0, len(data) - 1))
    flipped = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
    written = {"cut": data[:place], "flip": flipped, "empty": b"", "deep": b"[" * 100_000, "null": b"null"}
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "lost":
        path.write_bytes(written[kind])


def test_the_model_is_whole(model, tmp_path):
    assert cli.run(convert.main, ["convert", f"--from=hf:{model}", f"--to={tmp_path / 'run'}"]) == 0


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_ends_in_plain_words(data, model, tmp_path, capsys, monkeypatch):
    def write(directory, *_, **about):
        directory.mkdir(parents=True, exist_ok=True)
        json.dumps([about["generation"], about["tokenizer"].to_str()])
        return directory

    monkeypatch.setattr(checkpoints, "write_parameters", write)  # Orbax is slow and sees nothing of the damage
    work, run = tmp_path / "work", tmp_path / "run"
    for place in (work, run):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, work)
    paths = sorted(path for path in work.rglob("*") if path.is_file())
    damage(data.draw(st.sampled_from(paths), label="file"), data.draw)
    capsys.readouterr()
    status = cli.run(convert.main, ["convert", f"--from=hf:{work}", f"--to={run}", f"--adapter={work / 'adapter'}"])
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1] if error.strip() else ""
    assert status in (0, 1, 2) and (status == 0) == run.exists()
    assert status == 0 or last.startswith(("error: ", "failed: "))
    assert len(last) < 1500 and not any(words in error for words in PYTHONS)
