"""The verb: its flags have their effects, and mistakes in a request are reported before anything runs."""

import json
import sys

import pytest

from gptjax import ablate, cli
from gptjax.studies import local
from gptjax.studies import search as searching

STUDY = """
from gptjax.config import get_default
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg=""):
    base = get_default()
    base.tokenizer = "byte"
    base.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    base.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    base.train.update(num_steps=4, batch_size=4)
    base.evaluation.update(every=2, max_tokens=200)
    base.logging.update(every=1, samples=0, tensorboard=False)
    arms = {{"slow": {{"optimizer.learning_rate": 1e-5}}, "fast": {{"optimizer.learning_rate": 1e-2}}}}
    study = Study(question="Does a rate matter?", base=base, arms=arms, claims=("fast < slow",), seeds=2)
    {change}
    return apply_arg(study, arg)
"""


@pytest.fixture(scope="module")
def study_file(tiny_corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "rates.py"
    path.write_text(STUDY.format(corpus=tiny_corpus, change=""))
    return path


@pytest.fixture
def refused(monkeypatch, capsys):
    """The last line on stderr of a command that is refused with exit status 2, before a cell is run."""
    monkeypatch.setattr(local, "run", lambda jobs, **options: pytest.fail("a cell was run"))

    def run(*flags: str) -> str:
        assert cli.run(ablate.main, ["ablate", *map(str, flags)]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


RATE = '"optimizer.learning_rate"'


@pytest.mark.parametrize(("pack", "jobs"), [("on", [4]), ("off", [1, 1, 1, 1]), ("auto", [1, 1, 1, 1])])
def test_cells_are_packed_as_the_flag_says(study_file, tmp_path, monkeypatch, pack, jobs):
    seen = []
    monkeypatch.setattr(local, "computes_on_cores", lambda: True)
    monkeypatch.setattr(local, "run", lambda jobs, **options: seen.extend(map(len, jobs)))
    with pytest.raises(ablate.RunError, match="4 of 4 cells are missing"):
        ablate.main(["ablate", f"--study={study_file}", f"--workdir={tmp_path}", f"--pack={pack}"])
    assert seen == jobs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('study.arms["fast"] = {"model.num_layers": 2}', "the arms do not match: fast has"),
        (
            'study.arms["fast"] = {"train.num_steps": 8}',
            "the arms do not match: fast has 512 tokens, slow 256 (+100.0%)",
        ),
        (
            'study.arms["fast"] = {"model.layers": 2}',
            "arm 'fast': model.layers is not an option; did you mean model.num_lay",
        ),
        (
            'study.arms["fast"] = {"optimizer.learning_rate": "x"}',
            "arm 'fast': the config has 1 problem: optimizer.lear",
        ),
        ('study.arms["fast"] = {"seed": 3}', "arm 'fast' sets seed; all arms use the seeds of the study"),
        ('study.claims = ("fats < slow",)', "names 'fats', no arm; did you mean fast?"),
        ('study.claims = ("fast is better",)', "is not of the form"),
        ('study.arms["fast"] = study.arms["slow"]', "the arms 'slow' and 'fast' are the same"),
        (f'study.arms["fast"] = {{{RATE}: "1e-5"}}', "'slow' and 'fast' are the same once their options are resolved"),
        (f'study.arms["fast"] = {{{RATE}: 1e-5, "seed": 1}}', "arm 'fast' sets seed"),
        (f'study.arms["fast"] = {{{RATE}: 1e-5, "logging.every": 2}}', "are the same once their options are resolved"),
        ("study.seeds = 1", "a claim needs at least 2"),
        ("study.seeds = 5000", "study.seeds is 5000; a study has at least one seed and at most 1000"),
        ("study.margin = -0.1", "study.margin is -0.1; it must be a number of at least 0"),
        ('study.vary = "order"', "study.vary is 'order'; choose from both, seed, data_seed"),
        ("study.tuning_seeds = 0", "study.tuning_seeds is 0"),
        ("study.tuning_seeds = (1, 1)", "study.tuning_seeds is (1, 1)"),
        (
            f'study.arms["fast"] = {{{RATE}: Grid(1e-4, 1e-3, 1e-2)}}',
            "not tuned alike (tuning cells: slow 0",
        ),
        (f'study.arms["fast"] = {{{RATE}: Grid(1e-4, 1e-3)}}', "has only two values, 0.0001 and 0.001"),
        (f'study.arms["fast"] = {{{RATE}: Grid(1e-4)}}', "needs at least two different values"),
        (f'study.arms["fast"] = {{{RATE}: Grid(1e-4, 1e-3, -1)}}', "optimizer.learning_rate is -1"),
        ('study.arms["fast"] = {"optimizer.rate": Grid(1e-4, 1e-3)}', "optimizer.rate is not an option"),
        (f'study.arms["fast"] = {{{RATE}: Grid(*range(1, 2000))}}', "have 1999 combinations; at most 1000 are tried"),
        ('study.arms["fast"] = None', 'study.arms must be {name: {"section.option": value}}'),
        ('study.arms["fast"] = {"optimizer.learning_rate": Grid([1], [2], [3])}', "it must be a number"),
        ('study.claims = ("fast < slow + 0.1.2",)', "is not of the form"),
        ('study.metric = "accuracy"', "study.metric is 'accuracy', where higher is better"),
        ('study.unmatched = {"speed": ""}', "study.unmatched names 'speed'"),
    ],
)
def test_a_study_that_is_wrong_is_refused(refused, tiny_corpus, tmp_path, change, message):
    (tmp_path / "study.py").write_text(STUDY.format(corpus=tiny_corpus, change=change))
    assert message in refused(f"--study={tmp_path / 'study.py'}", f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"name": "optimizers", "code": {"sha256": ""}}, "holds the study 'optimizers', not 'rates'"),
        ({"name": "rates", "code": {"sha256": "0", "git": {"commit": "abc"}}}, "was made by other code (commit abc)"),
        ({"name": "rates"}, "study.json is damaged"),
    ],
)
def test_a_work_directory_of_something_else_is_refused(refused, study_file, tmp_path, recorded, message):
    (tmp_path / "study.json").write_text(json.dumps(recorded))
    assert message in refused(f"--study={study_file}", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search.optimizer.learning_rate=1e-2..1e-4"], "its ends are reversed; write 1e-4..1e-2"),
        (["--search.optimizer.learning_rate=1e-2..1e-2"], "its values must be different"),
        (["--search.optimizer.learning_rate=1e-2"], "write a range, LOW..HIGH, or values"),
        (["--search.optimizer.learning_rate=1e-4..x"], "--search.optimizer.learning_rate is 'x'; it must be a number"),
        (["--search.optimizer.learning_rate=-1..1"], "is -1.0; it must be at least 0"),
        (["--search.optimizer.learning_rate=1..2..3"], "write a range, LOW..HIGH"),
        (["--search.optimizer.learning_rate"], "has no value"),
        (["--search.optimizer.rate=1..2"], "unknown option --search.optimizer.rate; did you mean optimizer."),
        (["--search.optimizer.name=lion,muon"], "optimizer.name is not a number that changes the training"),
        (["--search.logging.every=1..5"], "logging.every is not a number that changes the training"),
        (["--search.model.qkv_bias=0,1"], "model.qkv_bias is not a number"),
        (["--search.seed=1..5"], "--search.seeds=3 averages over seeds"),
        (["--search.schedule.warmup=2%..5%"], "a search needs numbers; durations in steps"),
        (["--search.trials=0", "--search.optimizer.beta1=0.8..0.9"], "--search.trials is 0; it must be at least 1"),
        (["--search.seeds=x", "--search.optimizer.beta1=0.8..0.9"], "--search.seeds is 'x'; it must be a whole number"),
        (["--search.method=annealing"], "--search.method is 'annealing'; choose from grid, random, tpe"),
        (
            ["--search.method=grid", "--search.trials=5", "--search.optimizer.beta1=0.8..0.9"],
            "a grid tries all its points",
        ),
        (["--search.points=5", "--search.optimizer.beta1=0.8..0.9"], "--search.points is for --search.method=grid"),
        (["--search.model.num_heads=1..4"], "model.embed_dim 16 is not divisible by model.num_heads 3"),
        ([], "nothing is searched; e.g. --search.optimizer.learning_rate=1e-4..1e-2"),
        (["--noise", "--search.optimizer.beta1=0.8..0.9"], "--noise does not go with --search"),
        (["--study=a.py"], "--search and --study are two commands"),
        (["--workers=-1"], "--workers=-1: expected"),
    ],
)
def test_a_search_that_is_wrong_is_refused(refused, tiny_corpus, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(searching, "optuna", lambda: None)
    text = STUDY.format(corpus=tiny_corpus, change="return base").replace("def get_study", "def get_config")
    (tmp_path / "config.py").write_text(text)
    given = ["--search", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'work'}", *flags]
    assert message in refused(*given)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--study is missing"),
        (["--study=a.py"], "--workdir is missing"),
        (["--study=missing.py", "--workdir=w"], "there is no such file"),
        (["--search"], "--workdir is missing"),
        (["--search", "--workdir=w"], "--config is missing"),
        (["--search.trials=3"], "--search.trials needs --search"),
        (["--reproduce=missing"], "--reproduce=missing is not a work directory"),
        (["--reproduce=a", "--steps=-1"], "--steps=-1: expected"),
        (["--reproduce=a", "--noise"], "--noise does not go with --reproduce"),
        (["--study=a.py", "--workdir=w", "--steps=5"], "--steps does not go with --study"),
        (["--study=a.py", "--workdir=w", "--config=b.py"], "--config does not go with --study"),
        (["--diff", "a"], "--diff takes two work directories, not 1"),
        (["--nois"], "unknown option --nois; did you mean --noise?"),
    ],
)
def test_a_command_that_is_wrong_is_refused(refused, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.py").write_text("from gptjax.config import get_default as get_config\n")
    assert message in refused(*flags)


def test_optuna_is_needed_before_anything_runs(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    (tmp_path / "config.py").write_text("from gptjax.config import get_default as get_config\n")
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}", "--search.optimizer.beta1=0.8..0.9"]
    assert "--search needs Optuna: pip install 'gptjax[search]'" in refused("--search", *flags)


@pytest.mark.parametrize("pair", [("--plan", "--noise"), ("--plan", "--report"), ("--noise", "--report")])
def test_commands_that_exclude_each_other(study_file, tmp_path, refused, pair):
    assert "are two commands" in refused(f"--study={study_file}", f"--workdir={tmp_path}", *pair)
