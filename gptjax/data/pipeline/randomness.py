"""Random numbers and orders that are computed from their position alone, so that each can be computed directly."""

import numpy as np
from jaxtyping import Float64, Int64

_SHUFFLE_ROUNDS = 4  # of the block cipher that stands in for a stored permutation
# Up to this length the whole permutation is computed: the cipher, with blocks of at least 16 bits, is slow on these.
_SHORT = 4096


def uniform(key: int, epochs: Int64[np.ndarray, "..."], places: Int64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """A number in [0, 1) for each epoch and place: their hash with the finaliser of SplitMix64 (Steele et al. 2014)."""
    bits = _mixed(np.array([key % 2**64], np.uint64))
    bits = _mixed(bits + epochs.astype(np.uint64))
    bits = _mixed(bits + places.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = bits * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def shuffled_epochs(
    rows: Int64[np.ndarray, " rows"], rows_per_epoch: int, seed: int
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """(epoch, number within the epoch) of each row of an endless sequence; each epoch has its own order."""
    epochs, numbers = np.divmod(rows, rows_per_epoch)
    if rows_per_epoch <= _SHORT:
        different, epoch = np.unique(epochs, return_inverse=True)
        draws = uniform(seed, different[:, None], np.arange(rows_per_epoch)[None, :])
        return epochs, np.argsort(draws, axis=1)[epoch, numbers]

    from grain.experimental import index_shuffle

    for epoch in np.unique(epochs).tolist():
        order_seed = epoch_words(seed, epoch)[1]
        for i in np.flatnonzero(epochs == epoch):
            numbers[i] = index_shuffle(int(numbers[i]), rows_per_epoch - 1, order_seed, _SHUFFLE_ROUNDS)
    return epochs, numbers


def epoch_words(seed: int, epoch: int) -> list[int]:
    """Two random words of an epoch: the first for where its windows begin, the second for their order."""
    return np.random.SeedSequence([seed, epoch]).generate_state(2).tolist()
