"""Into which pieces should Chinese text be split: characters, byte-level BPE, or the words of jieba?

Use your own corpus, with words that jieba knows, of some hundred documents at least.

python -m gptjax.ablate --study=experiments/chinese_tokenizers.py --workdir=runs/chinese_tokenizers \
    --study.base.data.source='text:chinese/*.txt'
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.data.source = "text:chinese/*.txt"
    study = Study(
        question="Into which pieces should Chinese text be split: characters, byte-level BPE, or the words of jieba?",
        source="guides to Chinese models, which cut text with jieba first; Li et al. 2019, arXiv:1905.05526, section 4",
        found="Li et al.: characters beat words in every task, since most words are rare",
        base=base,
        arms={
            "characters": {"tokenizer": "char"},
            "bpe": {"tokenizer": "bpe:4096"},
            # All words of the corpus: an unknown word would cost almost nothing to predict.
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
