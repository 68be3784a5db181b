"""Stochastic gradient descent with momentum (Sutskever et al. 2013) and decoupled weight decay, from optax.

beta1 is the momentum: m = beta1 m + gradient. With beta1 = 0 it is plain SGD.
"""

import optax

from gptjax.optim.parts import Parts


def build(parts: Parts) -> optax.GradientTransformation:
    """Momentum, then weight decay, then the learning rate."""
    return optax.chain(optax.trace(decay=parts.hyper["beta1"]), parts.decay, parts.rate("learning_rate"))
