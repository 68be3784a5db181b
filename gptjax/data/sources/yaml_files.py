"""Records of YAML files, within limits, since an anchor may contain itself, or stand for far more than the file."""

import io
from collections.abc import Iterator
from typing import Any

from gptjax.data.sources.base import Faults
from gptjax.data.sources.record import MAX_BYTES, Damaged, Record
from gptjax.data.sources.schemas import ABOUT

MAX_DEPTH = 100  # lists and mappings inside each other
MAX_VALUES = 1_000_000  # of one record, each counted as often as aliases repeat it


def read_yaml(path: str, file: io.IOBase, key: str | None, faults: Faults) -> Iterator[Record]:
    """The entries of the list under `key`; other keys of the file are noted in `faults`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = file.read()
    try:
        text = data.decode("utf-8-sig")
        _check_depth(yaml.parse(text, loader))
        root = yaml.compose(text, loader)
    except Damaged as problem:
        yield Record(path, 1, problem)
        return
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        yield Record(path, 1, Damaged(f"not YAML ({' '.join(str(error).split())[:300]})"))
        return
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    items = next((value for name, value in pairs if name.value == key), None)
    if not isinstance(items, yaml.SequenceNode):
        yield Record(path, 1, Damaged(f"no list {key!r} in the file"))
        return
    for name in {str(name.value) for name, value in pairs if value.value} - {key} - ABOUT:
        faults.note(f"key {name[:60]!r} of files, which nothing reads")
    for number, node in enumerate(items.value, start=1):
        try:
            value = _Values().of(node)
        except Damaged as problem:
            value = problem
        yield Record(f"{path}, line {node.start_mark.line + 1}", number, value)


def _check_depth(events: Iterator[Any]) -> None:
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind in ("SequenceStartEvent", "MappingStartEvent")
        depth -= kind in ("SequenceEndEvent", "MappingEndEvent")
        if depth > MAX_DEPTH:
            raise Damaged(_too_deep(event.start_mark.line + 1))


def _too_deep(line: int) -> str:
    return f"lists or mappings are more than {MAX_DEPTH} deep inside each other in line {line}"


class _Values:
    """The value of one record: lists and text only, since `Yes` and `42` in a dialogue are words."""

    def __init__(self) -> None:
        self._values = self._characters = 0

    def of(self, node: Any, depth: int = 1) -> Any:
        self._values += 1
        if depth > MAX_DEPTH:
            raise Damaged(f"{_too_deep(node.start_mark.line + 1)}; an anchor (&) may contain itself")
        if node.id == "sequence":
            return [self.of(item, depth + 1) for item in node.value]
        if node.id != "scalar":
            return Damaged("a mapping where a statement should be")
        self._characters += len(node.value)
        if self._values > MAX_VALUES or self._characters > MAX_BYTES:
            raise Damaged(f"its aliases (*) stand for more than {MAX_VALUES:,} values or {MAX_BYTES >> 20} MiB of text")
        return node.value
