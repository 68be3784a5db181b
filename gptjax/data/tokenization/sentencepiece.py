"""A SentencePiece model (tokenizer.model) as a tokenizer of the library `tokenizers`."""

import functools
import re
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.errors import UserError

SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # SentencePiece's numbers for kinds of models
_CONTROL, _USER_DEFINED = 3, 4  # and of pieces
_FIELDS: dict[str, dict[str, tuple[int, str, str | None]]] = {  # number, kind, default
    "Piece": {"piece": (1, "STRING", None), "score": (2, "FLOAT", None), "type": (3, "INT32", "1")},
    "Trainer": {
        "model_type": (3, "INT32", "1"),
        "treat_whitespace_as_suffix": (24, "BOOL", None),
        "byte_fallback": (35, "BOOL", None),
        "unk_id": (40, "INT32", "0"),
        "bos_id": (41, "INT32", "1"),
        "eos_id": (42, "INT32", "2"),
        "unk_piece": (45, "STRING", "<unk>"),
    },
    "Normalizer": {
        "precompiled_charsmap": (2, "BYTES", None),
        "add_dummy_prefix": (3, "BOOL", "true"),
        "remove_extra_whitespaces": (4, "BOOL", "true"),
        "escape_whitespaces": (5, "BOOL", "true"),
    },
    "Model": {
        "pieces": (1, "Piece", None),
        "trainer_spec": (2, "Trainer", None),
        "normalizer_spec": (3, "Normalizer", None),
    },
}


def read(path: Path, *, add_prefix_space: bool | None = None) -> tuple[Any, dict[str, str]]:
    """(tokenizer, {role: special token}) of a SentencePiece model of the kind unigram or BPE.

    Args:
      add_prefix_space: whether a text gets a space before it; default: what the model says.

    Raises UserError if the file is not such a model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = _parse(path)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{path}: a SentencePiece model of words or characters; only unigram and BPE models are read")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise UserError(f"{path}: SentencePiece models that mark spaces after a word, or not at all, are not read")
    if not 0 <= trainer.unk_id < len(proto.pieces):
        raise UserError(f"{path}: a SentencePiece model without a piece for unknown text is not read")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        model = models.Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(proto, vocabulary),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    tokenizer = Tokenizer(model)
    prefix = spec.add_dummy_prefix if add_prefix_space is None else add_prefix_space
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if trainer.model_type == _UNIGRAM and (controls := _splits_of_controls(proto)):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(controls), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    return tokenizer, {role: pieces[number][0] for role, number in ids.items() if 0 <= number < len(pieces)}


def _splits_of_controls(proto: Any) -> str:
    """A pattern that cuts text after the first character of a control piece, so that none is found in a text.

    BPE models need no such cut, since no merge makes a control piece.
    """
    controls = [piece.piece for piece in proto.pieces if piece.type == _CONTROL and len(piece.piece) > 1]
    return "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in controls)


def _parse(path: Path) -> Any:
    """The parts of the model that are needed here, as a message of protobuf."""
    from google.protobuf.message import DecodeError

    proto = _message_class()()
    try:
        proto.ParseFromString(files.regular(path).read_bytes())
        wrong = None if proto.pieces else "it has no pieces"
    except DecodeError:
        wrong = "the file is cut off, or of another kind"
    except OSError as error:
        wrong = files.words(error)
    if wrong:
        raise UserError(f"{path} is not a SentencePiece model: {wrong}")
    return proto


@functools.cache
def _message_class() -> Any:
    """The fields of sentencepiece_model.proto that are read here.

    The generated module of the library sentencepiece would bind its users to one version of protobuf.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="gptjax/sentencepiece.proto", package="gptjax.sentencepiece")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, default) in fields.items():
            entry = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if kind in _FIELDS:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".gptjax.sentencepiece.{kind}"
                entry.label = kinds.LABEL_REPEATED if field == "pieces" else kinds.LABEL_OPTIONAL
            else:
                entry.type = getattr(kinds, f"TYPE_{kind}")
            if default is not None:
                entry.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gptjax.sentencepiece.Model"))


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece; pieces with a higher score, which are joined first, come first."""
    found = []
    for number, piece in enumerate(proto.pieces):
        if piece.type in (_CONTROL, _USER_DEFINED):
            continue
        text = piece.piece
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        found += [(-piece.score, number, vocabulary[left], vocabulary[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(found)]
