"""Does normalising queries and keys prevent the harm of a high learning rate?

python -m gptjax.ablate --study=experiments/qk_norm.py --workdir=runs/qk_norm
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Does normalising queries and keys prevent the harm of a high learning rate?",
        source="Wortsman et al. 2023, arXiv:2309.14322, figure 1",
        found="without it the loss diverges at rates where it is stable with it",
        base=base,
        arms={
            "plain": {"model.qk_norm": False},
            "qk_norm": {},
            "plain_at_8x": {"model.qk_norm": False, "optimizer.learning_rate": 4e-2},
            "qk_norm_at_8x": {"optimizer.learning_rate": 4e-2},
        },
        claims=("qk_norm_at_8x < plain_at_8x", "qk_norm <= plain + 0.02"),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
