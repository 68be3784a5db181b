"""lm-eval's tasks on a checkpoint: its own Hugging Face model is the oracle. Needs lm-eval, torch and transformers."""

import json

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch")

from lm_eval.api.instance import Instance  # noqa: E402

from gptjax import cli, config, convert, evaluate  # noqa: E402
from gptjax.data.tokenization.tokenizer import build_tokenizer  # noqa: E402
from gptjax.model import gpt  # noqa: E402
from gptjax.model.architecture import Architecture  # noqa: E402
from gptjax.model.huggingface import weights as huggingface  # noqa: E402

CONTEXT = 48
TEXTS = [
    "The lamp is on the table.",
    "A much longer text, which does not fit in the context of the model at all, so that its beginning is cut.",
    "Short.",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A GPT-2 with random weights and a byte tokenizer, as transformers reads it."""
    directory = tmp_path_factory.mktemp("model")
    model = config.get_default().model
    model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=CONTEXT, vocab_multiple=1, init_std=0.5)
    model.update(norm="layernorm", positions="learned", activation="gelu_tanh", qk_norm=False, use_bias=True)
    architecture = Architecture.from_config(model, 257)
    params = gpt.initialise(architecture, jax.random.key(0))
    huggingface.write_directory(directory / "hf", architecture, params, eot_id=256)
    build_tokenizer("byte").save(directory / "hf" / "tokenizer.json")
    (directory / "hf" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}'
    )
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}/hf", f"--to={directory}/run"]) == 0
    return directory


@pytest.fixture(scope="module", params=[None, True], ids=["as-the-tokenizer-says", "document"])
def models(directory, request):
    """(ours, lm-eval's own) on the same weights, with lm-eval's default and with a token before each text."""
    from lm_eval.models.huggingface import HFLM

    from gptjax.artifacts import loading
    from gptjax.evaluation.continuations import ContinuationScorer
    from gptjax.evaluation.harness import CheckpointLM
    from gptjax.parallel.mesh import make_mesh

    mesh = make_mesh(config.get_default().mesh, devices=jax.devices()[:1])
    trained = loading.load(directory / "run")
    scorer = ContinuationScorer(trained.architecture, trained.params, mesh, batch_size=4)
    generate = evaluate._generator(trained, mesh)
    begin = trained.tokenizer.begin_ids if request.param else trained.tokenizer.prefix
    ours = CheckpointLM(scorer, trained.tokenizer, lambda *a, **k: generate(*a, **k)[0], begin)
    options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "add_bos_token": request.param}
    theirs = HFLM(pretrained=str(directory / "hf"), **options)
    return ours, theirs


def requests(kind, arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_log_likelihoods(models):
    pairs = [(a, f" {b}") for a in [*TEXTS, "", "with spaces  "] for b in ("yes", "no, never", "猫")]
    ours, theirs = (model.loglikelihood(requests("loglikelihood", pairs)) for model in models)
    np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], rtol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods(models):
    ours, theirs = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS])) for model in models
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_generation(models):
    arguments = [(text, {"until": ["e"], "max_gen_toks": 8, "do_sample": False}) for text in TEXTS]
    arguments.append((TEXTS[0], {"until": [], "max_gen_toks": 12}))
    ours, theirs = (model.generate_until(requests("generate_until", arguments)) for model in models)
    assert ours == [text.rstrip("\ufffd") for text in theirs]  # we leave out half a character at the end


def test_a_task_agrees_with_our_own_multiple_choice(directory, tmp_path):
    rng = np.random.default_rng(0)
    questions = [
        {
            "query": f"Question: {TEXTS[i % 3]} {i}?",
            "choices": [f"choice {n}" for n in rng.integers(0, 9999, 4)],
            "gold": i % 4,
        }
        for i in range(24)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "local.yaml").write_text(
        "task: local_questions\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\n'
        "doc_to_target: gold\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    tasks = f"lm_eval:{tmp_path}/local.yaml,multiple_choice:{tmp_path}/questions.jsonl"
    command = [f"--workdir={directory}/run", f"--tasks={tasks}", f"--output={tmp_path}/results.json"]
    assert cli.run(evaluate.main, ["evaluate", *command]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    ours, theirs = results["multiple_choice:questions"], results["lm_eval:local"]
    assert theirs.keys() == {"acc", "acc_norm"}
    for name, other in (("accuracy", "acc"), ("accuracy_normalized", "acc_norm")):
        assert (ours[name]["value"], ours[name]["ci95"], ours[name]["n"]) == (
            theirs[other]["value"], theirs[other]["ci95"], theirs[other]["n"],
        )  # fmt: skip
