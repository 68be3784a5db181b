"""Models by name: runs, published directories, adapters; each verb with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import chat, cli, convert, evaluate, generate, train
from gptjax.artifacts import models
from gptjax.errors import UserError
from gptjax.model import gpt

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CHARACTERS = "你好吗我是很中国人天地山水的一不在有大小上下，。"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.init_from = "hf:{model}"
    config.data.update(source="text:{corpus}", split_by="position", validation_fraction=0.2)
    config.model.context_length = 32
    config.train.update(num_steps=3, batch_size=8)
    config.evaluation.update(every=3, tasks="perplexity")
    config.logging.update(samples=0, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    """A GPT-2 with the vocabulary of a Chinese BERT, as GPT2-Chinese publishes it: vocab.txt, and no tokenizer.json."""
    directory = tmp_path_factory.mktemp("chinese")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(PIECES), n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.3
    )
    config.bos_token_id, config.eos_token_id, config.tokenizer_class = 2, 3, "BertTokenizer"
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def adapters(chinese, tmp_path_factory):
    """PEFT adapters that change the model's output, and the model with them applied by PEFT."""
    peft = pytest.importorskip("peft")
    directory = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    base = transformers.GPT2LMHeadModel.from_pretrained(chinese)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    model.save_pretrained(directory)
    return directory, model


def logits_of(name, ids, **options):
    trained = models.find(name, **options).load()
    model = gpt.bind(trained.architecture, trained.params)
    positions = jnp.arange(len(ids))[None]
    return np.asarray(jax.jit(lambda x: model.logits(model.hidden(x, positions=positions)[0]))(jnp.asarray(ids)[None]))[
        0
    ]


def test_adapters_name_their_base_or_are_named_beside_it(chinese, adapters, tmp_path):
    directory, model = adapters
    ids = np.arange(5, 25, dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    for found in (logits_of(f"hf:{directory}", ids), logits_of(f"hf:{chinese}", ids, adapter=str(directory))):
        np.testing.assert_allclose(found[:, : len(PIECES)], expected, atol=1e-4)
    assert np.abs(logits_of(f"hf:{chinese}", ids)[:, : len(PIECES)] - expected).max() > 0.1
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    for base, reason in (("/nowhere/base", "/nowhere/base: there is no such directory"), (None, "names no base_model")):
        (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=f"moved/adapter_config.json.*{reason}.*--adapter={moved}"):
            models.find(f"hf:{moved}")
    shutil.copytree(chinese, moved / "base")  # beside the adapters
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    np.testing.assert_allclose(logits_of(f"hf:{moved}", ids)[:, : len(PIECES)], expected, atol=1e-4)


def test_names_that_are_no_model(chinese, tmp_path):
    with pytest.raises(UserError, match="is a Hugging Face directory; write hf:"):
        models.find(str(chinese))
    with pytest.raises(UserError, match="belongs to a published model"):
        models.find(str(tmp_path), adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"config.json is missing"):
        models.find(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="no checkpoint in"):
        models.find(str(tmp_path))


def test_the_verbs_do_the_same_with_a_published_model_as_with_its_conversion(chinese, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("你好吗\n\n我是中国人，很好。\n" * 4, encoding="utf-8")
    assert cli.run(convert.main, ["convert", f"--from=hf:{chinese}", f"--to={tmp_path}/run"]) == 0
    texts, scores = [], []
    for name in (f"hf:{chinese}", f"{tmp_path}/run"):
        capsys.readouterr()
        flags = [f"--workdir={name}", "--prompt=你好", "--max_new_tokens=8", "--temperature=0"]
        assert cli.run(generate.main, ["generate", *flags]) == 0
        assert cli.run(chat.main, ["chat", *flags]) == 0
        texts.append(capsys.readouterr().out)
        output = tmp_path / f"{len(scores)}.json"
        flags = [f"--workdir={name}", "--tasks=perplexity", f"--data=text:{tmp_path}/a.txt", f"--output={output}"]
        assert cli.run(evaluate.main, ["evaluate", *flags]) == 0
        scores.append(json.loads(output.read_text())["results"])
    assert texts[0] == texts[1] and scores[0] == scores[1]
    assert not (chinese / "evaluation").exists() and (tmp_path / "run" / "evaluation").exists()


def test_a_chinese_model_is_read_and_fine_tuned(chinese, tmp_path):
    trained = models.find(f"hf:{chinese}").load()
    theirs = transformers.BertTokenizer(str(chinese / "vocab.txt"))
    text = "你好吗，abc 我是"
    assert trained.tokenizer.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert trained.tokenizer.eot_token == "[SEP]" and trained.generation["eos_token_ids"] == [3]
    (tmp_path / "a.txt").write_text("你好吗，我是中国人。" * 40, encoding="utf-8")
    (tmp_path / "config.py").write_text(CONFIG.format(model=chinese, corpus=tmp_path / "a.txt"))
    arguments = ["train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]
    assert cli.run(train.main, arguments) == 0
    tuned = models.find(str(tmp_path / "run")).load()
    assert tuned.tokenizer.sha256 == trained.tokenizer.sha256
    assert tuned.generation["eos_token_ids"] == [3]


@pytest.mark.slow
def test_a_chinese_model_from_its_files_to_a_chat_and_back(chinese, tmp_path, capfd):
    """Evaluated, fine-tuned on dialogues, used in a chat, and exported for transformers."""
    lines = [f"{a}{b}" for a in CHARACTERS for b in CHARACTERS[:8]]
    dialogues = [[("user", f"{line}？饕"), ("assistant", f"{line[::-1]}。")] for line in lines]
    with (tmp_path / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for turns in dialogues:
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (tmp_path / "a.txt").write_text("你好吗，我是中国人。" * 40, encoding="utf-8")
    measure = ["evaluate", f"--workdir=hf:{chinese}", f"--data=text:{tmp_path}/a.txt", "--tasks=perplexity"]
    assert cli.run(evaluate.main, measure) == 0 and "perplexity" in capfd.readouterr().out

    arguments = [
        "train",
        "--config=configs/dialogue.py",
        f"--workdir={tmp_path}/run",
        f"--config.init_from=hf:{chinese}",
    ]
    arguments += [
        f"--config.data.source=messages:{tmp_path}/dialogues.jsonl",
        f"--config.data.cache_dir={tmp_path}/cache",
    ]
    arguments += [f"--config.{option}" for option in ("model.context_length=48", "train.num_steps=60")]
    assert cli.run(train.main, arguments) == 0
    assert "the vocabulary lacks" in (said := capfd.readouterr().err) and "饕: the model reads [UNK]" in said

    talk = ["chat", f"--workdir={tmp_path}/run", "--prompt=你好？饕", "--temperature=0", "--max_new_tokens=12"]
    assert cli.run(chat.main, talk) == 0
    answer = capfd.readouterr()
    assert answer.out.strip() and "\ufffd" not in answer.out and "lacks ？ 饕:" in answer.err

    assert cli.run(convert.main, ["convert", f"--from={tmp_path}/run", f"--to=hf:{tmp_path}/back"]) == 0
    ours = models.find(str(tmp_path / "run")).load()
    question = [{"role": "user", "content": "你好，abc饕 [SEP]？"}]
    ids = ours.template.encode_prompt(question, ours.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back", split_special_tokens=True)
    plain = question[0]["content"]
    assert theirs.encode(plain, add_special_tokens=False) == ours.tokenizer.encode(plain).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None].long()).logits[0].numpy()
    found = logits_of(str(tmp_path / "run"), ids)[:, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    ends = model.generation_config.eos_token_id
    assert set(ends) == {ours.tokenizer.eot_id, ours.tokenizer.special_tokens[ours.template.end_of_turn]}
