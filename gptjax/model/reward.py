"""The reward that a model gives to a text: one number, read from the final state of its last token.

The number is the logit of the vocabulary's first token; a reward model writes no text and needs no logits otherwise.
So it has the same parameters as a language model: it starts from one, and is sharded, adapted, saved and exported like
one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.model import head
from gptjax.model.gpt import GPT

TOKEN = 0  # the token whose logit is the reward


def rewards(
    model: GPT,
    tokens: Int[Array, "batch length"],
    last: Int[Array, "batch"],
    *,
    dropout_keys: jax.Array | None = None,
) -> tuple[Float[Array, "batch"], Float[Array, "batch"] | None]:
    """(reward of each row in float32, load-balancing loss as `GPT.forward` has it).

    Args:
      tokens: one text in each row, from column 0.
      last: the column of its last token.
      dropout_keys: one random key per row, or None to evaluate.
    """
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, balance = model.forward(tokens, positions=places, dropout_keys=dropout_keys)
    # A masked sum, not a gather: it adds up over the devices that a sequence is split over.
    final = jnp.where((places == last[:, None])[..., None], hidden, 0).sum(1, keepdims=True)
    return head.scores(model.architecture, final, model.table())[:, 0, TOKEN], balance
