"""The verb: its flags reach what they steer, and what is wrong with a request is named before anything runs."""

import pytest

from gptjax import ablate
from gptjax.studies import local

STUDY = """
from gptjax.config import get_default
from gptjax.studies.study import Study, apply_arg


def get_study(arg=""):
    base = get_default()
    base.tokenizer = "byte"
    base.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    base.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    base.train.update(num_steps=4, batch_size=4)
    base.evaluation.update(every=2, max_tokens=200)
    base.logging.update(every=1, samples=0, tensorboard=False)
    arms = {{"slow": {{"optimizer.learning_rate": 1e-5}}, "fast": {{"optimizer.learning_rate": 1e-2}}}}
    return apply_arg(Study(question="Does a rate matter?", base=base, arms=arms, claims=("fast < slow",), seeds=2), arg)
"""


@pytest.fixture(scope="module")
def study_file(tiny_corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "rates.py"
    path.write_text(STUDY.format(corpus=tiny_corpus))
    return path


@pytest.mark.parametrize(("pack", "jobs"), [("on", [4]), ("off", [1, 1, 1, 1]), ("auto", [1, 1, 1, 1])])
def test_cells_are_packed_as_the_flag_says(study_file, tmp_path, monkeypatch, pack, jobs):
    seen = []
    monkeypatch.setattr(local, "computes_on_cores", lambda: True)
    monkeypatch.setattr(local, "run", lambda jobs, **options: seen.extend(map(len, jobs)))
    with pytest.raises(ablate.RunError, match="4 of 4 cells are missing"):
        ablate.main(["ablate", f"--study={study_file}", f"--workdir={tmp_path}", f"--pack={pack}"])
    assert seen == jobs
