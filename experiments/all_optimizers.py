"""How do eight optimizers compare at equal tuning?

python -m gptjax.ablate --study=experiments/all_optimizers.py --workdir=runs/all_optimizers
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="How do eight optimizers compare at equal tuning?",
        source="Wen et al. 2025, arXiv:2509.02046; Semenov et al. 2025, arXiv:2509.01440",
        found="matrix optimizers need at most 1.4 times fewer steps at 0.1B parameters",
        base=base,
        arms={
            "adamw": {"optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
            "lion": {"optimizer.name": "lion", "optimizer.learning_rate": Grid(1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)},
            "adafactor": {
                "optimizer.name": "adafactor",
                "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
            },
            "schedule_free": {
                "optimizer.name": "schedule_free_adamw",
                "schedule.name": "constant",
                "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
            },
            "sgd": {"optimizer.name": "sgd", "optimizer.learning_rate": Grid(0.03, 0.1, 0.3, 1.0, 3.0)},
            "muon": {"optimizer.name": "muon", "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04)},
            "soap": {"optimizer.name": "soap", "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
        },
        claims=(
            "muon < adamw",
            "soap < adamw",
            "lion <= adamw + 0.02",
            "schedule_free <= adamw + 0.02",
            "adafactor <= adamw + 0.02",
            "adamw < sgd",
        ),
        seeds=3,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
