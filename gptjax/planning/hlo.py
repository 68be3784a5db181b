"""Reads the text of an optimised XLA program: its instructions, their shapes in memory, and how often each runs."""

import dataclasses
import json
import math
import re

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """One array; `layout` is the text in braces, e.g. "1,0:T(8,128)(2,1)S(1)"."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements themselves."""
        return math.ceil(math.prod(self.dims) * BYTES.get(self.dtype, 1))

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory, where the dimensions that vary fastest are padded to whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.num_bytes
        dims = list(self.dims)
        sizes = [int(n) for n in tile[1].split(",")]
        minor_to_major = [int(n) for n in order.split(",")]
        for axis, size in zip(minor_to_major, reversed(sizes), strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        return math.ceil(math.prod(dims) * BYTES.get(self.dtype, 1))

    @property
    def in_main_memory(self) -> bool:
        """Whether the array is in HBM (RAM on a CPU), and not in scratch memory or on the host."""
        return "S(" not in self.layout

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shapes`: the arrays of the result, flattened; `rest`: the text after the operands."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The name that an attribute such as body=%region_1 refers to."""
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The place in the source program that it comes from, e.g. "jit(step)/jvp()/while/body/dot_general"."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1].replace("\\'", "'") if match else ""


class Program:
    """The computations of an optimised module.

    Attributes:
      computations: {name: {instruction name: Instruction}} in the order of the text.
      entry: name of the computation with which the program starts.
      counts: {name: executions per run of the program}, without computations that never run by themselves (the
        scalar functions of reductions). The body of a loop counts once per iteration.
      fused: names of the computations inside fusions, whose results stay in registers and scratch memory.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                if header := _COMPUTATION.match(line):
                    current = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif instruction := parse_instruction(line):
                current[instruction.name] = instruction
        self.counts: dict[str, float] = {}
        self.fused: set[str] = set()
        if self.entry:
            self._count(self.entry, 1)

    def _count(self, computation: str, times: float) -> None:
        self.counts[computation] = self.counts.get(computation, 0) + times
        for instruction in self.computations[computation].values():
            for name, turns in self._called(instruction):
                if name in self.computations:
                    if instruction.opcode == "fusion" or computation in self.fused:
                        self.fused.add(name)
                    self._count(name, times * turns)

    def _called(self, instruction: Instruction) -> list[tuple[str, int]]:
        """(computation, number of runs) for all computations that an instruction calls."""
        if instruction.opcode == "while":
            return [(instruction.attribute("body") or "", self.trip_count(instruction))]
        if instruction.opcode == "conditional":  # any one of its branches; branches of a train step are alike
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            names = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
            names += [n for n in map(instruction.attribute, ("true_computation", "false_computation")) if n]
            return [(name, 1) for name in names[:1]]
        called = instruction.attribute("calls")
        if called is None and instruction.opcode == "call":
            called = instruction.attribute("to_apply")
        return [(called, 1)] if called else []

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a loop that counts from zero: the compiler's note, else the bound in its condition, else 1."""
        if known := re.search(r'"known_trip_count":(\{[^}]*\})', loop.rest):
            return int(json.loads(known[1])["n"])
        condition = self.computations.get(loop.attribute("condition") or "", {})
        constants = {
            name: int(i.arguments)
            for name, i in condition.items()
            if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments)
        }
        root = next((i for i in condition.values() if i.is_root), None)
        if root is None:
            return 1
        bounds = [constants[name] for name in root.operands if name in constants]
        direction = re.search(r"direction=(LT|LE|GT|GE|NE)", root.rest)
        if len(bounds) != 1 or not (direction or root.opcode == "fusion"):
            return 1
        return max(bounds[0] + (direction is not None and direction[1] in ("LE", "GE")), 1)


def parse_instruction(line: str) -> Instruction | None:
    """The instruction in a line, or None for other lines."""
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    text = match[3]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shapes = tuple(
        ArrayShape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _ARRAY.findall(text[:end])
    )
    opcode = _OPCODE.match(text, end)
    if not opcode:
        return None
    start = opcode.end() - 1
    close = _closing(text, start)
    arguments = text[start + 1 : close]
    operands = tuple(re.findall(r"%([\w.-]+)", arguments))
    return Instruction(match[2], opcode[1], shapes, operands, arguments, text[close + 1 :], bool(match[1]))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text) - 1
