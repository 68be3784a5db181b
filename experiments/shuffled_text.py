"""Does order matter? (The positive control: spans of every document shuffled in training.)

python -m gptjax.ablate --study=experiments/shuffled_text.py --workdir=runs/shuffled_text
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Does order matter? (The positive control: spans of every document shuffled in training.)",
        source="marin, experiments/grug: the positive control of its ablations",
        found="1.5345 to 2.8840 bits per byte with tokens shuffled",
        base=base,
        arms={
            "text": {},
            "shuffled": {"data.span_shuffle": 1.0, "data.word_swap": 1.0},
        },
        claims=("text < shuffled - 0.05",),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
