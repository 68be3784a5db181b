"""Does the cleaning that guides advise (lower case, no stop words, no punctuation) help a model of plain text?

All arms are scored on the same held-out text as it was written, in bits per byte.

python -m gptjax.ablate --study=experiments/guide_cleaning.py --workdir=runs/guide_cleaning
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.data.update(split_by="document", cleaned_splits="train")
    study = Study(
        question="Does the cleaning that guides advise (lower case, no stop words) help a model of plain text?",
        source="guides to training a model on text of one's own, whose steps are those of text classification",
        found="advised without a measurement; what is left cannot be written back",
        base=base,
        arms={
            "plain": {},
            "lower_case": {"data.cleaning": "lowercase"},
            "guide": {"data.cleaning": "guide"},
        },
        claims=("plain < guide", "plain < lower_case"),
        seeds=5,
        metric="bits_per_byte",
        smoke={"train.num_steps": 40, "evaluation.max_tokens": 0},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
