"""Instruction tuning: in dialogues, only the assistant's turns count in the loss.

Dialogues are packed whole. If a mixture has sources of text, these are read in windows, and all tokens
count in the loss.
"""

from gptjax.config import Config
from gptjax.objectives import language_modeling


def make(config: Config) -> language_modeling.LanguageModeling:
    """The objective of a config: the loss of language modelling, on the tokens that the chat template marks."""
    return language_modeling.make(config, dialogues=True)
