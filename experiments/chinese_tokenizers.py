"""Which pieces should Chinese text be cut into: characters, byte-level BPE, or the words of jieba?

The corpus is of your own: one that jieba knows the words of, with some hundred documents at least.

python -m gptjax.ablate --study=experiments/chinese_tokenizers.py --workdir=runs/chinese_tokenizers \
    --study.base.data.source='text:chinese/*.txt'
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.data.source = "text:chinese/*.txt"
    study = Study(
        question="Which pieces should Chinese text be cut into: characters, byte-level BPE, or the words of jieba?",
        source="guides to Chinese models, which cut text with jieba first; Li et al. 2019, arXiv:1905.05526, section 4",
        found="Li et al.: characters beat words in every task, since most words are rare",
        base=base,
        arms={
            "characters": {"tokenizer": "char"},
            "bpe": {"tokenizer": "bpe:4096"},
            # All words of the corpus: a word that is not in the vocabulary would be predicted for next to nothing.
            "words": {"tokenizer": "jieba:1000000"},
        },
        claims=("characters < words", "bpe < words"),
        seeds=5,
        metric="bits_per_byte",
        unmatched={
            "parameters": "the vocabularies differ, and so do the rows of the embedding",
            "flops_per_token": "the output layer is as large as the vocabulary",
        },
        smoke={"train.num_steps": 40, "evaluation.max_tokens": 0},
    )
    return apply_arg(study, arg)
