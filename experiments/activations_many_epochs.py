"""Is squared ReLU better than SwiGLU when a small corpus is read many times?

python -m gptjax.ablate --study=experiments/activations_many_epochs.py --workdir=runs/activations_many_epochs
"""

from gptjax.studies.bases import many_epochs
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = many_epochs()
    study = Study(
        question="Is squared ReLU better than SwiGLU when a small corpus is read many times?",
        source="slowrun of modded-nanogpt; contradicts So et al. 2021, arXiv:2109.08668",
        found="SwiGLU 3.410 against squared ReLU 3.428",
        base=base,
        arms={
            "swiglu": {"model.activation": "swiglu", "model.mlp_dim": 171},
            "squared_relu": {},
        },
        claims=("swiglu < squared_relu",),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
