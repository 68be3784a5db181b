"""The files beside a published model that say how its texts become tokens: what each may hold.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, the head of tokenizer.json, vocab.json, merges.txt,
vocab.txt, chat_template.jinja. Everything is checked here, so that other modules can rely on the values.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic

from gptjax import files, foreign, json_text
from gptjax.errors import UserError
from gptjax.json_text import show

TOKENIZER, CONFIG, MODEL_CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_IDS = 10_000_000  # of a vocabulary
MAX_TEMPLATE_CHARACTERS = 1_000_000

S = TypeVar("S", bound=foreign.Schema)
Text = Annotated[str, pydantic.StringConstraints(min_length=1, max_length=1000)]


class AddedToken(foreign.Schema):
    """A token that is found in a text before the vocabulary is applied."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"__type", "id"})
    content: Text
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


Token = Text | AddedToken


class NamedTemplate(foreign.Schema):
    name: str
    template: str


class SpecialTokensMap(foreign.Schema):
    """special_tokens_map.json: {role: special token}."""

    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    pad_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None

    def roles(self) -> dict[str, Token]:
        """{role: token}, including roles that only this model has (image_token)."""
        extra = self.model_extra or {}
        own = {name: value for name, value in sorted(extra.items()) if _is_own_role(name, value)}
        named = {role: getattr(self, role) for role in ROLES}
        return {role: token for role, token in (named | own).items() if token is not None}

    def extra(self) -> list[Token]:
        """Further special tokens."""
        extra = self.extra_special_tokens or self.additional_special_tokens or []
        return list(extra.values() if isinstance(extra, dict) else extra)

    def unknown(self) -> list[str]:
        extra = self.model_extra or {}
        return [name for name in super().unknown() if not _is_own_role(name, extra[name])]


class TokenizerConfig(SpecialTokensMap):
    """tokenizer_config.json."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        " ".join(
            (
                # Names and origins of files.
                "name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file processor_class",
                "backend is_local local_files_only cache_dir revision token trust_remote_code use_fast",
                "transformers_version init_inputs _commit_hash fix_mistral_regex",
                # Truncation and padding of batches, which are done elsewhere here.
                "model_max_length max_length max_len padding padding_side padding_strategy truncation",
                "truncation_side truncation_strategy stride pad_to_multiple_of pad_token_type_id",
                "model_input_names return_token_type_ids",
                # Text that spells a special token (never one here); decoding of bytes that are not UTF-8.
                "split_special_tokens spaces_between_special_tokens errors",
                # Settings of the sentencepiece library; wording of dialogues (the chat template decides).
                "sp_model_kwargs legacy use_default_system_prompt response_template",
                # BERT's basic splitter is in the normalizer and the pre-tokenizer.
                "do_basic_tokenize never_split",
            )
        ).split()
    )
    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None
    add_prefix_space: bool | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    do_lower_case: bool | None = None
    tokenize_chinese_chars: bool | None = None
    strip_accents: bool | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    auto_map: Any = None

    @pydantic.field_validator("added_tokens_decoder")
    @classmethod
    def _ids(cls, tokens: dict[str, AddedToken] | None) -> dict[str, AddedToken] | None:
        for name in tokens or {}:
            if not (name.isascii() and name.isdecimal() and int(name[:20]) < MAX_IDS):
                raise ValueError(f"an object whose names are ids below {MAX_IDS}, unlike {show(name)}")
        return tokens

    def template(self, where: object) -> str | None:
        """The chat template, or the one named default of several. Raises UserError if none has that name."""
        if not isinstance(self.chat_template, list | dict):
            return self.chat_template
        named = self.chat_template
        if isinstance(named, list):
            named = {entry.name: entry.template for entry in named}
        if named and "default" not in named:
            names = show(", ".join(named))
            raise UserError(f"{where} has chat templates {names}, but none is named 'default'")
        return named.get("default")


class ModelConfig(foreign.Schema):
    """What config.json says about the tokenizer."""

    tokenizer_class: str | None = None
    model_type: str | None = None


class _NumberedToken(AddedToken):
    id: int = pydantic.Field(ge=0, lt=MAX_IDS)


class _Model(foreign.Schema):
    type: Literal["BPE", "WordPiece", "WordLevel", "Unigram"] | None = None


class TokenizerHead(foreign.Schema):
    """tokenizer.json without its vocabulary."""

    model: _Model
    added_tokens: list[_NumberedToken] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


def read_config(directory: Path) -> TokenizerConfig:
    """tokenizer_config.json; empty if there is none."""
    return _read(TokenizerConfig, directory / CONFIG)


def read_special_tokens(directory: Path) -> SpecialTokensMap:
    """special_tokens_map.json; empty if there is none."""
    return _read(SpecialTokensMap, directory / SPECIAL_TOKENS)


def read_model_config(directory: Path) -> ModelConfig:
    """What config.json says about the tokenizer; empty if there is none."""
    return _read(ModelConfig, directory / MODEL_CONFIG)


def read_template(directory: Path, config: TokenizerConfig) -> str | None:
    """The chat template of a directory: chat_template.jinja, else the one in tokenizer_config.json."""
    path = directory / TEMPLATE
    jinja = read_text(path) if exists(path) else config.template(directory / CONFIG)
    if jinja is not None and len(jinja) > MAX_TEMPLATE_CHARACTERS:
        raise UserError(f"the chat template of {directory} has more than {MAX_TEMPLATE_CHARACTERS} characters")
    return jinja or None


def check_tokenizer(text: str, where: object) -> None:
    """Raises UserError, with the field and what it must be, if a text is not a tokenizer.json."""
    value = json_text.parse_json(text, where)
    foreign.check(TokenizerHead, value, where)
    vocabulary = value["model"].get("vocab")
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary, f"{where}: model.vocab")
    elif not isinstance(vocabulary, list):
        raise UserError(
            f"{where}: model.vocab is {show(vocabulary)}, but must be an object of tokens and ids, or a list"
        )
    elif len(vocabulary) > MAX_IDS:
        raise UserError(f"{where}: model.vocab has {len(vocabulary)} entries; at most {MAX_IDS} are read")


def read_ids(path: Path) -> dict[str, int]:
    """A JSON file of tokens and their ids: vocab.json, added_tokens.json."""
    value = json_text.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {show(value)}, but must be an object of tokens and ids")
    return _check_ids(value, path)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: two tokens per line, in the order in which they are joined."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"{path}, line {number}: {show(line)} is not two tokens with a space between")
        merges.append((parts[0], parts[1]))
    return merges


def read_lines(path: Path) -> dict[str, int]:
    """vocab.txt: one token per line; the number of the line, from 0, is its id."""
    lines = read_text(path).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    return {line.removesuffix("\r"): number for number, line in enumerate(lines)}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError with the first line that is not UTF-8."""
    path = files.regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.words(error)}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8") from None


def exists(path: Path) -> bool:
    """Whether there is a file or a link of that name; reading reports a link to nothing."""
    return path.exists() or path.is_symlink()


def content(token: Token) -> str:
    return token if isinstance(token, str) else token.content


def _read(schema: type[S], path: Path) -> S:
    return foreign.read(schema, path) if exists(path) else foreign.check(schema, {}, path)


def _check_ids(value: dict[str, Any], where: object) -> dict[str, int]:
    for token, number in value.items():
        if type(number) is not int or not 0 <= number < MAX_IDS:
            raise UserError(
                f"{where}: the id of {show(token)} is {show(number)}, but must be a whole number "
                f"from 0 to {MAX_IDS - 1}"
            )
    if len(set(value.values())) != len(value):
        owners: dict[int, str] = {}
        first, second = next((owners[n], t) for t, n in value.items() if owners.setdefault(n, t) != t)
        raise UserError(f"{where}: {show(first)} and {show(second)} have the same id {value[first]}")
    return value


def _is_own_role(name: str, value: Any) -> bool:
    return name.endswith("_token") and name not in TokenizerConfig.IGNORED and isinstance(value, str) and value != ""
