"""Do hashed embeddings of token pairs help?

python -m gptjax.ablate --study=experiments/bigram_embedding.py --workdir=runs/bigram_embedding
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do hashed embeddings of token pairs help?",
        source="modded-nanogpt, record 62; contradicted at d25 by nanochat, dev/LOG.md",
        found="1.748 to 1.655 minutes at 124M; nothing at d25",
        base=base,
        arms={
            "none": {},
            "bigram": {"model.ngram_order": 2, "model.ngram_rows": 2048},
        },
        claims=("bigram < none",),
        seeds=5,
        unmatched={
            "parameters": "the table is the subject of the study; it adds almost no FLOPs",
            "flops_per_token": "the same",
        },
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
