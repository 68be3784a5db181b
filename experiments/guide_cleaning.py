"""Does the cleaning that guides recommend (lower case, no stop words, no punctuation) help a model of plain text?

All arms are scored on the same uncleaned held-out text, in bits per byte.

python -m gptjax.ablate --study=experiments/guide_cleaning.py --workdir=runs/guide_cleaning
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.data.update(split_by="document", cleaned_splits="train")
    study = Study(
        question="Does the cleaning that guides recommend (lower case, no stop words) help a model of plain text?",
        source="guides to training a model on your own text, with the cleaning steps of text classification",
        found="recommended without a measurement; the original text cannot be restored",
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
