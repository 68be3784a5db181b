"""The convert verb: a model is imported, generates, and is exported again."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptjax import cli, config, convert, generate
from gptjax.artifacts import loading
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.generation import flags as sampling_flags
from gptjax.generation.completion import Generator
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import weights as huggingface


@pytest.fixture
def directory(tmp_path):
    """A small GPT-2 with random weights and a byte tokenizer."""
    model = config.get_default().model
    model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=32, vocab_multiple=1, init_std=0.5)
    model.update(norm="layernorm", positions="learned", activation="gelu_tanh", qk_norm=False, use_bias=True)
    architecture = Architecture.from_config(model, 257)
    huggingface.write_directory(
        tmp_path / "in", architecture, gpt.initialise(architecture, jax.random.key(0)), eot_id=256
    )
    build_tokenizer("byte").save(tmp_path / "in" / "tokenizer.json")
    return tmp_path / "in"


def test_in_and_out_again(directory, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={run}"]) == 0
    options = ["--prompt=abc", "--temperature=0", "--max_new_tokens=8", "--ignore_eos"]
    assert cli.run(generate.main, ["generate", f"--workdir={run}", *options]) == 0
    assert cli.run(convert.main, ["convert", f"--from={run}", f"--to=hf:{out}"]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (directory, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    assert (out / "tokenizer.json").exists()


def test_a_key_that_nobody_knows_is_told_once(directory, capsys):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_key_of_next_year": 3}))
    assert cli.run(generate.main, ["generate", f"--workdir=hf:{directory}", "--prompt=a", "--max_new_tokens=1"]) == 0
    told = capsys.readouterr().err
    assert told.count("a_key_of_next_year") == told.count("warning: ") == 1


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("writer", ["os.fsync", "safetensors.numpy.save_file"])
def test_a_disk_that_does_not_keep_what_is_written(directory, tmp_path, capsys, monkeypatch, writer, code):
    command = ["convert", f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}"]
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={tmp_path / 'run'}"]) == 0
    capsys.readouterr()

    def write(*arguments, **options):
        if writer == "os.fsync":
            raise OSError(code, os.strerror(code))
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    with monkeypatch.context() as patch:
        patch.setattr(writer, write)
        assert cli.run(convert.main, command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"failed: {tmp_path}/out") and line.endswith("; the same command then goes on")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "run"}
    assert cli.run(convert.main, command) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from=hf:a"], "--to is missing"),
        (["--from=hf:a", "--to=hf:b"], "one of them must be a work directory"),
        (["--from=hf:./absent", "--to=new"], "hf:./absent: there is no such directory"),
    ],
)
def test_a_wrong_request(options, message, capsys):
    assert cli.run(convert.main, ["convert", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_exists_is_kept(directory, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={tmp_path / 'run'}"]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_a_model_was_published_with_is_kept(directory, tmp_path):
    """End tokens, sampling settings and begin tokens, imported and exported again."""
    published = {"eos_token_id": [256, 97], "do_sample": True, "temperature": 0.25, "top_k": 7}
    (directory / "generation_config.json").write_text(json.dumps(published))
    tokenizer = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={run}"]) == 0
    trained = loading.load(run)
    assert trained.tokenizer.prefix == (256,)
    expected = {"eos_token_ids": [256, 97], "temperature": 0.25, "top_k": 7, "begin_token_ids": [256]}
    assert trained.generation == expected
    generator = Generator.from_trained(trained)
    assert generator.end_ids == (256, 97) and generator.begin_ids == (256,)
    assert cli.run(convert.main, ["convert", f"--from={run}", f"--to=hf:{out}"]) == 0
    written = json.loads((out / "generation_config.json").read_text())
    assert written.items() >= published.items()


def test_a_chat_model_begins_with_its_template(directory, tmp_path):
    tokenizer = tokenizer_files.read_tokenizer(directory)
    tokenizer = ChatTemplate().prepare_tokenizer(tokenizer)
    model = config.get_default().model
    model.update(huggingface.read_config(directory), vocab_size=tokenizer.vocab_size)
    architecture = Architecture.from_config(model, 0)
    params = gpt.initialise(architecture, jax.random.key(0))
    huggingface.write_directory(tmp_path / "chat", architecture, params, eot_id=tokenizer.eot_id)
    tokenizer_files.write(tmp_path / "chat", tokenizer, ChatTemplate(), context_length=32)
    assert cli.run(convert.main, ["convert", f"--from=hf:{tmp_path / 'chat'}", f"--to={tmp_path / 'run'}"]) == 0
    generator = Generator.from_trained(loading.load(tmp_path / "run"))
    assert generator.template.jinja is None and generator.begin_ids == ()
    assert generator.end_ids == (256, tokenizer.special_tokens["<|im_end|>"])


def test_a_chat_template_that_cannot_be_used_is_left_out(directory, tmp_path, capsys):
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={tmp_path / 'run'}"]) == 0
    assert "the chat template is left out: the chat template does not end" in capsys.readouterr().err
    assert loading.load(tmp_path / "run").template is None


def test_flags_go_before_what_a_model_was_published_with():
    values = flags.FlagValues()
    sampling_flags.define(values)
    values(["generate", "--top_k=3"])
    params = sampling_flags.read(values)
    generation = {"temperature": 0.25, "top_k": 7, "eos_token_ids": [1]}
    params = sampling_flags.with_published(values, params, generation)
    assert (params.temperature, params.top_k) == (0.25, 3)


def test_pickle_files_need_to_be_asked_for(directory, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({name: torch.tensor(value) for name, value in weights.items()}, directory / "pytorch_model.bin")
    arguments = ["convert", f"--from=hf:{directory}", f"--to={tmp_path / 'run'}"]
    assert cli.run(convert.main, arguments) == 2
    assert "add --allow_pickle to `convert`" in capsys.readouterr().err
    assert cli.run(convert.main, [*arguments, "--allow_pickle"]) == 0


CHINESE = [
    "床前明月光,疑是地上霜。",
    "今天天气很好,我们去公园散步吧!",
    "学而时习之,不亦说乎?\n\n中文 and English 2024 混排。",
]


def write_qwen2_tokenizer(directory):
    """A byte-level BPE as Qwen2's: NFC, digits one by one, no beginning of a text."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CHINESE * 5, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))


def write_mistral_tokenizer(directory):
    """A BPE as Mistral's: spaces are a letter, unknown characters are bytes, and a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CHINESE * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are tokens like others
    (directory / "tokenizer.json").write_text(json.dumps(content))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("write_tokenizer", "options", "end"),
    [
        (write_qwen2_tokenizer, {"qkv_bias": True}, "<|im_end|>"),
        (write_mistral_tokenizer, {"sliding_window": 8, "tie_embeddings": False}, "</s>"),
    ],
)
def test_chinese_goes_through_the_tokenizer_of_a_model(write_tokenizer, options, end, tmp_path):
    model = config.get_default().model
    model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=32, vocab_multiple=1, vocab_size=400)
    model.update(activation="swiglu", qk_norm=False, **options)
    architecture = Architecture.from_config(model, 0)  # rows that the tokenizer does not use, as Qwen2 has
    params = gpt.initialise(architecture, jax.random.key(0))
    huggingface.write_directory(tmp_path / "in", architecture, params, eot_id=None)
    write_tokenizer(tmp_path / "in")
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.run(convert.main, ["convert", f"--from=hf:{tmp_path / 'in'}", f"--to={run}"]) == 0
    assert cli.run(convert.main, ["convert", f"--from={run}", f"--to=hf:{out}"]) == 0
    trained = loading.load(run)
    assert trained.architecture.vocab_size == 400 and trained.tokenizer.eot_token == end
    again = tokenizer_files.read_tokenizer(out)
    texts = [*CHINESE, "生僻字龘靐 never seen \U0001f600"]
    ids = [list(map(int, trained.tokenizer.encode(text))) for text in texts]
    assert [trained.tokenizer.decode(row) for row in ids] == texts
    assert [list(again.encode(text)) for text in texts] == ids
    transformers = pytest.importorskip("transformers")
    for place in (tmp_path / "in", out):
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        assert [theirs.encode(text, add_special_tokens=False) for text in texts] == ids


def convert_to(source, target, *options):
    return cli.run(convert.main, ["convert", f"--from={source}", f"--to={target}", *options])


def test_a_finished_result_of_the_same_inputs_is_a_success(directory, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert_to(f"hf:{directory}", run) == 0
    assert convert_to(f"hf:{directory}", run) == 0
    assert "finished result of this conversion" in capsys.readouterr().out
    assert convert_to(run, f"hf:{out}") == 0 and convert_to(run, f"hf:{out}") == 0
    assert convert_to(run, f"hf:{out}", "--dtype=bfloat16") == 2
    assert "was converted from something else (options differ)" in capsys.readouterr().err
    (out / "tokenizer.json").unlink()
    assert convert_to(run, f"hf:{out}") == 2
    assert "tokenizer.json was changed or removed" in capsys.readouterr().err


def test_a_killed_conversion_leaves_nothing_that_imports_and_starts_again(directory, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    run, out = tmp_path / "run", tmp_path / "out"
    assert convert_to(f"hf:{directory}", run) == 0
    with monkeypatch.context() as context:  # as a kill does: nothing is cleaned up
        context.setattr("gptjax.files.shutil.rmtree", lambda *_, **__: None)
        context.setattr("gptjax.files.os.getpid", lambda: 2**22 + 1)  # of no process
        context.setattr("gptjax.model.huggingface.files.write_generation_config", kill)
        with pytest.raises(Killed):
            convert.export_model(run, "best", out, dtype="float32", max_shard_bytes=10**9)
    assert not out.exists() and list(tmp_path.glob(".out.*.partial"))
    assert convert_to(run, f"hf:{out}") == 0
    assert not list(tmp_path.glob(".*.partial")) and (out / "generation_config.json").exists()


@pytest.mark.parametrize("kind", ["file", "other", "device"])
def test_what_is_in_the_place_is_never_touched(kind, directory, tmp_path, capsys):
    place = tmp_path / "run"
    if kind == "file":
        place.write_text("x")
    elif kind == "other":
        place.mkdir()
        (place / "conversion.json").write_text("{}")
    else:
        place.symlink_to("/dev/null")
    assert convert_to(f"hf:{directory}", place) == 2
    assert "exists" in capsys.readouterr().err
    assert place.is_dir() or place.is_symlink() or place.read_text() == "x"


def test_prompts_begin_as_the_tokenizer_says(directory, tmp_path):
    """transformers puts nothing before a prompt of GPT-2; a flag does."""
    assert convert_to(f"hf:{directory}", tmp_path / "plain") == 0
    assert convert_to(f"hf:{directory}", tmp_path / "begun", "--add_bos_token=true") == 0
    assert Generator.from_trained(loading.load(tmp_path / "plain")).begin_ids == ()
    assert Generator.from_trained(loading.load(tmp_path / "begun")).begin_ids == (256,)


def test_what_came_without_sampling_goes_out_without(directory, tmp_path):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "repetition_penalty": 1.5}))
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert_to(f"hf:{directory}", run) == 0 and convert_to(run, f"hf:{out}") == 0
    written = json.loads((out / "generation_config.json").read_text())
    assert (written["do_sample"], written["repetition_penalty"]) == (False, 1.5)
    assert "temperature" not in written


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"n_layer": 10**12}, "n_layer is 1000000000000, but must be at most 10000"),
        ("config.json", {"n_positions": -5}, "n_positions is -5, but must be at least 1"),
        ("config.json", {"n_embd": "x"}, 'n_embd is "x", but must be a whole number'),
        ("config.json", {"n_head": 3}, "not divisible by model.num_heads 3"),
        ("config.json", {"eos_token_id": 9_000_000}, "eos_token_id is 9000000, and the model has only 257 tokens"),
        ("config.json", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("generation_config.json", {"temperature": -1}, "temperature is -1, but must be at least 0"),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "weight_map.a is 5, but must be text"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../a"}}, "is not the name of a file beside it"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x", "b": "y"}}, "0 of 2 files of weights are there"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(file, change, message, directory, tmp_path, capsys):
    path = directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | change))
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and len(error) < 1000
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*.partial"))


def test_gpt2s_own_end_in_the_config_of_a_smaller_vocabulary_is_left_out(directory, tmp_path, capsys):
    config_json = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config_json | {"eos_token_id": 50256}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 0
    assert "eos_token_id 50256 is GPT-2's" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused(directory, tmp_path, capsys):
    weights = load_file(directory / "model.safetensors")
    weights["transformer.wpe.weight"][1] = np.nan
    save_file(weights, directory / "model.safetensors")
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 2
    assert "wpe.weight has 16 of 512 NaN or infinite values" in capsys.readouterr().err


def test_a_tied_model_that_holds_only_its_head(directory, tmp_path, capsys):
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    save_file({f"_orig_mod.{name}": value for name, value in weights.items()}, directory / "model.safetensors")
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 0
    table = loading.load(tmp_path / "run").params["embedding"]["embedding"]
    np.testing.assert_array_equal(np.asarray(table)[:257], weights["lm_head.weight"])
    weights["transformer.wte.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, directory / "model.safetensors")
    assert convert_to(f"hf:{directory}", tmp_path / "other") == 2
    assert "lm_head.weight differs from wte.weight" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", ["net.", "base_model.model.", "module._orig_mod."])
def test_names_of_another_class_are_taken(wrapper, directory, tmp_path):
    weights = load_file(directory / "model.safetensors")
    save_file({wrapper + name: value for name, value in weights.items()}, directory / "model.safetensors")
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 0
    table = loading.load(tmp_path / "run").params["embedding"]["embedding"]
    np.testing.assert_array_equal(np.asarray(table)[:257], weights["transformer.wte.weight"])


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.safetensors", "tf_model.h5"])
def test_weights_under_another_name_are_named(name, directory, tmp_path, capsys):
    (directory / "model.safetensors").rename(directory / name)
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 2
    assert f"model.safetensors is missing; there is {name}, which is not read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_git_left_in_the_place_of_a_large_file_is_named(name, directory, tmp_path, capsys):
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 2
    assert f"{name} is a Git LFS pointer, not the file itself" in capsys.readouterr().err


def test_a_file_is_no_directory_of_a_model(directory, tmp_path, capsys):
    (directory / "ckpt.pt").write_bytes(b"x")
    assert convert_to(f"hf:{directory}/ckpt.pt", tmp_path / "run") == 2
    assert "ckpt.pt is a file; name the directory of a model; a checkpoint of nanoGPT" in capsys.readouterr().err


def test_what_a_config_asks_for_is_shown_in_its_own_words(directory, tmp_path, capsys):
    config_json = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config_json | {"scale_attn_weights": False}))
    assert convert_to(f"hf:{directory}", tmp_path / "run") == 2
    assert "scale_attn_weights is false, which is not supported; only true is" in capsys.readouterr().err
