"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), from optax.

y = (1 - beta1) z + beta1 x: gradients are taken at y, AdamW without momentum moves z, and x is the average of z,
weighted by the square of the highest learning rate so far. The parameters of a training state are y; its average,
which evaluation uses, is x. Use a warm-up without a decay: `schedule.name=constant`.
"""

from typing import Any

import jax
import optax

from gptjax.optim.hyper import Hyper
from gptjax.optim.parts import Parts


def build(parts: Parts) -> optax.GradientTransformation:
    """The second moment, then weight decay at y, then the learning rate, then the average."""
    hyper = parts.hyper
    adam = optax.scale_by_rms(hyper["beta2"], hyper["epsilon"], eps_in_sqrt=False, bias_correction=True)
    adamw = optax.chain(adam, parts.decay, parts.rate("learning_rate"))
    return optax.contrib.schedule_free(adamw, hyper["learning_rate"], b1=hyper["beta1"])


def average(hyper: Hyper, state: Any, params: Any) -> Any:
    """x, from the state of the optimizer and y."""
    is_own = lambda part: isinstance(part, optax.contrib.ScheduleFreeState)  # noqa: E731
    own = next(part for part in jax.tree.leaves(state, is_leaf=is_own) if is_own(part))
    # Replaced because the state holds the b1 with which it was initialised, not this step's.
    return optax.contrib.schedule_free_eval_params(own._replace(b1=hyper["beta1"]), params)
