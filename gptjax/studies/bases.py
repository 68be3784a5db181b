"""Base configs of studies, small enough for two cores."""

from gptjax.config import Config, get_default


def small(num_steps: int = 300) -> Config:
    """A GPT of 0.23M parameters on the documentation of Python: 1,024 tokens per step, half a minute on one core.

    300 steps are a fifth of an epoch. Each study adds what it compares.
    """
    config = get_default()
    config.tokenizer = "bpe:512"
    config.model.update(num_layers=4, num_heads=2, embed_dim=64, context_length=64)
    config.optimizer.learning_rate = 5e-3
    config.schedule.update(name="wsd", warmup="5%", decay="40%", final_fraction=0.0)
    config.train.update(num_steps=num_steps, batch_size=16, checkpoint_every="100%", keep_checkpoints=1)
    config.evaluation.update(every="25%", tasks="perplexity")
    config.logging.update(samples=0, tensorboard=False)
    return config


def many_epochs(num_steps: int = 600) -> Config:
    """The same on a twentieth of the text: 600 steps are about seven epochs."""
    config = small(num_steps)
    config.data.update(validation_fraction=0.05, test_fraction=0.9)
    return config
