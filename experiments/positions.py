"""Are rotary positions no worse than learned ones, and are positions needed at all?

python -m gptjax.ablate --study=experiments/positions.py --workdir=runs/positions
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Are rotary positions no worse than learned ones, and are positions needed at all?",
        source="Su et al. 2021, arXiv:2104.09864, section 4; Press et al. 2022, arXiv:2108.12409",
        found="rotary trains faster; ALiBi as good at the trained length",
        base=base,
        arms={
            "learned": {"model.positions": "learned"},
            "rope": {},
            "alibi": {"model.positions": "alibi"},
            "none": {"model.positions": "none"},
        },
        claims=("rope <= learned", "alibi <= learned", "rope < none"),
        seeds=5,
        unmatched={"parameters": "a table of learned positions is part of that arm"},
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
