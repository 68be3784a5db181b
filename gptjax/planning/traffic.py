"""The traffic of an optimised program: between chips, by kind of collective, and with memory; its largest buffers."""

import dataclasses
import math
import re

from gptjax.planning.hlo import ArrayShape, Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These instructions only name, regroup or pass on the results of others.
_ALIASES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "optimization-barrier", "partition-id", "replica-id", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step, on one chip.

    Attributes:
      count: how many run in a step; one in a loop counts once per iteration.
      payload_bytes: size of the array that is gathered, reduced, scattered or permuted, on one chip.
      sent_bytes: bytes that the ring algorithm sends from one chip: (n - 1) / n of the payload in a group of n, twice
        as much for all-reduce, the whole payload for collective-permute.
    """

    kind: str
    count: int
    payload_bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Results of one shape from one place in the source; `count` of them are in the program's text."""

    shape: str
    num_bytes: int
    count: int
    opcode: str
    op_name: str


def collectives(program: Program) -> list[Collective]:
    """The collectives of a step by kind, largest traffic first.

    TPU programs split one collective over several fusions that share its channel; such a collective counts once.
    """
    found: dict[str, tuple[str, float, float, float]] = {}
    for computation, times in program.counts.items():
        for instruction in program.computations[computation].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            group = group_size(instruction.rest)
            if group == 1:
                continue
            scatter = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
            payload = _payload(instruction, program.computations[computation], kind)
            kind = "reduce-scatter" if scatter else kind
            share = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1}.get(kind, (group - 1) / group)
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel[1] if channel else f"{computation}/{instruction.name}"
            if key not in found or found[key][1] < times:
                found[key] = (kind, times, payload * times, payload * share * times)
    totals: dict[str, list[float]] = {}
    for kind, *values in found.values():
        totals[kind] = [a + b for a, b in zip(totals.get(kind, [0, 0, 0]), values, strict=True)]
    result = [Collective(kind, *(round(v) for v in values)) for kind, values in totals.items()]
    return sorted(result, key=lambda c: -c.sent_bytes)


def _payload(instruction: Instruction, computation: dict[str, Instruction], kind: str) -> int:
    """Bytes of the whole array: the result, or the operands if the result is smaller than them or contains them."""
    result = sum(shape.num_bytes for shape in instruction.shapes)
    operands = sum(
        s.num_bytes for name in instruction.operands if name in computation for s in computation[name].shapes
    )
    if instruction.opcode.endswith("-start"):  # (operands, results, and what the compiler needs)
        if kind in ("all-gather", "all-to-all") and operands:
            sizes = [shape.num_bytes for shape in instruction.shapes]
            return sum(sizes) - operands if kind == "all-gather" else operands
        return operands or result
    return operands if kind == "reduce-scatter" and operands else result


def group_size(attributes: str) -> int:
    """Chips that take part in one group of a collective."""
    if "source_target_pairs=" in attributes:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        moves = re.findall(r"\{(\d+),(\d+)", pairs[0] + "}" if pairs else "")
        return 2 if any(a != b for a, b in moves) or not moves else 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    return 2  # all devices; their number is not in the text, so this is a lower bound


def memory_bytes(program: Program) -> int:
    """Bytes that one step reads from and writes to a chip's main memory.

    Every instruction reads its operands and writes its results once; a fusion that slices an operand reads the
    slice, one that updates a slice in place writes the slice. Kernels are assumed to do the same. Collectives are
    not counted.
    """
    total = 0.0
    for computation, times in program.counts.items():
        if computation in program.fused:
            continue
        instructions = program.computations[computation]
        for instruction in instructions.values():
            total += times * _touched(program, instructions, instruction)
    return round(total)


def largest_buffers(program: Program, limit: int = 10) -> list[Buffer]:
    """The largest results in main memory, without arguments. Equal results from one place are one entry."""
    found: dict[tuple[str, str], Buffer] = {}
    for computation in program.counts:
        if computation in program.fused:
            continue
        for instruction in program.computations[computation].values():
            if instruction.opcode in _ALIASES or instruction.opcode.endswith("-done"):
                continue
            passed_on = _passed_on(program, program.computations[computation], instruction)
            for shape in instruction.shapes:
                if not shape.in_main_memory or shape in passed_on:
                    continue
                key = (str(shape), instruction.op_name)
                count = found[key].count + 1 if key in found else 1
                found[key] = Buffer(str(shape), shape.padded_bytes, count, instruction.opcode, instruction.op_name)
    return sorted(found.values(), key=lambda b: -b.num_bytes)[:limit]


def _passed_on(program: Program, instructions: dict[str, Instruction], instruction: Instruction) -> set[ArrayShape]:
    """The values that a fusion passes on unchanged, because it computes while a collective is running."""
    fused = program.computations.get(instruction.attribute("calls") or "") if instruction.opcode == "fusion" else None
    if not fused or all(i.opcode.removesuffix("-start") not in COLLECTIVES for i in fused.values()):
        return set()
    return {shape for name in instruction.operands if name in instructions for shape in instructions[name].shapes}


def _touched(program: Program, instructions: dict[str, Instruction], instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _ALIASES or opcode.endswith("-done") or opcode.removesuffix("-start") in COLLECTIVES:
        return 0
    if opcode == "dynamic-slice":
        return 2 * _main(instruction.shapes)
    if opcode == "dynamic-update-slice":
        update = instructions.get(instruction.operands[1]) if len(instruction.operands) > 1 else None
        return 2 * _main(update.shapes) if update else 0
    operands = [instructions[name].shapes if name in instructions else () for name in instruction.operands]
    fused = program.computations.get(instruction.attribute("calls") or "") if opcode == "fusion" else None
    if not fused:
        return _main(instruction.shapes) + sum(map(_main, operands))
    if any(i.opcode.removesuffix("-start") in COLLECTIVES for i in fused.values()):
        return sum(_touched(program, fused, i) for i in fused.values())
    return _read(fused, operands) + _written(fused, instruction.shapes)


def _read(fused: dict[str, Instruction], operands: list[tuple[ArrayShape, ...]]) -> float:
    """Bytes of its operands that a fusion reads."""
    users: dict[str, list[Instruction]] = {}
    for instruction in fused.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    total = 0.0
    for parameter in fused.values():
        if parameter.opcode != "parameter" or not _main(operands[int(parameter.arguments)]):
            continue
        name, used = parameter.name, users.get(parameter.name, [])
        while len(used) == 1 and used[0].opcode == "bitcast":
            name, used = used[0].name, users.get(used[0].name, [])
        if used and all(u.opcode == "dynamic-slice" for u in used):
            total += sum(u.shapes[0].num_bytes for u in used)
        elif not all(u.opcode == "dynamic-update-slice" and u.operands[0] == name for u in used):
            total += _main(operands[int(parameter.arguments)])
    return total


def _written(fused: dict[str, Instruction], shapes: tuple[ArrayShape, ...]) -> float:
    """Bytes of its results that a fusion writes."""
    root = next(i for i in fused.values() if i.is_root)
    results = [fused.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for result, shape in zip(results, shapes, strict=False):
        while result and result.opcode == "bitcast":
            result = fused.get(result.operands[0])
        if not shape.in_main_memory or result is None or result.opcode == "parameter":
            continue
        update = fused.get(result.operands[1]) if result.opcode == "dynamic-update-slice" else None
        total += update.shapes[0].num_bytes if update else shape.padded_bytes
    return total


def _main(shapes: tuple[ArrayShape, ...]) -> float:
    return sum(shape.padded_bytes for shape in shapes if shape.in_main_memory)
