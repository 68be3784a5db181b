"""Instruction tuning: the assistant's turns of dialogues bear loss, what they answer does not.

Dialogues are packed whole. A source of a mixture that is text is read in windows, and all of its tokens bear loss.
"""

from gptjax.config import Config
from gptjax.objectives import language_modeling


def make(config: Config) -> language_modeling.LanguageModeling:
    """The objective of a config: the loss of language modelling, on the tokens that the chat template marks."""
    return language_modeling.make(config, dialogues=True)
