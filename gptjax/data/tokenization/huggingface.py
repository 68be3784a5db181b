"""The tokenizer and the chat template of a Hugging Face directory, read and written."""

import json
from pathlib import Path
from typing import Any

from gptjax.data.tokenization import published
from gptjax.data.tokenization.templates import CHATML, ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def has_tokenizer(directory: Path) -> bool:
    return published.has_files(directory)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Raises UserError where the directory has none that can be read."""
    return build_tokenizer(f"hf:{directory}")


def read_template(directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a directory, if it has one. Raises UserError where no model can be trained with it."""
    template = ChatTemplate.of_tokenizer(tokenizer, directory)
    if template.jinja is None:
        return None
    return ChatTemplate() if template.jinja == CHATML else template


def begin_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """What its tokenizer puts before a text for a pretrained model, which may be nothing, as GPT-2's; nothing if it has a
    chat template, which writes its own beginning."""
    return [] if template is not None else list(tokenizer.prefix)


def check_exportable(tokenizer: Tokenizer) -> None:
    """Raises UserError for the `jieba` kind, which cuts words before the tokenizer sees them."""
    if tokenizer.kind == "jieba":
        raise UserError(
            "the tokenizer of the kind jieba cuts words with the library jieba, which a tokenizer.json cannot say; "
            "models with the kinds char, byte, bpe, word and hf can be exported"
        )


def write(directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None, *, context_length: int) -> None:
    """Writes tokenizer.json and a tokenizer_config.json with which transformers' AutoTokenizer gives the same ids.

    The chat template is in it as Jinja. Raises UserError where `check_exportable` does.
    """
    check_exportable(tokenizer)
    (directory / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    variables = template.variables if template else {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": variables.get("bos_token", tokenizer.eot_token),
        "eos_token": tokenizer.eot_token,
        "pad_token": variables.get("pad_token", tokenizer.eot_token),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [t for t in tokenizer.special_tokens if t != tokenizer.eot_token],
    }
    if template is not None:
        config["chat_template"] = template.jinja or CHATML
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
