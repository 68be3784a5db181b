"""Hyper-parameters as inputs of a step: the values of the options that affect "hyper", at each step.

A compiled step takes them as arrays, so that one program serves all values, and `vmap` packs runs that differ only in
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gptjax.config import Config, affecting, stages
from gptjax.errors import UserError
from gptjax.optim.gathering import update_steps
from gptjax.optim.schedules import make_schedule

# {name of option: float32 scalar}, UPDATES, and `dropout_key`: uint32 [2]; on devices, on the host, or traced.
Hyper = dict[str, ArrayLike]
UPDATES = "updates"  # in Hyper: whether a step ends with an update; only where config.schedule.batch_stages is set
SECTIONS = ("optimizer", "objective", "train")


def names() -> dict[str, str]:
    """{name in Hyper: "section.name"}; names that end in learning_rate follow the schedule."""
    paths = sorted(path for path in affecting("hyper") if path.startswith(tuple(f"{s}." for s in SECTIONS)))
    return {path.rpartition(".")[2]: path for path in paths}


class Hyperparameters:
    """The hyper-parameters of a resolved config at any step, on the host.

    Attributes:
      constant: the hyper-parameters that are the same at every step.
    """

    def __init__(self, config: Config):
        """Raises UserError for a value that is not finite in float32."""
        self.constant: Hyper = {}
        self._peaks: dict[str, float] = {}
        for name, path in names().items():
            section, _, option = path.partition(".")
            value = config[section][option]
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(value)):
                    raise UserError(f"{path} is {value}, which is not a finite number in float32")
            if name.endswith("learning_rate"):
                self._peaks[name] = value
            else:
                self.constant[name] = np.float32(value)
        if not config.optimizer.clip_norm:
            self.constant["clip_norm"] = np.float32(np.inf)
        self.constant["dropout_key"] = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
        # All learning rates are computed on the host by one program, before a run starts and without its mesh.
        num_steps, peaks = config.train.num_steps, self._peaks.items()
        schedules = {name: make_schedule(config.schedule, peak=peak, num_steps=num_steps) for name, peak in peaks}

        @jax.jit
        def rates(steps: jax.Array) -> dict[str, jax.Array]:
            return {name: jax.vmap(schedule)(steps).astype(jnp.float32) for name, schedule in schedules.items()}

        self._rates = jax.device_get(rates(jnp.arange(max(num_steps, 1))))
        if found := [(int(begin), batches) for begin, batches in stages.read(config.schedule.batch_stages)]:
            self._rates[UPDATES] = np.float32(update_steps(found, num_steps))

    def at(self, step: int) -> Hyper:
        """This step's values."""
        return self.constant | self.rates(step)

    def rates(self, step: int) -> Hyper:
        """This step's learning rates and, with `batch_stages`, whether it ends with an update."""
        return {name: rates[min(step, len(rates) - 1)] for name, rates in self._rates.items()}
