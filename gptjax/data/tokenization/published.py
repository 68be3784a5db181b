"""The tokenizer of a published model, from the files beside it, as transformers makes it.

Every setting of tokenizer_config.json is followed or refused. Without a tokenizer.json, the class named there decides
how the vocabulary is used: GPT-2, Qwen2, BERT (the Chinese GPT-2) or Llama (SentencePiece).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import foreign
from gptjax.data.tokenization import published_files, sentencepiece
from gptjax.data.tokenization.published_files import AddedToken, Token, TokenizerConfig, content
from gptjax.errors import UserError

VOCABULARY, MERGES, WORDPIECES, SENTENCEPIECE = "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"
OPENAI = ("encoder.json", "vocab.bpe")
FILES = (
    published_files.TOKENIZER,
    published_files.CONFIG,
    published_files.SPECIAL_TOKENS,
    published_files.ADDED_TOKENS,
    published_files.TEMPLATE,
    VOCABULARY,
    MERGES,
    WORDPIECES,
    SENTENCEPIECE,
)
# Qwen2's splitter; vocab.json and merges.txt do not have it.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDOFTEXT = "<|endoftext|>"
_GPT2 = {"unk_token": _ENDOFTEXT, "bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT}
_CLASSES = {  # {class of transformers: its special tokens, unless a file names others}
    "GPT2Tokenizer": _GPT2,
    "Qwen2Tokenizer": {"unk_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "pad_token": _ENDOFTEXT},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
}
# Classes whose tokenizer.json says everything; the classes above are among them.
_COMPLETE = frozenset(
    " ".join(
        (
            "PreTrainedTokenizer TokenizersBackend CodeLlamaTokenizer GemmaTokenizer GPTNeoXTokenizer",
            "CohereTokenizer BloomTokenizer CodeGenTokenizer RobertaTokenizer DistilBertTokenizer T5Tokenizer",
            "DebertaV2Tokenizer",
        )
    ).split()
).union(_CLASSES)
_CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
}
# Spaces beside a Chinese character or mark: only the splitter puts them there.
_CHINESE = r"[\p{Han}\x{3000}-\x{303F}\x{FF00}-\x{FFEF}]"
_SPACES = rf"(?<={_CHINESE}) | (?={_CHINESE})"
_CLEAN_UP = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]


class Published(NamedTuple):
    """A `tokenizers.Tokenizer`, and its end-of-text token if a file or the class names it."""

    tokenizer: Any
    end_of_text: str | None


def has_files(directory: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    names = (published_files.TOKENIZER, VOCABULARY, WORDPIECES, SENTENCEPIECE, OPENAI[0])
    return any((directory / name).is_file() for name in names)


def read(name: str) -> Published:
    """The tokenizer that `hf:name` names: a directory, a tokenizer.json, or a name on the Hugging Face hub.

    Raises UserError if there is none, a file has another form, or a setting cannot be followed.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return read_directory(path.parent, path)
    return read_directory(path if path.is_dir() else _download(name))


def read_directory(directory: Path, file: Path | None = None) -> Published:
    """`read` for a directory; `file`: its tokenizer.json, if that has another name."""
    config = published_files.read_config(directory)
    named = published_files.read_special_tokens(directory)
    kind = _class(directory, config)
    file = file or directory / published_files.TOKENIZER
    if config.add_eos_token:
        raise UserError(
            f"{directory / published_files.CONFIG}: add_eos_token is true, which would end every prompt before its "
            "completion; set it to false"
        )
    roles = named.roles() | config.roles()
    if published_files.exists(file):
        tokenizer, defaults = _read_json(file, kind, config, directory), {}
    else:
        if config.auto_map is not None:
            raise UserError(f"{directory} has code of its own for its tokenizer (auto_map); {_make(directory)}")
        tokenizer, defaults = _build(directory, kind, config, roles)
    by_hand = config.added_tokens_decoder is not None
    if not by_hand:
        _add_numbered(tokenizer, directory, {content(token) for token in [*roles.values(), *named.extra()]})
    for number, token in sorted((config.added_tokens_decoder or {}).items(), key=lambda item: int(item[0])):
        _add(tokenizer, token, directory / published_files.CONFIG, number=int(number))
    special = [*(defaults | roles).values(), *config.extra(), *([] if by_hand else named.extra())]
    for token in special:
        _add(tokenizer, token, directory, special=True)
    _set_beginning(tokenizer, directory, config, defaults | roles)
    splits_chinese = _splits_chinese(tokenizer)
    if (
        config.clean_up_tokenization_spaces and type(tokenizer.model).__name__ != "BPE"
    ):  # as transformers does; not for BPE
        _clean_up(tokenizer)
    if splits_chinese:
        _join_chinese(tokenizer)
    if unknown := sorted({*config.unknown(), *named.unknown()}):
        foreign.warn(
            f"{directory / published_files.CONFIG}: {', '.join(unknown)[:300]} is unknown here and ignored; "
            "compare some token ids with transformers"
        )
    _probe(tokenizer, directory)
    end = (defaults | roles).get("eos_token" if kind != "BertTokenizer" or "eos_token" in roles else "sep_token")
    return Published(tokenizer, content(end) if end else None)


def _class(directory: Path, config: TokenizerConfig) -> str:
    """transformers' name, without Fast, of the class that reads the vocabulary; "" if it is unknown."""
    model = published_files.read_model_config(directory)
    name = config.tokenizer_class or model.tokenizer_class
    if name is None:
        has_pieces = not (directory / VOCABULARY).is_file() and (directory / WORDPIECES).is_file()
        return "BertTokenizer" if has_pieces else _CLASS_OF_MODEL.get(model.model_type or "", "")
    name = name.removesuffix("Fast")
    if name not in _COMPLETE:
        raise UserError(
            f"{directory}: the tokenizer is a {name[:80]}, which is not read here; these are: "
            f"{', '.join(sorted(_CLASSES))}, and with tokenizer.json {', '.join(sorted(_COMPLETE - set(_CLASSES)))}. "
            "If its tokenizer.json says everything, set tokenizer_class to PreTrainedTokenizerFast"
        )
    return name


# ---- Vocabularies --------------------------------------------------------------------------------------------------


def _read_json(file: Path, kind: str, config: TokenizerConfig, directory: Path) -> Any:
    from tokenizers import Tokenizer

    text = published_files.read_text(file)
    published_files.check_tokenizer(text, file)
    tokenizer = guarded(lambda: Tokenizer.from_str(text), file)
    space = config.add_prefix_space
    if space is None and kind in ("GPT2Tokenizer", "Qwen2Tokenizer") and config.tokenizer_class:
        space = False  # the default of these classes
    if space is not None:
        _set_prefix_space(tokenizer, space, directory)
    return tokenizer


def _build(
    directory: Path, kind: str, config: TokenizerConfig, roles: dict[str, Token]
) -> tuple[Any, dict[str, Token]]:
    """(tokenizer, special tokens of its class or its vocabulary) for a directory without tokenizer.json."""
    pair = next((p for p in ((VOCABULARY, MERGES), OPENAI) if all((directory / name).is_file() for name in p)), None)
    kind = kind or ("GPT2Tokenizer" if pair else "LlamaTokenizer")
    defaults: dict[str, Token] = dict(_CLASSES.get(kind, {}))
    if kind in ("GPT2Tokenizer", "Qwen2Tokenizer") and pair:
        return _byte_level(directory, pair, kind, bool(config.add_prefix_space)), defaults
    if kind == "BertTokenizer" and (directory / WORDPIECES).is_file():
        return _wordpiece(directory, config, content((defaults | roles)["unk_token"])), defaults
    generic = ("LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
    if kind in generic and (directory / SENTENCEPIECE).is_file():
        path = directory / SENTENCEPIECE
        return guarded(lambda: sentencepiece.read(path, add_prefix_space=config.add_prefix_space), path)
    if kind in _CLASSES or not has_files(directory):
        needed = "vocab.json with merges.txt, encoder.json with vocab.bpe, vocab.txt or tokenizer.model"
        which = f" that a {kind} reads" if has_files(directory) else ""
        raise UserError(
            f"{directory} has neither tokenizer.json nor a vocabulary{which}: {needed}; name a directory that has them"
        )
    raise UserError(f"{directory} has a vocabulary of a {kind} and no tokenizer.json; {_make(directory)}")


def _byte_level(directory: Path, names: tuple[str, str], kind: str, space: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = (directory / name for name in names)
    ids, pairs = published_files.read_ids(vocabulary), published_files.read_merges(merges)
    tokenizer = Tokenizer(guarded(lambda: models.BPE(vocab=ids, merges=pairs), merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=kind != "Qwen2Tokenizer")
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def _wordpiece(directory: Path, config: TokenizerConfig, unknown: str) -> Any:
    """BERT's: Chinese characters apart, the pieces of words marked with ##."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = directory / WORDPIECES
    ids = published_files.read_lines(path)
    if unknown not in ids:
        raise UserError(f"{path} has no {unknown}, the token for unknown text; it is not a vocab.txt of BERT")
    tokenizer = Tokenizer(guarded(lambda: models.WordPiece(ids, unk_token=unknown), path))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.tokenize_chinese_chars is not False,
        strip_accents=config.strip_accents,
        lowercase=config.do_lower_case is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


# ---- What the files add --------------------------------------------------------------------------------------------


def _add_numbered(tokenizer: Any, directory: Path, special: set[str]) -> None:
    """The tokens of added_tokens.json."""
    path = directory / published_files.ADDED_TOKENS
    if published_files.exists(path):
        for token, number in sorted(published_files.read_ids(path).items(), key=lambda item: item[1]):
            is_special = token in special
            entry = AddedToken(content=token, normalized=not is_special, special=is_special)
            _add(tokenizer, entry, path, number=number)


def _add(tokenizer: Any, token: Token, where: Path, *, number: int | None = None, special: bool = False) -> None:
    """Adds a token, or sets the flags of an existing one. Raises UserError if it has another id than `number`."""
    import tokenizers

    text = content(token)
    if isinstance(token, str):
        there = {entry.content: entry for entry in tokenizer.get_added_tokens_decoder().values()}
        if text in there and there[text].special:
            return
        entry = tokenizers.AddedToken(text, normalized=False, special=True)
    else:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        entry = tokenizers.AddedToken(text, special=special or token.special, **flags)
    tokenizer.add_tokens([entry])
    found = tokenizer.token_to_id(text)
    if number is not None and found != number:
        raise UserError(f"{where}: {text[:60]!r} has the id {number}, but in the vocabulary it is {found}")


def _set_beginning(tokenizer: Any, directory: Path, config: TokenizerConfig, roles: dict[str, Token]) -> None:
    """Sets the token before a text: as add_bos_token says, else as tokenizer.json does, else as BERT's class does."""
    from tokenizers import processors

    path, there = directory / published_files.CONFIG, beginning(tokenizer)
    if config.add_bos_token is None:
        if tokenizer.post_processor is None and "cls_token" in roles and "sep_token" in roles:
            first, last = (content(roles[name]) for name in ("cls_token", "sep_token"))
            tokens = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
            tokenizer.post_processor = processors.TemplateProcessing(f"{first}:0 $A:0 {last}:0", None, tokens)
        return
    if config.add_bos_token and "bos_token" not in roles:
        raise UserError(f"{path}: add_bos_token is true, and there is no bos_token")
    begin = content(roles["bos_token"]) if config.add_bos_token else ""
    tokens = [(begin, tokenizer.token_to_id(begin))] if begin else []
    if there != tuple(number for _, number in tokens):
        if published_files.exists(directory / published_files.TOKENIZER):
            foreign.warn(
                f"{path}: add_bos_token is {json.dumps(config.add_bos_token)}, but tokenizer.json does "
                "not do so; transformers 5 follows tokenizer.json, gptjax the setting"
            )
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin}:0 $A:0" if begin else "$A:0", None, tokens)


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a `tokenizers.Tokenizer` puts before a text when it is asked for special tokens."""
    if tokenizer.post_processor is None:  # a vocabulary of characters may lack the "a" below
        return ()
    whole, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return tuple(whole[: places[0]]) if places and plain else ()


def _set_prefix_space(tokenizer: Any, space: bool, directory: Path) -> None:
    """Sets whether a space is put before a text, if the splitter has such a setting."""
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.to_str())
    splitter = description["pre_tokenizer"] or {}
    changed = False
    for step in [splitter, *splitter.get("pretokenizers", [])]:
        if step.get("type") == "ByteLevel" and step["add_prefix_space"] != space:
            step["add_prefix_space"], changed = space, True
        if step.get("type") == "Metaspace" and (step["prepend_scheme"] != "never") != space:
            step["prepend_scheme"], changed = "first" if space else "never", True
    if changed:
        fresh = guarded(lambda: Tokenizer.from_str(json.dumps(description)), directory / published_files.TOKENIZER)
        tokenizer.pre_tokenizer = fresh.pre_tokenizer


def _splits_chinese(tokenizer: Any) -> bool:
    """Whether it is of BERT's kind, which splits around Chinese characters and decodes with spaces there."""
    parts = json.loads(tokenizer.to_str())
    apart = (parts["normalizer"] or {}).get("handle_chinese_chars", False)
    return apart and (parts["decoder"] or {}).get("type") == "WordPiece"


def _join_chinese(tokenizer: Any) -> None:
    """Removes spaces beside Chinese characters from decoded texts."""
    from tokenizers import Regex, decoders

    joined = decoders.Replace(Regex(_SPACES), "")
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), joined])


def _clean_up(tokenizer: Any) -> None:
    """Removes spaces before punctuation marks from decoded texts."""
    from tokenizers import decoders

    steps = [tokenizer.decoder] if tokenizer.decoder else []
    cleaning = [decoders.Replace(text, text.replace(" ", "")) for text in _CLEAN_UP]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Fuse(), *cleaning])


# ---- The library's errors ------------------------------------------------------------------------------------------


def guarded(make: Callable[[], Any], where: object) -> Any:
    """What `make` returns. Raises UserError for errors of the library: bare Exceptions, and panics of its Rust code."""
    try:
        return make()
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # pyo3's PanicException is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{where} is no tokenizer that can be read: {reason}") from None


def _probe(tokenizer: Any, directory: Path) -> None:
    """Raises UserError if the tokenizer fails at a text, for example with an unknown character."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("type") != "WordLevel":  # our own kinds char, word and jieba are WordLevel and used differently
        guarded(lambda: tokenizer.encode("a\u00e9 \u4e2d\U0001f600\x00\n", add_special_tokens=True), directory)


def _make(directory: Path) -> str:
    return (
        'make a tokenizer.json with transformers: python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\""
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, published_files.MODEL_CONFIG]))
    except Exception as error:  # no network, no such name, no permission, not a name at all
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"tokenizer 'hf:{name}': there is no such directory, and the Hugging Face hub did not give it "
            f"({reason}); name a local directory with tokenizer.json"
        ) from None
