"""The TPU chips and slices that can be rented, and the figures of their data sheets."""

import dataclasses
import math
import re

from gptjax.config.values import shown
from gptjax.errors import UserError

GIB = 2**30
MOST_SLICES = 256


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, per chip.

    Sources: for TPUs cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e ("key chip specifications"); for GPUs NVIDIA's
    data sheets. Rates are peaks; programs reach less.

    Attributes:
      usable_gib: the part of the memory (v4 32 GiB, v5e 16, v5p 96, v6e 32) that a program may use: for a TPU as the
        compiler (libtpu 0.0.50) reports it for programs that are too large, for a GPU as the driver reports it.
      memory_rate: bytes per second to and from HBM.
      link_rate: bytes per second that leave a chip over all its links together (half of the bidirectional figure).
      shapes: slices that can be rented as one; others of the same kind also compile.
    """

    name: str
    device_kind: str
    usable_gib: float
    memory_rate: float
    link_rate: float
    cores: int = 1
    shapes: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        return int(self.usable_gib * GIB)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

TPUS = {
    chip.name: chip
    for chip in (
        # Peak bfloat16 FLOP/s are in training.throughput. The v4 page gives no ICI figure per chip: six links of
        # 50 GB/s each way (Jouppi et al. 2023, "TPU v4", table 4).
        Chip("v4", "TPU v4", 30.75, 1.2e12, 300e9, 2, _CUBES),
        Chip("v5e", "TPU v5 lite", 15.75, 819e9, 200e9, 1, _FLAT),
        Chip("v5p", "TPU v5p", 95.73, 2.765e12, 600e9, 2, (*_CUBES, "16x16x24")),
        Chip("v6e", "TPU v6 lite", 31.24, 1.6e12, 400e9, 1, _FLAT),
    )
}
GPUS = (
    # NVLink, one direction
    Chip("H200", "NVIDIA H200", 140.4, 4.8e12, 450e9),
    Chip("H100", "NVIDIA H100", 79.6, 3.35e12, 450e9),
    Chip("A100", "NVIDIA A100", 79.2, 2.0e12, 300e9),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or several joined by the data-centre network."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(map(int, self.shape.split("x")))

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.shape}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse_topology(text: str) -> Topology:
    """The topology named "v5e:4x4", or "v5e:4x4*2" for two slices. Raises UserError that lists the known names."""
    match = re.fullmatch(r"([a-z0-9]+):(\d{1,6}(?:x\d{1,6})*)(?:\*(\d{1,6}))?", text, re.ASCII)
    chip = TPUS.get(match[1]) if match else None
    if match is None or chip is None:
        raise UserError(f"--topology={shown(text)[1:-1]}: there is no such topology; choose from {listing()}")
    sizes = [int(n) for n in match[2].split("x")]
    # A slice consists of hosts of four chips, or is a part of one host.
    wanted = len(chip.shapes[0].split("x"))
    largest = math.prod(map(int, chip.shapes[-1].split("x")))
    regular = match[2] in chip.shapes or (len(sizes) == wanted and sizes[0] % 2 == sizes[1] % 2 == 0 and all(sizes))
    slices = int(match[3] or 1)
    if not regular or math.prod(sizes) > largest:
        shapes = ", ".join(f"{chip.name}:{shape}" for shape in chip.shapes)
        raise UserError(f"--topology={text}: {chip.name} has no such slice; choose from {shapes}")
    if not 1 <= slices <= MOST_SLICES:
        raise UserError(f"--topology={text}: {slices} slices; a run can join 1 to {MOST_SLICES}")
    return Topology(chip, match[2], slices)


def listing() -> str:
    """The names of all slices, in one line."""
    kinds = (f"{chip.name}:{{{','.join(chip.shapes)}}}" for chip in TPUS.values())
    return f"{', '.join(kinds)}; several slices: v5e:16x16*2; the devices of this machine: local"


def find(device_kind: str) -> Chip | None:
    """The chip with this `jax.Device.device_kind`, or None if it is not in the table."""
    if device_kind == "TPU v5":  # the compiler's name of a v5p
        return TPUS["v5p"]
    return next((c for c in (*TPUS.values(), *GPUS) if device_kind.startswith(c.device_kind)), None)
