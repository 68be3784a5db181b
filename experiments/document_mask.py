"""At these lengths, does it matter that tokens see other documents in their row? (Negative control.)

python -m gptjax.ablate --study=experiments/document_mask.py --workdir=runs/document_mask
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="At these lengths, does it matter that tokens see other documents in their row? (Negative control.)",
        source="nanochat, dev/LOG.md",
        found="0.85427 against 0.85407 bits per byte: no difference",
        base=base,
        arms={
            "mask": {},
            "no_mask": {"data.isolate_documents": False},
        },
        claims=("mask = no_mask + 0.02",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
