"""Exact and near duplicates over a whole corpus: the earlier document is kept."""

import functools
import hashlib
from array import array

import numpy as np
from jaxtyping import Int64, UInt16, UInt32, UInt64

from gptjax.config import OPTIONS
from gptjax.data.building.ngrams import mix, ngram_hashes, word_hashes
from gptjax.errors import UserError

MODES = OPTIONS["data"]["deduplicate"].choices
EXACT_KEY_BYTES = 16
_MIN_RECALL = 0.95
_CHUNK_NGRAMS = 4096  # n-grams times permutations stay in the second-level cache
_EMPTY = -1
_SHIFT_13, _SHIFT_16, _SHIFT_32 = np.uint32(13), np.uint32(16), np.uint64(32)
_PREMIX_1, _PREMIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


def exact_key(text: str) -> bytes:
    """BLAKE2b of 128 bits over the text with each run of white space as one space and none at the ends."""
    normalised = " ".join(text.split())
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=EXACT_KEY_BYTES).digest()


class MinHasher:
    """MinHash signatures (Broder 1997): equal entries estimate the Jaccard similarity of two sets of n-grams.

    The permutations are those of datasketch's scheme "affine32" for the same seed, so the library's `MinHash`
    fed with the same n-gram hashes has the same values. About 20 MB/s on one core for pages of text, six
    times datasketch's rate.
    """

    def __init__(self, num_permutations: int = 128, ngram: int = 5, seed: int = 1):
        self.num_permutations = num_permutations
        self.ngram = ngram
        self.seed = seed
        self._factors, self._offsets = _permutations(num_permutations, seed)

    def signature(self, text: str) -> UInt32[np.ndarray, " permutations"]:
        """The signature of the n-grams of `text`, or of its characters if it has no word."""
        hashes = self.ngrams(text)
        signature = np.full(self.num_permutations, 0xFFFFFFFF, np.uint32)
        for start in range(0, len(hashes), _CHUNK_NGRAMS):
            permuted = hashes[start : start + _CHUNK_NGRAMS] * self._factors[:, None]
            permuted += self._offsets[:, None]
            np.minimum(signature, permuted.min(axis=1), out=signature)
        return signature

    def ngrams(self, text: str) -> UInt32[np.ndarray, " ngrams"]:
        """The 32-bit hash of each n-gram, premixed for the permutations."""
        hashes = ngram_hashes(word_hashes(text.lower())[0], self.ngram)
        if not len(hashes):
            hashes = np.frombuffer(exact_key(text)[:8], np.uint64)
        return _premix((hashes >> _SHIFT_32).astype(np.uint32))


def _permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)  # datasketch's
    factors = random.randint(0, 1 << 31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, random.randint(0, 1 << 32, count, dtype=np.uint32)


def _premix(hashes: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """The 32-bit finalizer of MurmurHash3."""
    hashes = (hashes ^ (hashes >> _SHIFT_16)) * _PREMIX_1
    hashes = (hashes ^ (hashes >> _SHIFT_13)) * _PREMIX_2
    return hashes ^ (hashes >> _SHIFT_16)


def bands_for(threshold: float, num_permutations: int) -> tuple[int, int]:
    """(bands, rows): the most rows in a band with which 95 % of the pairs at `threshold` share a band.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s^r)^b (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
    """
    for rows in range(num_permutations, 1, -1):
        bands = num_permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _MIN_RECALL:
            return bands, rows
    return num_permutations, 1


class Deduplicator:
    """Finds, for each document in corpus order, the earlier one that it repeats.

    Memory for each document that is kept: its id, about 150 bytes for the exact key, and in mode "near" 2 to
    3 bytes for each permutation and 8 to 20 for each band (threshold 0.8: 450 to 750 bytes). A million
    documents take about a gigabyte.
    """

    def __init__(self, mode: str = "near", *, threshold: float = 0.8, num_permutations: int = 128):
        """`threshold`: a document with at least this estimated Jaccard similarity is a near duplicate.

        Raises:
          UserError: the mode is unknown or the threshold is not above 0 and at most 1.
        """
        if mode not in MODES:
            raise UserError(f"deduplication mode {mode!r}: expected one of {', '.join(MODES)}")
        if not 0 < threshold <= 1:
            raise UserError(f"deduplication threshold {threshold}: expected more than 0 and at most 1, as in 0.8")
        self.mode = mode
        self._ids: list[str] = []
        self._exact: dict[bytes, int] = {}
        self._near = _SignatureIndex(num_permutations, threshold) if mode == "near" else None

    def duplicate_of(
        self,
        document_id: str,
        exact: bytes,
        signature: UInt32[np.ndarray, " permutations"] | None = None,
    ) -> str | None:
        """The id of the earlier document that this one repeats. If there is none, remembers this one and returns None.

        Among several similar earlier documents the most similar is named; among equally similar ones, the earliest.

        Args:
          document_id: returned for later documents that repeat this one.
          exact: `exact_key` of the text.
          signature: `MinHasher.signature` of the text, needed in mode "near".
        """
        if self.mode == "none":
            return None
        found = self._exact.get(exact)
        if found is None and self._near is not None:
            found = self._near.find_or_add(signature)
        if found is not None:
            return self._ids[found]
        self._exact[exact] = len(self._ids)
        self._ids.append(document_id)
        return None


class _SignatureIndex:
    """Locality-sensitive hashing: signatures, chained by the hash of each of their bands.

    Entry document * bands + band stands for a band of a signature. A slot of the table has the last entry
    whose band falls there, and `previous` leads from an entry to the one before. Keys are not stored:
    candidates are compared by their signatures, of whose values the low 16 bits are kept.
    """

    def __init__(self, num_permutations: int, threshold: float):
        self.bands, self.rows = bands_for(threshold, num_permutations)
        self.matches = threshold * num_permutations
        self.signatures = np.empty((1024, num_permutations), np.uint16)
        self.count = 0
        self.previous = array("i")
        self.table_bits = 15
        self.table = np.full(1 << self.table_bits, _EMPTY, np.int32)

    def find_or_add(self, signature: UInt32[np.ndarray, " permutations"]) -> int | None:
        """The number of the most similar signature that reaches the threshold; if there is none, adds this one."""
        short = signature.astype(np.uint16)
        slots = self._slots(short[None])[0]
        heads = self.table[slots]
        candidates = self._chained(heads.tolist())
        if candidates:
            ordered = np.array(sorted(candidates))
            matches = (self.signatures[ordered] == short).sum(axis=1)
            best = int(matches.argmax())
            if matches[best] >= self.matches:
                return int(ordered[best])
        if self.count == len(self.signatures):
            self._grow()
            slots = self._slots(short[None])[0]
            heads = self.table[slots]
        self.signatures[self.count] = short
        self.previous.frombytes(heads.tobytes())
        self.table[slots] = np.arange(self.count * self.bands, (self.count + 1) * self.bands)
        self.count += 1
        return None

    def _chained(self, entries: list[int]) -> set[int]:
        documents = set()
        for entry in entries:
            while entry != _EMPTY:
                documents.add(entry // self.bands)
                entry = self.previous[entry]
        return documents

    def _slots(self, signatures: UInt16[np.ndarray, "n permutations"]) -> Int64[np.ndarray, "n bands"]:
        used = signatures[:, : self.bands * self.rows].reshape(len(signatures), self.bands, self.rows)
        factors, salts = _band_hash(self.bands, self.rows)
        return ((used @ factors + salts) >> np.uint64(64 - self.table_bits)).astype(np.int64)

    def _grow(self) -> None:
        grown = np.empty((self.count + self.count // 2, self.signatures.shape[1]), np.uint16)
        grown[: self.count] = self.signatures
        self.signatures = grown
        if len(self.table) < len(grown) * self.bands:
            self.table_bits += 1
            self.table = np.full(1 << self.table_bits, _EMPTY, np.int32)
            slots = self._slots(self.signatures[: self.count]).ravel()
            order = np.argsort(slots, kind="stable")
            same = slots[order[1:]] == slots[order[:-1]]
            previous = np.full(len(slots), _EMPTY, np.int32)
            previous[order[1:][same]] = order[:-1][same]
            self.previous = array("i", previous.tobytes())
            last = np.append(~same, True)
            self.table[slots[order[last]]] = order[last]


@functools.cache
def _band_hash(bands: int, rows: int) -> tuple[UInt64[np.ndarray, " rows"], UInt64[np.ndarray, " bands"]]:
    """Multilinear hashing, whose high bits are strongly universal (Lemire and Kaser 2014); one salt per band."""
    random = mix(np.arange(1, rows + bands + 1, dtype=np.uint64))
    return random[:rows] | np.uint64(1), random[rows:]
