"""Is SOAP better than Muon in one epoch?

python -m gptjax.ablate --study=experiments/soap.py --workdir=runs/soap
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Is SOAP better than Muon in one epoch?",
        source="modded-nanogpt, track 3 (SOAP in its hyperball form); contradicted by the slowrun, in many epochs",
        found="3,125 (n 6) against 3,250 (n 10) steps",
        base=base,
        arms={
            "muon": {"optimizer.name": "muon", "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04)},
            "soap": {"optimizer.name": "soap", "optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
        },
        claims=("soap < muon",),
        seeds=5,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
