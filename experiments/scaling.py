"""Is Muon's advantage over AdamW the same at every size? Four sizes and their laws; the last one is predicted.

python -m gptjax.ablate --study=experiments/scaling.py --workdir=runs/scaling

Rung k has k + 1 layers of width 32 k, 2 tokens per parameter of a matrix product, and rates that fall with the
width as Adam's best ones do without muP, so each rung costs about five times the one before. The rates of the first
rung are common choices, not tuned here; both arms follow the same rule.
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg

VOCAB_SIZE, TOKENS_A_STEP, TOKENS_A_PARAMETER = 512, 1024, 2


def rung(k: int, ratio: float = TOKENS_A_PARAMETER) -> dict:
    width, layers = 32 * k, k + 1
    matrices = layers * 12 * width**2 + width * VOCAB_SIZE
    return {
        "model.num_layers": layers,
        "model.num_heads": k,
        "model.embed_dim": width,
        "train.num_steps": max(round(ratio * matrices / TOKENS_A_STEP), 10),
        "optimizer.learning_rate": 1e-2 / k,
    }


def get_study(arg: str = "") -> Study:
    study = Study(
        question="Is Muon's advantage over AdamW the same at every size?",
        source="Wen et al. 2025, Fantastic Pretraining Optimizers and Where to Find Them, arXiv:2509.02046",
        found="matrix optimizers need 1.4 times less compute at 0.1B parameters, 1.1 times at 1.2B",
        base=small(),
        arms={"adamw": {}, "muon": {"optimizer.name": "muon", "optimizer.muon_learning_rate": 0.02}},
        claims=("muon < adamw",),
        ladder={f"d{k}": rung(k) for k in (1, 2, 3, 4)},
        smoke={"ladder": {f"d{k}": rung(k, ratio=0.5) for k in (1, 2, 3, 4)}, "seeds": 2},
        full={"ladder": {f"d{k}": rung(k, ratio=20) for k in (2, 4, 6, 8, 12)}},
    )
    return apply_arg(study, arg)
