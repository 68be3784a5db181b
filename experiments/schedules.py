"""Is a constant rate with a cooldown no worse than a cosine, and is 1 - sqrt the better cooldown?

python -m gptjax.ablate --study=experiments/schedules.py --workdir=runs/schedules
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.schedule.decay = "20%"
    study = Study(
        question="Is a constant rate with a cooldown no worse than a cosine, and is 1 - sqrt the better cooldown?",
        source="Haegele et al. 2024, arXiv:2405.18392, figures 3 and 4",
        found="within noise of the cosine; 1 - sqrt a little better than linear",
        base=base,
        arms={
            "cosine": {"schedule.name": "cosine", "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
            "linear_cooldown": {
                "schedule.decay_shape": "linear",
                "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
            },
            "sqrt_cooldown": {
                "schedule.decay_shape": "sqrt",
                "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
            },
        },
        claims=("sqrt_cooldown <= cosine + 0.01", "sqrt_cooldown < linear_cooldown"),
        seeds=5,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
