"""Do numbers cost fewer bits per byte of text in groups of two digits than in groups of three, or digit by digit?

python -m gptjax.ablate --study=experiments/digits.py --workdir=runs/digits
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do numbers cost fewer bits in groups of two digits than in groups of three, or digit by digit?",
        source="nanochat, its log of experiments: how its tokenizer cuts numbers",
        found="0.965 bits per byte in groups of two, 0.969 digit by digit, 0.972 in groups of three",
        base=base,
        arms={
            "three": {"tokenizer": "bpe:2048:digits=3"},
            "two": {"tokenizer": "bpe:2048:digits=2"},
            "one": {"tokenizer": "bpe:2048:digits=1"},
            "whole": {"tokenizer": "bpe:2048"},
        },
        claims=("two < three", "two < one"),
        seeds=5,
        metric="bits_per_byte",
        # Parameters and tokens are equal; the tokenizers differ in how much text these tokens hold.
        smoke={"train.num_steps": 40, "evaluation.max_tokens": 0},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
