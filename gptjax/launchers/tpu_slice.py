"""Slices of TPU chips: topologies, machines, and their names in gcloud and GKE."""

import dataclasses
import math
import re
from collections.abc import Callable

from gptjax.errors import UserError

MOST_CHIPS = 8960  # of a v5p


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation under its names in gcloud and GKE.

    Attributes:
      accelerator_type: gcloud's name for a number of chips; v4 and v5p count cores, two per chip.
      dimensions: number of dimensions of a topology.
      largest_host: chips of the largest machine that is a slice by itself. In larger slices, machines have four chips.
    """

    accelerator_type: Callable[[int], str]
    runtime_version: str
    gke_accelerator: str
    dimensions: int
    largest_host: int


GENERATIONS = {
    "v4": Generation(lambda chips: f"v4-{2 * chips}", "tpu-ubuntu2204-base", "tpu-v4-podslice", 3, 4),
    "v5e": Generation(lambda chips: f"v5litepod-{chips}", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2, 8),
    "v5p": Generation(lambda chips: f"v5p-{2 * chips}", "v2-alpha-tpuv5", "tpu-v5p-slice", 3, 4),
    "v6e": Generation(lambda chips: f"v6e-{chips}", "v2-alpha-tpuv6e", "tpu-v6e-slice", 2, 8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips: "v5e:4x4" has 16 chips on 4 hosts."""

    generation: Generation
    topology: str

    @classmethod
    def parse(cls, text: str) -> "Slice":
        name, _, topology = text.partition(":")
        if name not in GENERATIONS:
            raise UserError(f"--topology={text[:60]}: the generations are {', '.join(GENERATIONS)}, as in v5e:4x4")
        dimensions = GENERATIONS[name].dimensions
        if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * dimensions), topology, re.ASCII):
            example = "4x4x4" if dimensions == 3 else "4x4"
            raise UserError(
                f"--topology={text[:60]}: one of {name} has {dimensions} dimensions, as in {name}:{example}"
            )
        found = cls(GENERATIONS[name], topology)
        if found.chips > MOST_CHIPS:
            raise UserError(f"--topology={text}: {found.chips} chips; the largest slice has {MOST_CHIPS}")
        if found.chips > found.generation.largest_host and found.chips % 4:
            raise UserError(f"--topology={text}: {found.chips} chips are not a whole number of machines with 4 each")
        return found

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.generation.largest_host else self.chips // 4

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts
