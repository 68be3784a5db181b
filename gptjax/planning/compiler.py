"""What compiles train steps, and for which devices."""

import dataclasses
from collections.abc import Callable

from gptjax.config import Config
from gptjax.planning.facts import Facts


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Attributes:
    compile: the facts of a resolved config; raises UserError for a mesh or a batch that does not divide.
    devices: how many, each of `device_kind` with `available_bytes` of memory (None: not known).
    peak: FLOP/s of a device where no table has it.
    """

    compile: Callable[[Config], Facts]
    devices: int
    device_kind: str
    available_bytes: int | None
    peak: float | None = None
