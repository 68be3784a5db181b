"""Do Polar Express, NorMuon or MuonH improve on Muon as first published?

python -m gptjax.ablate --study=experiments/muon_variants.py --workdir=runs/muon_variants
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do Polar Express, NorMuon or MuonH improve on Muon as first published?",
        source="modded-nanogpt, track 3; arXiv:2505.16932; arXiv:2510.05491; contradicted by nanochat, dev/LOG.md",
        found="3,600 to 3,250 steps with all of them; nanochat found MuonH worse",
        base=base,
        arms={
            "muon": {"optimizer.name": "muon", "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04)},
            "polar_express": {
                "optimizer.name": "muon",
                "optimizer.orthogonalization": "polar_express",
                "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04),
            },
            "normuon": {
                "optimizer.name": "normuon",
                "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04),
            },
            "muonh": {"optimizer.name": "muonh", "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04)},
        },
        claims=("polar_express <= muon + 0.01", "normuon < muon", "muonh < muon"),
        seeds=5,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
