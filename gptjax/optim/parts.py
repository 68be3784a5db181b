"""What an algorithm is built from."""

import dataclasses
from collections.abc import Callable

import optax
from ml_collections import ConfigDict

from gptjax.optim.hyper import Hyper


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that all algorithms share.

    Attributes:
      options: `config.optimizer`; an algorithm reads only options that are not numbers from it.
      hyper: this step's hyper-parameters, which may be traced.
      decay: adds weight decay to the update; comes before the learning rate.
      rate: `rate("learning_rate")` multiplies by minus that learning rate and by the multiplier of each path.
    """

    options: ConfigDict
    hyper: Hyper
    decay: optax.GradientTransformation
    rate: Callable[[str], optax.GradientTransformation]
