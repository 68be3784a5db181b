"""Does a small model learn more from a larger one's next-token distribution than from the text alone, at equal tokens?

The argument is the teacher's work directory; default: runs/teacher. First a teacher on the same text, with the
same tokenizer (2 minutes on two cores), then the study:

python -m gptjax.train --config=configs/quickstart.py --workdir=runs/teacher --config.tokenizer=bpe:512
python -m gptjax.ablate --study=experiments/distillation.py:runs/teacher --workdir=runs/distillation
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    teacher = arg if arg not in ("", "smoke", "full") else "runs/teacher"
    study = Study(
        question="Does a small model learn more from a larger one's next tokens than from the text alone?",
        source="Hinton et al. 2015, arXiv:1503.02531; Busbridge et al. 2025, arXiv:2502.08606",
        found="with few tokens and an existing teacher, a student of the same size reaches a lower loss",
        base=small(),
        arms={
            "alone": {},
            "distilled": {"objective.name": "distillation", "objective.teacher": teacher},
        },
        claims=("distilled < alone",),
        seeds=3,
        unmatched={"flops_per_token": "the teacher's forward pass is extra; tokens and size are equal"},
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, "" if arg == teacher else arg)
