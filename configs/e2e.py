"""E2E NLG: restaurant descriptions from attributes (Novikova et al. 2017), trained from scratch.

DATA is the folder of the data set (trainset.csv or trainset.csv.gz, testset_w_refs.csv):

  python -m gptjax.train --config=configs/e2e.py --workdir=runs/e2e \\
      --config.data.source='pairs:DATA/trainset.csv.gz#mr,ref'
  python -m gptjax.evaluate --workdir=runs/e2e --prompts='DATA/testset_w_refs.csv#mr,ref'

The second command generates the 630 descriptions of the test set greedily, and scores each against all of its
references. `bleu_lowercase` equals the output of the challenge's own script: 65 to 70 for pretrained GPT-2 models with
beam search. Seed 0: 65.6. About 10 minutes of training on two CPU cores (12,000 tokens per second).
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "bpe:1024"
    config.data.update(source="pairs:e2e/trainset.csv.gz#mr,ref", validation_fraction=0.03, test_fraction=0.0)
    config.model.update(num_layers=4, num_heads=4, embed_dim=192, context_length=256)
    config.optimizer.update(name="muon", learning_rate=3e-3, muon_learning_rate=0.02)
    config.schedule.update(name="wsd", warmup="2%", decay="50%", final_fraction=0.02)
    config.train.update(num_steps="2.5 epochs", batch_size=16)
    config.evaluation.update(every="20%", tasks="perplexity,bleu,bleu_lowercase,rouge,ter,diversity")
    config.evaluation.update(max_prompts=0, max_new_tokens=90)
    config.logging.sample_prompt = "name[The Vaults], eatType[pub], priceRange[more than £30], near[Café Adriatic]"
    config = apply_arg(config, arg)
    if arg == "runlocal":  # a pair of the data set does not fit in fewer tokens
        config.tokenizer = "bpe:1024"
        config.model.context_length = 192
        config.evaluation.max_new_tokens = 40
    return config
