"""Texts of benchmarks, taken out of what is trained on (Brown et al. 2020, appendix C)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lmx.data.clean.hashing import fold, spans, windows, words
from lmx.data.clean.step import Change, Document, Drop, Verdict

Item = tuple[str, str, str]
"""A task, an item's id within it, and its text."""


def numbered(tasks: Mapping[str, Iterable[str]]) -> Iterator[Item]:
    """Items of tasks' texts, with their numbers as ids."""
    return ((task, str(number), text) for task, texts in tasks.items() for number, text in enumerate(texts))


@dataclass(frozen=True)
class Decontaminate:
    """Drops documents that share an n-gram of words with a benchmark item, or cuts the passages.

    Words are compared without case and signs. GPT-3 takes 13 words, PaLM and Llama 2 eight and ten. An item of fewer is looked for as a
    whole if it has at least `shortest` words; `unsearched` are those that have not. N-grams are compared by 64-bit hashes: with a million of
    them, one in 18 trillion others is taken for one.

    What is found is recorded: a dropped document's value names all items, `task/id, task/id`, a cut one's metadata
    `{"contamination": [[task, id], ...]}`.
    """

    items: tuple[Item, ...] = field(repr=False)
    """Any iterable of them; kept as a tuple."""
    ngram: int = 13
    shortest: int = 8
    cut: bool = False
    """The passages are cut out, and not the document dropped."""
    margin: int = 200
    """Characters that are cut on both sides of a passage; of what stands between two, as many at least must be left to stay."""
    passages: int = 10
    """A document with more to cut than that is dropped."""
    name: str = "decontaminate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        if not 1 <= self.shortest <= self.ngram:
            raise ValueError(f"shortest={self.shortest} must be from 1 to ngram={self.ngram}")

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(words(fold(text))) for _, _, text in self.items], np.int64)

    @property
    def unsearched(self) -> list[Item]:
        """Items of fewer than `shortest` words."""
        return [self.items[number] for number in np.flatnonzero(self._lengths < self.shortest)]

    @cached_property
    def _table(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By length of n-grams: their hashes, sorted; the item of each; and which of the hashes' first bits occur, to pass over most quickly."""
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for number, length in enumerate(np.minimum(self._lengths, self.ngram).tolist()):
            if length >= self.shortest:
                found.setdefault(length, []).append((np.unique(windows(words(fold(self.items[number][2])), length)), number))
        table = {}
        for length, grams in sorted(found.items()):
            hashes = np.concatenate([gram for gram, _ in grams])
            numbers = np.repeat([number for _, number in grams], [len(gram) for gram, _ in grams])
            order = np.argsort(hashes, kind="stable")
            bits = max(10, len(hashes).bit_length() + 4)
            occurs = np.zeros(1 << bits, bool)
            occurs[hashes >> np.uint64(64 - bits)] = True
            table[length] = hashes[order], numbers[order], occurs
        return table

    def _found(self, text: str) -> tuple[list[tuple[int, int]], list[int]]:
        """Runs of words that an item has (the first and the end of each), and the numbers of the items."""
        hashes = words(fold(text))
        runs, numbers = [], []
        for length, (grams, items, occurs) in self._table.items():
            if len(hashes) < length:
                continue
            here = windows(hashes, length)
            places = np.flatnonzero(occurs[here >> np.uint64(64 - (len(occurs).bit_length() - 1))])
            low, high = np.searchsorted(grams, here[places], "left"), np.searchsorted(grams, here[places], "right")
            for place, first, end in zip(places.tolist(), low.tolist(), high.tolist(), strict=True):
                if first < end:
                    runs.append((place, place + length))
                    numbers.extend(items[first:end].tolist())
        return sorted(runs), sorted(set(numbers))

    def __call__(self, document: Document) -> Verdict:
        runs, numbers = self._found(document.text)
        if not runs:
            return None
        named = Drop("contaminated", ", ".join(f"{self.items[number][0]}/{self.items[number][1]}" for number in numbers))
        if not self.cut:
            return named
        place = spans(document.text)
        kept, last, passages = [], 0, 1
        for first, end in runs:
            begin, stop = max(place[first][0] - self.margin, 0), place[end - 1][1] + self.margin
            if begin > last:
                kept.append(document.text[last:begin])
                passages += last > 0
            last = max(last, stop)
        kept = [piece for piece in [*kept, document.text[last:]] if len(piece.strip()) >= self.margin and piece.strip()]
        if not kept or passages > self.passages:
            return named
        return Change("\n\n".join(kept), {"contaminated": passages}, {"contamination": [list(self.items[number][:2]) for number in numbers]})
