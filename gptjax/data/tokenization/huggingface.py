"""The tokenizer and the chat template of a Hugging Face directory, read and written."""

import contextlib
import json
from pathlib import Path
from typing import Any

from gptjax import foreign
from gptjax.data.tokenization import published
from gptjax.data.tokenization.templates import CHATML, ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError
from gptjax.files import about

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def has_tokenizer(directory: Path) -> bool:
    return published.has_files(directory)


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory. Raises UserError if it has none that can be read."""
    return build_tokenizer(f"hf:{directory}")


def read_template(directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a directory, if it has one. Raises UserError if no model can be trained with it."""
    template = ChatTemplate.of_tokenizer(tokenizer, directory)
    if template.jinja is None:
        return None
    return ChatTemplate() if template.jinja == CHATML else template


def fitted(tokenizer: Tokenizer, vocab_size: int, where: Path) -> Tokenizer:
    """The tokenizer of a model, without special tokens at its end for which the model has no embedding rows.

    An example is a [PAD] that was added later; no text is encoded as one. Raises UserError if other tokens are beyond
    the model's vocabulary.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    description = json.loads(tokenizer.to_str())
    kept = [token for token in description["added_tokens"] if token["id"] < vocab_size or not token["special"]]
    left_out = [token["content"] for token in description["added_tokens"] if token not in kept]
    if left_out and tokenizer.eot_token not in left_out:
        with contextlib.suppress(UserError):
            text = json.dumps(description | {"added_tokens": kept}, ensure_ascii=False)
            smaller = Tokenizer.from_str(text, eot_token=tokenizer.eot_token)
            if smaller.vocab_size <= vocab_size:
                names = ", ".join(left_out)[:200]
                foreign.warn(f"{where}: the model has no rows for the special tokens {names}; they are left out")
                return smaller
    raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")


def begin_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The ids that the tokenizer of a pretrained model puts before a text; GPT-2's puts none.

    Empty if there is a chat template, which writes its own beginning.
    """
    return [] if template is not None else list(tokenizer.prefix)


def check_exportable(tokenizer: Tokenizer) -> None:
    """Raises UserError for the `jieba` kind, which cuts words before the tokenizer sees them."""
    if tokenizer.kind == "jieba":
        raise UserError(
            "the tokenizer of the kind jieba cuts words with the library jieba, which a tokenizer.json cannot express; "
            "models with the kinds char, byte, bpe, word and hf can be exported"
        )


def write(
    directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None, *, context_length: int, begins: bool = False
) -> None:
    """Writes tokenizer.json and a tokenizer_config.json with which transformers' AutoTokenizer gives the same ids.

    The chat template is in it as Jinja. Raises UserError as `check_exportable` does.

    Args:
      begins: whether the prompts of the model begin with the token that begins a text: `add_bos_token`.
    """
    check_exportable(tokenizer)
    with about(directory / TOKENIZER):
        (directory / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    variables = template.variables if template else {}
    names = {number: token for token, number in tokenizer.special_tokens.items()}
    begin = names.get(tokenizer.begin_ids[0], tokenizer.eot_token)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": variables.get("bos_token", begin),
        "eos_token": tokenizer.eot_token,
        "pad_token": variables.get("pad_token", tokenizer.eot_token),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [t for t in tokenizer.special_tokens if t != tokenizer.eot_token],
    }
    if begins:
        config["add_bos_token"] = True
    if template is not None:
        config["chat_template"] = template.jinja or CHATML
    with about(directory / TOKENIZER_CONFIG):
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
