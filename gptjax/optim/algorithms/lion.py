"""Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled weight decay, from optax.

Its updates are larger than Adam's; the paper's learning rates are 3 to 10 times smaller than AdamW's, and its weight
decay is larger by the same factor. beta1 interpolates, beta2 decays the momentum.
"""

import optax

from gptjax.optim.hyper import Hyper, rate


def build(hyper: Hyper, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """The sign, then weight decay, then the learning rate."""
    return optax.chain(optax.scale_by_lion(b1=hyper["beta1"], b2=hyper["beta2"]), decay, rate(hyper["learning_rate"]))
