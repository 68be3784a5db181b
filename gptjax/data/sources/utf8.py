"""UTF-8 bytes to text; names the place of bytes that are not UTF-8."""

import codecs

from gptjax.config import OPTIONS
from gptjax.errors import UserError

DECODE_ERRORS = OPTIONS["data"]["decode_errors"].choices
REPLACE = "with U+FFFD in its place: --config.data.decode_errors=replace"
_SAMPLE_BYTES = 1 << 14


class Utf8Decoder:
    """Decodes one byte stream piece by piece, without its byte order mark.

    Attributes:
      replaced: U+FFFD written so far for bytes that are not UTF-8, as many as
        `bytes.decode(errors="replace")` writes.
    """

    def __init__(self, decode_errors: str, where: str, *, offset: int = 0):
        """`where`, and the `offset` of the first byte, are for the message about a byte that is not UTF-8."""
        self.replaced = 0
        self._strict = decode_errors == "reject"
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict" if self._strict else "replace")
        self._consumed = offset
        self._tail = b""
        self._at_start = offset == 0

    def decode(self, data: bytes, *, final: bool = False) -> str:
        """The text of the next bytes, up to the last whole character.

        Raises:
          UserError: a byte is not UTF-8 and decode_errors is "reject"; names the place and the byte's offset.
        """
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            offset = self._consumed - pending + error.start
            raise UserError(
                f"{self._where}: byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8; "
                f"{other_encoding(error.object[error.start :])}, or continue {REPLACE}"
            ) from None
        self._consumed += len(data)
        if not self._strict:
            self._count_replaced(data, text)
        if self._at_start and text:
            text = text.removeprefix("\ufeff")
            self._at_start = False
        return text

    def _count_replaced(self, data: bytes, text: str) -> None:
        # A U+FFFD that the bytes contain is not an error, and it may be cut between two calls.
        window = self._tail + data
        self.replaced += text.count("\ufffd") - window.count(b"\xef\xbf\xbd")
        self._tail = window[-2:]


def other_encoding(data: bytes, *, has_option: bool = True) -> str:
    """Advice for bytes that are not UTF-8, from the first bad one on: the encoding that they seem to have.

    `has_option`: whether data.encoding applies to the file; otherwise the advice is to convert the file.
    """
    if name := seeming_encoding(data):
        advice = f"--config.data.encoding={name}" if has_option else "convert the file to UTF-8"
        return f"it reads as Chinese in {name.upper()}: {advice}"
    if not has_option:
        return "convert the file to UTF-8"
    return "name its encoding: --config.data.encoding=NAME, such as gb18030, latin-1 or utf-16"


def seeming_encoding(data: bytes) -> str:
    """The encoding of Chinese in which bytes that are not UTF-8 read as common characters, or an empty text."""
    data = data[:_SAMPLE_BYTES]
    for name, is_common in (("gb18030", _is_common_gb), ("big5", _is_common_big5)):
        try:
            text = codecs.getincrementaldecoder(name)("strict").decode(data)
        except UnicodeDecodeError:
            continue
        wide = [character.encode(name) for character in text if ord(character) > 0x7F]
        if len(wide) >= 2 and sum(map(is_common, wide)) >= 0.9 * len(wide):
            return name
    return ""


def _is_common_gb(character: bytes) -> bool:
    """Punctuation, full-width forms, or one of the 3,755 characters of GB 2312 that are used most."""
    return (
        len(character) == 2 and character[1] >= 0xA1 and (0xA1 <= character[0] <= 0xA3 or 0xB0 <= character[0] <= 0xD7)
    )


def _is_common_big5(character: bytes) -> bool:
    """Punctuation or one of the 5,401 characters of Big5 that are used most."""
    return len(character) == 2 and 0xA1 <= character[0] <= 0xC6


def decode_all(data: bytes, decode_errors: str, where: str) -> tuple[str, int]:
    """The text of `data` and how many U+FFFD were written for bytes that are not UTF-8; see `Utf8Decoder`."""
    decoder = Utf8Decoder(decode_errors, where)
    return decoder.decode(data, final=True), decoder.replaced
