"""How prompts are cut into chunks, and which chunks are read together.

Chunks begin at multiples of their size, even if a part of the prompt was reused. So a token is always read by the same
program, at the same place in the chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gptjax.generation import decoding, sampling
from gptjax.generation.request import Request

MIN_LENGTH = 16  # of a chunk; a program for shorter ones would take longer to compile than it saves


class Shape(NamedTuple):
    """The properties that chunks must share to be read together by one compiled program.

    Attributes:
      length: after padding.
      first: whether they are at the beginning of their prompts.
      scored: whether log-probabilities are returned.
    """

    length: int
    first: bool
    scored: bool


def shape(request: Request, chunk: int, lengths: Sequence[int] | None) -> Shape:
    """The shape of the next chunk. `lengths`: the allowed lengths after padding; None: all powers of two."""
    count = _end(request, chunk) - request.read
    if lengths is None:
        length = min(bucket(count, MIN_LENGTH), max(chunk, MIN_LENGTH))
    else:
        length = next(length for length in lengths if length >= count)
    return Shape(length, request.read == 0, request.scored)


def few_lengths(chunk: int) -> list[int]:
    """Every second power of two up to the size of a chunk, for an engine that compiles all its programs."""
    lengths = [MIN_LENGTH]
    while lengths[-1] < chunk:
        lengths.append(min(4 * lengths[-1], chunk))
    return lengths


def chunks(
    slots: Sequence[int], requests: Sequence[Request], length: int, chunk: int
) -> tuple[decoding.Prompts, Int[np.ndarray, "batch"]]:
    """The next chunks of these requests, and the positions of their first tokens."""
    starts = np.array([request.read for request in requests], np.int32)
    counts = np.array([_end(request, chunk) for request in requests], np.int32) - starts
    tokens = np.zeros((len(requests), length), np.int32)
    end_ids = np.full((len(requests), decoding.MAX_END_IDS), decoding.NO_TOKEN, np.int32)
    for row, (request, start, count) in enumerate(zip(requests, starts, counts, strict=True)):
        tokens[row, :count] = request.prompt[start : start + count]
        end_ids[row, : len(request.end_ids)] = request.end_ids
    params = [request.params for request in requests]
    prompts = decoding.Prompts(
        tokens=tokens,
        lengths=counts,
        slots=np.array(slots, np.int32),
        seeds=np.array([one.seed for one in params], np.uint32),
        indices=np.array([request.index for request in requests], np.int32),
        controls=sampling.controls(params),
        biases=sampling.bias(params),
        end_ids=end_ids,
    )
    return prompts, starts


def bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def _end(request: Request, chunk: int) -> int:
    """Where the next chunk ends."""
    return min(len(request.prompt), request.read - request.read % chunk + chunk)
