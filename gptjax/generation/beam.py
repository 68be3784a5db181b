"""Beam search: the most probable completions under a model, with their scores.

It gives the results of transformers. After each token the best continuations of all beams are ranked. Those among the
first `beams` that end are finished; the best that do not end are the next beams. The search of one prompt does not
depend on other prompts.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gptjax.generation.beam_params import BeamParams, EarlyStopping
from gptjax.generation.completion import Generator
from gptjax.generation.detokenizer import Detokenizer
from gptjax.generation.engine import check_prompt
from gptjax.model import gpt, sharding
from gptjax.model.architecture import Architecture
from gptjax.model.cache import Cache
from gptjax.parallel import partition

ROWS = 32  # of the cache: prompts searched together x beams
MIN_LENGTH = 16
NOTHING = -1e9  # the score of a place without a completion


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A completion that was found.

    Attributes:
      tokens: int32 [num_tokens], with the token that ends the text.
      log_probability: of all tokens together, in nats.
      score: log_probability / num_tokens ** length_penalty.
      finish_reason: "stop" at the end of the text, "length" at max_new_tokens or where the context is full.
    """

    text: str
    tokens: np.ndarray
    log_probability: float
    score: float
    finish_reason: str


def search(
    generator: Generator, prompts: Sequence[np.ndarray], params: BeamParams, *, mesh: Mesh | None = None
) -> list[list[Hypothesis]]:
    """The `num_best` completions of each prompt, the best first; fewer if fewer were found.

    Args:
      generator: its model, its tokenizer, and the tokens that end a text.
      prompts: token ids, continued exactly as given.
      mesh: over which prompts are split; the parameters must be on it.

    Raises UserError: `params` are out of range; a prompt is empty, longer than the context, or has an id that is not in
    the vocabulary.
    """
    params.validate()
    architecture = generator.model.architecture
    for place, prompt in enumerate(prompts):
        check_prompt(f"prompt {place}", np.asarray(prompt), architecture)
    shards = partition.row_shards(mesh) if mesh else 1
    together = min(max(ROWS // params.beams, 1), _power(len(prompts), 1))
    together = -(-together // shards) * shards
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))  # similar lengths together
    found: dict[int, list[Hypothesis]] = {}
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        for start in range(0, len(order), together):
            places = order[start : start + together]
            group = [np.asarray(prompts[place], np.int32) for place in places]
            found |= dict(zip(places, _search(generator, group, params, together), strict=True))
    return [found[place] for place in range(len(prompts))]


def _search(
    generator: Generator, prompts: Sequence[np.ndarray], params: BeamParams, rows: int
) -> list[list[Hypothesis]]:
    """`search` for prompts padded to `rows` rows of one length."""
    architecture, ends = generator.model.architecture, () if params.ignore_eos else generator.end_ids
    context = architecture.context_length
    length = min(_power(len(prompts[0]), MIN_LENGTH), context)
    tokens, lengths, limits = np.zeros((rows, length), np.int32), np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        limits[row] = min(params.max_new_tokens, context - len(prompt))
    best = jax.device_get(
        _run(
            architecture,
            generator.model.params,
            tokens,
            lengths,
            limits,
            np.array(ends, np.int32),
            np.float32(params.length_penalty),
            beams=params.beams,
            steps=min(_power(params.max_new_tokens, MIN_LENGTH), context),
            early_stopping=params.early_stopping,
        )
    )
    return [
        [
            _hypothesis(generator, prompt, jax.tree.map(lambda x, row=row, i=i: x[row, i], best), ends)
            for i in range(params.num_best)
            if i == 0 or best.sums[row, i] > NOTHING / 2
        ]
        for row, prompt in enumerate(prompts)
    ]


def _hypothesis(generator: Generator, prompt: np.ndarray, best: "_Finished", ends: Sequence[int]) -> Hypothesis:
    tokens = best.tokens[: best.lengths]
    ended = len(tokens) > 0 and int(tokens[-1]) in ends
    detokenizer = Detokenizer(generator.tokenizer, prompt)
    text = detokenizer.push(tokens) + detokenizer.finish(cut=not ended)
    if not len(tokens):  # the prompt fills the context
        return Hypothesis(text, tokens, 0.0, 0.0, "length")
    return Hypothesis(text, tokens, float(best.sums), float(best.scores), "stop" if ended else "length")


# ---- The compiled program --------------------------------------------------------------------------------------------


class _Finished(NamedTuple):
    """Finished completions of each prompt, the best first; places that are still free have length 0."""

    tokens: Int[Array, "prompts beams steps"]
    lengths: Int[Array, "prompts beams"]
    sums: Float[Array, "prompts beams"]
    scores: Float[Array, "prompts beams"]


class _State(NamedTuple):
    """A search after `step` tokens.

    Attributes:
      logits: of the token after each beam.
      tokens, sums: of the beams, the best first, and the sums of their log-probabilities.
      going: whether the search of a prompt goes on.
    """

    step: Int[Array, ""]
    cache: Cache
    logits: Float[Array, "prompts beams vocab"]
    tokens: Int[Array, "prompts beams steps"]
    sums: Float[Array, "prompts beams"]
    finished: _Finished
    going: Bool[Array, "prompts"]


@partial(jax.jit, static_argnames=("architecture", "beams", "steps", "early_stopping"))
def _run(
    architecture: Architecture,
    params: gpt.Params,
    prompts: Int[Array, "prompts length"] | np.ndarray,
    lengths: Int[Array, "prompts"] | np.ndarray,
    limits: Int[Array, "prompts"] | np.ndarray,
    ends: Int[Array, "ends"] | np.ndarray,
    length_penalty: Float[Array, ""] | np.float32,
    *,
    beams: int,
    steps: int,
    early_stopping: EarlyStopping,
) -> _Finished:
    """Searches all prompts, each up to `limits` tokens, which are at most `steps`."""
    prompts, lengths, limits, ends = map(jnp.asarray, (prompts, lengths, limits, ends))
    count, length = prompts.shape
    layers = params["blocks"]
    model = gpt.bind(architecture, {**params, "blocks": layers[0]})
    vocab = architecture.padded_vocab_size
    kept = min((1 + max(len(ends), 1)) * beams, beams * vocab)  # at least `beams` of them do not end

    # 1. Prompts are read once; then each beam has a copy.
    positions = jnp.broadcast_to(jnp.arange(length), prompts.shape)
    hidden, cache = model.hidden(prompts, positions=positions, new_cache=True, layers=layers)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits = jnp.repeat(model.logits(last), beams, axis=1)
    room = min(length + steps, architecture.context_length) - length
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)]), cache)
    cache = _of_parents(cache, jnp.zeros((count, beams), jnp.int32))
    # All beams are equal here: only the first counts, else the next ones would be equal, too.
    sums = jnp.where(jnp.arange(beams) == 0, 0.0, NOTHING) + jnp.zeros((count, 1))
    tokens = jnp.zeros((count, beams, steps), jnp.int32)
    nothing = jnp.full((count, beams), NOTHING)
    finished = _Finished(tokens, jnp.zeros((count, beams), jnp.int32), nothing, nothing)

    def body(state: _State) -> _State:
        number = state.step + 1  # tokens in a completion that ends now
        # 2. The best continuations of all beams together.
        sums = state.sums[:, :, None] + jax.nn.log_softmax(state.logits, axis=-1)
        sums, places = jax.lax.top_k(sums.reshape(count, -1), kept)
        parents, token = places // vocab, places % vocab
        tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, state.step].set(token)
        over = (token[:, :, None] == ends).any(-1) | (number >= limits)[:, None]
        # 3. Those among the first `beams` that end are ranked with those that ended before.
        scores = sums / number.astype(jnp.float32) ** length_penalty
        counts = over & (jnp.arange(kept) < beams) & state.going[:, None]
        new = _Finished(tokens, jnp.where(counts, number, 0), sums, jnp.where(counts, scores, NOTHING))
        both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.finished, new)
        finished = _rows(both, jax.lax.top_k(both.scores, beams)[1])
        # 4. The best that do not end are the next beams.
        sums, chosen = jax.lax.top_k(jnp.where(over, NOTHING, sums), beams)
        parents, token, tokens = _rows((parents, token, tokens), chosen)
        # 5. A search goes on while the best beam, if it ended at `end`, could beat the worst finished completion.
        end = jnp.where(length_penalty > 0, limits, number) if early_stopping == "never" else number
        possible = sums[:, 0] / jnp.maximum(end, 1).astype(jnp.float32) ** length_penalty
        full = (finished.lengths > 0).all(1)
        going = state.going & (number < limits) & (~full | (possible > finished.scores.min(1)))
        going &= ~full if early_stopping == "true" else True
        at = jnp.repeat(lengths + state.step, beams)[:, None]
        cache = _of_parents(state.cache, parents)
        hidden, cache = model.hidden(token.reshape(-1, 1), positions=at, cache=cache, layers=layers)
        logits = model.logits(hidden).reshape(count, beams, -1)
        return _State(number, cache, logits, tokens, sums, finished, going)

    state = _State(jnp.int32(0), cache, logits, tokens, sums, finished, limits > 0)
    finished = jax.lax.while_loop(lambda state: state.going.any(), body, state).finished
    return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), finished)


def _rows(tree: Any, places: Int[Array, "prompts chosen"]) -> Any:
    """The entries at `places` of axis 1 of each array."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, own: rows[own])(x, places), tree)


def _of_parents(cache: Cache, parents: Int[Array, "prompts beams"]) -> Cache:
    """The cache reordered for beams that continue `parents`, which are indices of a prompt's rows."""
    count, beams = parents.shape

    def take(x: Array) -> Array:
        heads = x.shape[0] // cache.tokens.shape[0]
        by_row = x.reshape(count, -1, heads, *x.shape[1:])
        return jax.vmap(lambda rows, own: rows[own])(by_row, parents).reshape(count * beams * heads, *x.shape[1:])

    return jax.tree.map(take, cache)


def _power(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())
