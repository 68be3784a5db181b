"""Reads text files in other encodings than UTF-8, by their byte-order mark or the option data.encoding."""

import codecs
import io
from typing import Any

from gptjax.data.sources.base import Faults
from gptjax.data.sources.utf8 import REPLACE, Utf8Decoder
from gptjax.errors import UserError

_MARKS = (  # UTF-32's first: it begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ESCAPES = (
    "idna",
    "punycode",
    "unicode-escape",
    "raw-unicode-escape",
)  # encodings for names and programs, not for files
_READ_BYTES = 1 << 20


def checked(name: str) -> str:
    """The standard name of an encoding: "utf-8" for UTF8. Raises UserError if Python has no such text encoding."""
    try:
        found = codecs.lookup(name)
        if found.name in _ESCAPES:
            raise LookupError(name)
        "".encode(found.name)  # raises for codecs that encode no text, such as zip
        codecs.getincrementaldecoder(found.name)("strict").decode(b"", True)
    except (LookupError, UnicodeError, ValueError):
        raise UserError(
            f"data.encoding={name[:60]!r} is not a known text encoding: expected a name such as utf-8, "
            "gb18030, big5, utf-16, shift_jis, euc-kr, latin-1 or windows-1252"
        ) from None
    return {"utf-8-sig": "utf-8"}.get(found.name, found.name)


def encoding_of(file: Any, encoding: str) -> str:
    """The encoding of a file that is open at its beginning: as its byte-order mark says, else `encoding`."""
    if hasattr(file, "peek"):
        head = file.peek(4)[:4]
    else:
        head = file.read(4)
        file.seek(0)
    return next((name for mark, name in _MARKS if head.startswith(mark)), encoding)


def as_utf8(file: io.IOBase, encoding: str, decode_errors: str, where: str, faults: Faults) -> io.IOBase:
    """The bytes of a text converted to UTF-8; `file` is open at its beginning.

    Reading raises UserError at a byte that is wrong in the encoding, or writes U+FFFD and counts it in `faults`. With
    decode_errors "reject", a UTF-8 file is returned unchecked.
    """
    encoding = encoding_of(file, encoding)
    if encoding == "utf-8" and decode_errors == "reject":
        return file
    if encoding == "utf-8":
        decoder = Utf8Decoder(decode_errors, where, offset=1)  # not at 0, where it would drop a mark
    else:
        decoder = _Decoder(decode_errors, where, encoding)
    return io.BufferedReader(_Transcoded(file, decoder, faults), _READ_BYTES)


class _Decoder:
    """Like `Utf8Decoder`, for other encodings; a byte-order mark that decodes to a character stays."""

    def __init__(self, decode_errors: str, where: str, encoding: str):
        self.replaced = 0
        self._where = where
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("strict" if decode_errors == "reject" else "replace")
        self._consumed = 0

    def decode(self, data: bytes, *, final: bool = False) -> str:
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            offset = self._consumed - len(pending) + error.start
            raise UserError(
                f"{self._where}: byte {error.object[error.start]:#04x} at offset {offset} is not {self._encoding}; "
                f"name the encoding of the text: --config.data.encoding=NAME, or continue {REPLACE}"
            ) from None
        except UnicodeError:  # UTF-16 that is cut off, or lacks a needed mark
            raise UserError(f"{self._where}: from offset {self._consumed} on it is not {self._encoding}") from None
        self._consumed += len(data)
        self.replaced += text.count("\ufffd")
        return text


class _Transcoded(io.RawIOBase):
    """The text that a decoder reads from a file, as UTF-8."""

    def __init__(self, file: io.IOBase, decoder: Utf8Decoder | _Decoder, faults: Faults):
        self._file = file
        self._faults = faults
        self._decoder = decoder
        self._decoded = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        final = False
        while not self._decoded and not final:
            data = self._file.read(_READ_BYTES)
            final = not data
            self._decoded = self._decoder.decode(data, final=final).encode("utf-8", "surrogatepass")
        data, self._decoded = self._decoded[: len(buffer)], self._decoded[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._faults.replaced += self._decoder.replaced
            self._file.close()
        super().close()
