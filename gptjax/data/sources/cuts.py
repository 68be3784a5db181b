"""Cuts a large file into byte ranges that are read independently."""

import bisect
import itertools

from gptjax.data.documents import last_cut
from gptjax.data.sources.files import File, open_bytes

_WINDOW_BYTES = 1 << 16
_READ_BYTES = 1 << 20


def cut_text(file: File, size: int) -> list[int]:
    """Offsets that cut a text into ranges of about `size` bytes, from 0 to its end.

    They are chosen like the cuts of `gptjax.data.documents.split_text`, so that a byte-level BPE gives the
    same ids to the ranges as to the whole text.
    """
    borders = [0]
    with open_bytes(file.path) as opened:
        for nominal in range(size, file.size, size):
            begin = max(nominal - _WINDOW_BYTES, borders[-1])
            opened.seek(begin)
            border = begin + _last_cut(opened.read(nominal - begin + 8), nominal - begin)
            if borders[-1] < border < file.size:
                borders.append(border)
    return [*borders, file.size]


def _last_cut(window: bytes, size: int) -> int:
    """Offset in `window`, which may begin and end within a character, of the last cut up to `size`."""
    begin = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    text = window[begin:].decode(errors="replace")
    offsets = list(itertools.accumulate((len(character.encode()) for character in text), initial=begin))
    if offsets[-1] < size:
        return size
    characters = bisect.bisect_right(offsets, size) - 1
    cut = offsets[last_cut(text, characters)]
    is_utf8 = window[begin:cut].decode(errors="replace").encode() == window[begin:cut]
    return cut if is_utf8 else _character_start(window, size)


def _character_start(window: bytes, size: int) -> int:
    while size and window[size : size + 1] and window[size] & 0xC0 == 0x80:
        size -= 1
    return size


def cut_lines(file: File, size: int) -> list[tuple[int, int]]:
    """(offset, lines before it) of the borders between lines that cut a file into ranges of `size` bytes or more.

    Reads the whole file once to count lines.
    """
    borders = [(0, 0)]
    position = lines = 0
    with open_bytes(file.path) as opened:
        while data := opened.read(_READ_BYTES):
            start = 0
            while end := data.find(b"\n", max(borders[-1][0] + size - position - 1, start)) + 1:
                lines += data.count(b"\n", start, end)
                borders.append((position + end, lines))
                start = end
            lines += data.count(b"\n", start)
            position += len(data)
    if borders[-1][0] < position:
        borders.append((position, lines))
    return borders
