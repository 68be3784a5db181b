"""Are tied embeddings no worse at this size?

python -m gptjax.ablate --study=experiments/tied_embeddings.py --workdir=runs/tied_embeddings
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Are tied embeddings no worse at this size?",
        source="Press and Wolf 2017, arXiv:1608.05859; modded-nanogpt unties",
        found="tied better when small, untied when wide",
        base=base,
        arms={
            "untied": {"model.tie_embeddings": False},
            "tied": {"model.tie_embeddings": True},
        },
        claims=("tied <= untied + 0.01",),
        seeds=5,
        unmatched={"parameters": "tying removes a table"},
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
