"""AdamW (Loshchilov and Hutter 2019): Adam with decoupled weight decay, from optax."""

import optax

from gptjax.optim.parts import Parts
from gptjax.parameters import map_rows


def build(parts: Parts) -> optax.GradientTransformation:
    """Moments, then weight decay, then the learning rate."""
    hyper = parts.hyper
    adam = optax.scale_by_adam(b1=hyper["beta1"], b2=hyper["beta2"], eps=hyper["epsilon"])
    # Masked as in optax.adamw, so that the state keeps the structure that it has in checkpoints.
    masked = optax.masked(parts.decay, lambda params: map_rows(lambda row, _: row.decayed, params))
    return optax.chain(adam, masked, parts.rate("learning_rate"))
