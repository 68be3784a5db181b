"""Do noise and changed word order help when a small corpus is read many times?

python -m gptjax.ablate --study=experiments/augmentation.py --workdir=runs/augmentation
"""

from gptjax.studies.bases import many_epochs
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = many_epochs(num_steps=1000)
    study = Study(
        question="Do noise and changed word order help when a small corpus is read many times?",
        source="the usual advice of guides to fine-tuning: noise, synonyms, word order",
        found="said to help on small corpora",
        base=base,
        arms={
            "none": {},
            "noise": {"data.token_replacement": 0.05},
            "word_order": {"data.word_swap": 0.1},
        },
        claims=("noise < none", "word_order < none"),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
