"""How many tokens per parameter are best at a given compute, and does the answer depend on how parameters are counted?

python -m gptjax.ablate --study=experiments/tokens_per_parameter.py --workdir=runs/tokens_per_parameter

Five widths, each trained with two budgets of FLOPs; the report fits the lowest loss of each budget.
"""

import dataclasses

from gptjax.studies.bases import small
from gptjax.studies.isoflop import num_steps
from gptjax.studies.study import Study, apply_arg

REASON = "models of several sizes share the FLOPs of their whole training"


def get_study(arg: str = "") -> Study:
    base = small()
    base.train.batch_size, base.model.tie_embeddings = 8, False
    widths, budgets = (16, 32, 64, 96, 128), {"low": 2e11, "high": 8e11}
    if arg == "smoke":
        widths, budgets = (16, 32, 64), {"low": 2e9, "high": 6e9}
    if arg == "full":
        widths, budgets = (256, 384, 512, 640, 768), {"low": 1e17, "high": 1e18}
    sizes = {w: {"model.embed_dim": w, "model.num_heads": w // 16, "optimizer.learning_rate": 0.32 / w} for w in widths}
    study = Study(
        question="How many tokens per parameter are best at a given compute, and for which count of parameters?",
        source="nanochat, its log of experiments; Hoffmann et al. 2022, arXiv:2203.15556, section 3.2",
        found="10.3 to 11.2 at every compute, but only if the head is counted and the embedding is not",
        base=base,
        arms={f"w{w}_{budget}": size for budget in budgets for w, size in sizes.items()},
        claims=tuple(
            f"w{widths[len(widths) // 2]}_{b} < w{end}_{b}" for b in budgets for end in (widths[0], widths[-1])
        ),
        unmatched=dict.fromkeys(("parameters", "flops_per_token", "tokens"), REASON),
        isoflop=True,
        smoke={"seeds": 2},
        full={"model.num_layers": 12, "model.context_length": 1024, "train.batch_size": 64, "tokenizer": "bpe:8192"},
    )
    study = apply_arg(study, arg)
    steps = {name: num_steps(study.config_of(name, 0), budgets[name.rpartition("_")[2]]) for name in study.arms}
    return dataclasses.replace(
        study, arms={name: size | {"train.num_steps": steps[name]} for name, size in study.arms.items()}
    )
