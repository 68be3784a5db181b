"""The common interface of the compilers of train steps: for TPU topologies and for local devices."""

import dataclasses
from collections.abc import Callable

from gptjax.config import Config
from gptjax.planning.facts import Facts


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles train steps for one kind of device.

    Attributes:
      compile: returns the facts of a resolved config; raises UserError for a mesh or a batch that does not divide.
      devices: number of devices, each of `device_kind` with `available_bytes` of memory (None: not known).
      peak: FLOP/s of a device that is not in the tables.
    """

    compile: Callable[[Config], Facts]
    devices: int
    device_kind: str
    available_bytes: int | None
    peak: float | None = None
