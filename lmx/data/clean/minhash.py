"""Near duplicates: MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4)."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmx.data.clean.groups import components, duplicates, shared
from lmx.data.clean.hashing import fold, mix, windows, words
from lmx.data.clean.step import Document, Drop, Ragged, Verdict

_STEP = 1024  # n-grams at a time: their values under all permutations stay in the processor's cache


@dataclass(frozen=True)
class MinHash:
    """Drops documents that are near an earlier one: in a chain of pairs whose n-grams agree in all rows of one band.

    A pair whose sets of word n-grams have Jaccard similarity s is found with probability 1 - (1 - s^rows)^bands (`s_curve`). The defaults are
    FineWeb's (Penedo et al. 2024): 65% of the pairs of similarity 0.72, 92% of 0.8, 1% of 0.4. Of each component of found pairs the first
    document of the corpus stays. A document of fewer than `ngram` words is one n-gram of all of them; one without words is no duplicate.

    `MinHash(*optimum(0.8))` takes bands and rows for a threshold.
    """

    bands: int = 14
    rows: int = 8
    ngram: int = 5
    seed: int = 0
    lowercase: bool = True
    punctuation: bool = True
    """Signs and symbols are not part of words."""
    name: str = "minhash"

    def __post_init__(self) -> None:
        if min(self.bands, self.rows, self.ngram) < 1:
            raise ValueError(f"bands={self.bands}, rows={self.rows}, ngram={self.ngram}: none can be below 1")

    def signature(self, text: str) -> np.ndarray:
        """uint64 `[bands * rows]`, or `[0]` of a text without words: the smallest 32-bit value of its n-grams under each permutation.

        The share of places where two signatures agree is an unbiased estimate of the Jaccard similarity s of the texts' n-grams, with variance
        s (1 - s) / (bands * rows).
        """
        grams = windows(words(fold(text, self.lowercase, self.punctuation)), self.ngram) >> np.uint64(32)
        if not len(grams):
            return grams
        factors, terms = _permutations(self.seed, self.bands * self.rows)
        lowest = None
        for start in range(0, len(grams), _STEP):
            values = factors * grams[start : start + _STEP]
            values += terms
            part = values.min(axis=1)
            lowest = part if lowest is None else np.minimum(lowest, part)
        return lowest >> np.uint64(32)

    def extract(self, document: Document) -> np.ndarray:
        """uint64 `[bands]`: a hash of each band of the signature; `[0]` of a document without words."""
        signature = self.signature(document.text)
        if not len(signature):
            return signature
        return mix(signature.reshape(self.bands, self.rows) @ _permutations(self.seed, self.rows)[0][:, 0])

    def resolve(self, extracted: Ragged) -> Ragged:
        """Of a duplicate the number of the first document of its component. One band is in memory at a time."""
        holders = np.flatnonzero(np.diff(extracted.offsets))
        bands = extracted.values.reshape(-1, self.bands)
        parents = np.arange(len(extracted))
        for band in range(self.bands):
            first, again = shared(np.ascontiguousarray(bands[:, band]))
            parents = components(len(parents), holders[first], holders[again], parents)
        return duplicates(parents)

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        return Drop("near_duplicate", int(resolved[0])) if len(resolved) else None


@cache
def _permutations(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and terms `[count, 1]` of x → (a x + b mod 2^64) >> 32.

    For x of 32 bits that family is strongly universal, as the usual a x + b modulo a prime is (Dietzfelbinger 1996), with a third of the work;
    the shift can come after the minimum. The n-grams' own hash makes of them a random set, of which every member is as likely the lowest.
    """
    draws = mix(mix(np.arange(2 * count, dtype=np.uint64)) + mix(np.array([seed % 2**64], np.uint64)))
    return draws[:count, None] | np.uint64(1), draws[count:, None]


def s_curve(similarity: float | np.ndarray, bands: int, rows: int) -> float | np.ndarray:
    """The probability that two documents of this Jaccard similarity become candidates."""
    return 1 - (1 - similarity**rows) ** bands


def optimum(threshold: float, permutations: int = 128, false_positives: float = 0.5) -> tuple[int, int]:
    """(bands, rows) of at most so many permutations with the least area of errors: of the curve below the threshold, which counts
    `false_positives`, and of what it lacks to one above, which counts the rest. (As datasketch chooses them.)"""
    if not 0 < threshold < 1 or not 0 <= false_positives <= 1 or permutations < 1:
        raise ValueError(
            f"threshold={threshold} must be between 0 and 1, false_positives={false_positives} from 0 to 1, permutations={permutations} positive"
        )
    below, above = (np.linspace(a, b, 1001) for a, b in ((0, threshold), (threshold, 1)))
    choices = [(bands, rows) for bands in range(1, permutations + 1) for rows in range(1, permutations // bands + 1)]

    def errors(choice: tuple[int, int]) -> float:
        positive, negative = np.trapezoid(s_curve(below, *choice), below), np.trapezoid(1 - s_curve(above, *choice), above)
        return false_positives * positive + (1 - false_positives) * negative

    return min(choices, key=errors)


def draw_s_curve(step: MinHash, path: str | Path | BinaryIO) -> None:
    """Writes a picture of the probability to be found by similarity, with the similarity of steepest rise, about (1 / bands)^(1 / rows)."""
    from matplotlib.figure import Figure

    similarity = np.linspace(0, 1, 401)
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    axes.plot(similarity, s_curve(similarity, step.bands, step.rows))
    threshold = (1 / step.bands) ** (1 / step.rows)
    axes.axvline(threshold, color="gray", linestyle="--", label=f"threshold {threshold:.2f}")
    axes.set(xlabel=f"Jaccard similarity of {step.ngram}-grams", ylabel="probability of a candidate", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{step.bands} bands of {step.rows} rows")
    axes.legend()
    axes.figure.savefig(path)
