"""The results of compiling a train step, as plain data that processes exchange as JSON."""

import dataclasses
import json
from typing import Any

from gptjax.planning.traffic import Buffer, Collective


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. The aliased part of the outputs reuses the memory of arguments (donated buffers)."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    generated_code: int
    host: int = 0

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True)
class Facts:
    """One train step, compiled for one device of the mesh.

    Attributes:
      devices: number of devices; all are of `device_kind`.
      mesh: devices along each axis.
      parameters: number in the whole model.
      flops_per_token: model FLOPs of one token, forward and backward, by `throughput.CONVENTION`.
      executed_flops: FLOPs of the matrix products and kernels that all devices together run in a step, including
        what rematerialisation repeats.
      memory: None if the program does not fit.
      needed_bytes: for a program that does not fit, the bytes that the compiler says it needs, or None.
      available_bytes: memory of the device according to the compiler or the device; None: not known.
      memory_bytes: bytes read from and written to the main memory of one device in a step.
    """

    topology: str
    devices: int
    device_kind: str
    platform: str
    mesh: dict[str, int]
    rows: int
    context_length: int
    accumulation: int
    parameters: int
    flops_per_token: float
    executed_flops: float
    compute_dtype: str
    memory: Memory | None
    needed_bytes: int | None
    available_bytes: int | None
    memory_bytes: int | None
    collectives: tuple[Collective, ...]
    buffers: tuple[Buffer, ...]
    compile_seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether arguments, outputs, temporaries and code together fit into the memory."""
        return self.memory is not None and (self.available_bytes is None or self.memory.peak <= self.available_bytes)

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context_length

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        values: dict[str, Any] = json.loads(text)
        values["memory"] = values["memory"] and Memory(**values["memory"])
        values["collectives"] = tuple(Collective(**c) for c in values["collectives"])
        values["buffers"] = tuple(Buffer(**b) for b in values["buffers"])
        return cls(**values)
