"""Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled weight decay, from optax.

Its updates are larger than Adam's; the paper's learning rates are 3 to 10 times smaller than AdamW's, and its weight
decay is larger by the same factor. beta1 interpolates, beta2 decays the momentum.
"""

import optax

from gptjax.optim.parts import Parts


def build(parts: Parts) -> optax.GradientTransformation:
    """The sign, then weight decay, then the learning rate."""
    lion = optax.scale_by_lion(b1=parts.hyper["beta1"], b2=parts.hyper["beta2"])
    return optax.chain(lion, parts.decay, parts.rate("learning_rate"))
