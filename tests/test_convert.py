"""The convert verb: a model comes in, generates, and goes out again."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from=hf:a"], "--to is missing"),
        (["--from=hf:a", "--to=hf:b"], "exactly one of the two is a work directory"),
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
    """Ends of a text, sampling and the beginning of a text, in and out again."""
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
