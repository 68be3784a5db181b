"""Is squared ReLU better than SwiGLU at the same number of parameters?

python -m gptjax.ablate --study=experiments/activations.py --workdir=runs/activations
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Is squared ReLU better than SwiGLU at the same number of parameters?",
        source="So et al. 2021, arXiv:2109.08668, section 4; nanochat, dev/LOG.md; contradicted by the slowrun",
        found="one epoch: yes; many epochs (slowrun): SwiGLU 3.410 against 3.428",
        base=base,
        arms={
            "swiglu": {"model.activation": "swiglu", "model.mlp_dim": 171},
            "squared_relu": {},
            "gelu": {"model.activation": "gelu"},
        },
        claims=("squared_relu < swiglu", "squared_relu < gelu"),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
