"""The rules of Gopher's corpus MassiveText (Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
appendix A1): quality and repetition.

Where the paper leaves open what is counted, it is counted as datatrove does: words include punctuation marks, but length and number of words
are those of words that are not punctuation; characters are of the whole text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from lmx.data.clean.pieces import Remembered
from lmx.data.clean.step import Drop
from lmx.data.clean.text import PUNCTUATION, ngrams, paragraphs, words
from lmx.data.documents import Document


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Documents that look like prose: by their length, word lengths, symbols, bullets, ellipses, letters and English stop words."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3
    max_mean_word_length: float = 10
    max_symbol_ratio: float = 0.1
    """Hash signs, and ellipses, for each word."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_stop_words: int = 2
    """Different ones, in lower case as they stand."""
    name: str = "gopher_quality"

    def __call__(self, document: Document) -> Drop | None:
        text = document.text
        found = words(text)
        kinds = list(map(_kind, found))
        count = len(found) - kinds.count(_MARK)
        if count < self.min_words:
            return Drop("too_few_words", count)
        if count > self.max_words:
            return Drop("too_many_words", count)
        mean = sum(map(len, compress(found, kinds))) / count if count else 0.0
        if not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            return Drop("mean_word_length", mean)
        total = max(1, len(found))
        if (ratio := text.count("#") / total) > self.max_symbol_ratio:
            return Drop("hashes", ratio)
        if (ratio := (text.count("...") + text.count("…")) / total) > self.max_symbol_ratio:
            return Drop("ellipses", ratio)
        rows = text.splitlines() or [""]
        if (ratio := sum(row.lstrip().startswith(("•", "-")) for row in rows) / len(rows)) > self.max_bullet_lines:
            return Drop("bullet_lines", ratio)
        if (ratio := sum(row.rstrip().endswith(("...", "…")) for row in rows) / len(rows)) > self.max_ellipsis_lines:
            return Drop("ellipsis_lines", ratio)
        if (ratio := kinds.count(_ALPHABETIC) / total) < self.min_alphabetic_words:
            return Drop("alphabetic_words", ratio)
        if (stops := len(set(self.stop_words).intersection(found))) < self.min_stop_words:
            return Drop("stop_words", stops)
        return None


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Documents that repeat themselves: lines, paragraphs, and runs of words (table A1 of the paper). Fractions, all of them maxima."""

    duplicate_lines: float = 0.30
    duplicate_paragraphs: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraph_characters: float = 0.20
    top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    """(n, fraction of characters that the most frequent run of n words covers)"""
    duplicate_ngrams: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    """(n, fraction of characters inside runs of n words that stood before)"""
    name: str = "gopher_repetition"

    def __call__(self, document: Document) -> Drop | None:
        text = document.text
        if not text:
            return Drop("empty", 0)
        for parts, what, share, characters in (
            (paragraphs(text), "paragraph", self.duplicate_paragraphs, self.duplicate_paragraph_characters),
            (_LINE_BREAKS.split(text), "line", self.duplicate_lines, self.duplicate_line_characters),
        ):
            repeated, length = duplicates(parts)
            if repeated / len(parts) > share:
                return Drop(f"duplicate_{what}s", repeated / len(parts))
            if length / len(text) > characters:
                return Drop(f"duplicate_{what}_characters", length / len(text))
        found = words(text)
        bounds = _Bounds(found)
        for n, limit in self.top_ngrams:
            if bounds.top_ngram(n) / len(text) > limit and (ratio := top_ngram(found, n) / len(text)) > limit:
                return Drop(f"top_{n}_gram", ratio)
        for n, limit in self.duplicate_ngrams:
            if bounds.duplicate_ngrams(n) / len(text) > limit and (ratio := duplicate_ngrams(found, n) / len(text)) > limit:
                return Drop(f"duplicate_{n}_grams", ratio)
        return None


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many of the parts stood before, and their characters."""
    different = set(parts)
    return len(parts) - len(different), sum(map(len, parts)) - sum(map(len, different))


def top_ngram(found: Sequence[str], n: int) -> int:
    """Characters (with a space between words) in all occurrences of the most frequent run of n words; of equals, the first."""
    if len(found) < n:
        return 0
    counts = Counter(ngrams(found, n))
    run, count = max(counts.items(), key=_count)
    return count * (sum(map(len, run)) + n - 1)


def duplicate_ngrams(found: Sequence[str], n: int) -> int:
    """Characters of runs of n words that stood before, from left to right and none counted twice."""
    seen, total, free = set(), 0, 0
    for i, run in enumerate(ngrams(found, n)):
        if i < free:
            continue
        if run in seen:
            total += sum(map(len, run))
            free = i + n
        else:
            seen.add(run)
    return total


_LINE_BREAKS = re.compile(r"\n+")


class _Bounds:
    """Upper bounds of `top_ngram` and `duplicate_ngrams`, found with NumPy: most documents are below the limits by these already.

    Runs of words are told apart by a hash. Two that fall together only raise a bound, so no decision depends on it.
    """

    def __init__(self, found: Sequence[str]):
        self.lengths = np.fromiter(map(len, found), np.int64, len(found))
        self.hashes = [np.fromiter(map(hash, found), np.int64, len(found)).view(np.uint64)]
        self.covered = None

    def top_ngram(self, n: int) -> int:
        if len(self.lengths) < n:
            return 0
        runs = np.sort(self._runs(n))
        changes = np.flatnonzero(np.concatenate(([True], runs[1:] != runs[:-1], [True])))
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        return int(np.diff(changes).max() * ((ends[n:] - ends[:-n]).max() + n - 1))

    def duplicate_ngrams(self, n: int) -> int:
        """Characters of words in runs of the shortest length asked for that stood before: those of longer runs are among them."""
        if self.covered is None or n < self.covered[0]:
            runs = self._runs(n)
            again = np.ones(len(runs), bool)
            again[np.unique(runs, return_index=True)[1]] = False
            inside = np.convolve(again, np.ones(n, np.int64)) > 0 if again.any() else again[:0]
            self.covered = n, int(self.lengths[: len(inside)][inside].sum())
        return self.covered[1]

    def _runs(self, n: int) -> np.ndarray:
        """uint64 of each run of n words."""
        while len(self.hashes) < n:
            longer = self.hashes[-1][:-1] * _FACTOR + self.hashes[0][len(self.hashes) :]
            self.hashes.append(longer)
        return self.hashes[n - 1]


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _count(item: tuple[tuple[str, ...], int]) -> int:
    return item[1]


_MARK, _OTHER, _ALPHABETIC = range(3)


def _kind_of(word: str) -> int:
    if any(map(str.isalpha, word)):
        return _ALPHABETIC
    return _MARK if PUNCTUATION.issuperset(word) else _OTHER


_kind = Remembered(_kind_of).__getitem__
