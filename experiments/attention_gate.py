"""Do gates on the heads of attention help?

python -m gptjax.ablate --study=experiments/attention_gate.py --workdir=runs/attention_gate
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do gates on the heads of attention help?",
        source="Qiu et al. 2025, arXiv:2505.06708",
        found="lower loss and no attention sinks at 1.7B",
        base=base,
        arms={
            "none": {},
            "gate": {"model.attention_gate": True},
        },
        claims=("gate < none",),
        seeds=5,
        unmatched={
            "parameters": "the gates are the subject of the study",
            "flops_per_token": "the same",
        },
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
