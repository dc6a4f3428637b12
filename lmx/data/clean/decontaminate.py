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
    def _words(self) -> list[np.ndarray]:
        return [words(fold(text)) for _, _, text in self.items]

    @property
    def unsearched(self) -> list[Item]:
        """Items of fewer than `shortest` words."""
        return [item for item, hashes in zip(self.items, self._words, strict=True) if len(hashes) < self.shortest]

    @cached_property
    def _table(self) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """What is looked for: all n-grams of long items, and the beginnings of short ones.

        Of each kind its length, the hashes, sorted; the item of each; and which of the hashes' first bits occur, to pass over most quickly.
        """
        long = [n for n, hashes in enumerate(self._words) if len(hashes) >= self.ngram]
        short = [n for n, hashes in enumerate(self._words) if self.shortest <= len(hashes) < self.ngram]
        table = []
        for length, numbers, stop in ((self.ngram, long, None), (self.shortest, short, self.shortest)):
            if not numbers:
                continue
            grams = [np.unique(windows(self._words[number][:stop], length)) for number in numbers]
            hashes = np.concatenate(grams)
            order = np.argsort(hashes, kind="stable")
            bits = max(10, len(hashes).bit_length() + 4)
            occurs = np.zeros(1 << bits, bool)
            occurs[hashes >> np.uint64(64 - bits)] = True
            table.append((length, hashes[order], np.repeat(numbers, [len(gram) for gram in grams])[order], occurs))
        return table

    def _found(self, text: str) -> tuple[list[tuple[int, int]], list[int]]:
        """Runs of words that an item has (the first and the end of each), and the numbers of the items."""
        hashes = words(fold(text))
        runs, numbers = set(), set()
        for length, grams, items, occurs in self._table:
            if len(hashes) < length:
                continue
            here = windows(hashes, length)
            places = np.flatnonzero(occurs[here >> np.uint64(65 - len(occurs).bit_length())])
            low, high = np.searchsorted(grams, here[places], "left"), np.searchsorted(grams, here[places], "right")
            for place, first, end in zip(places.tolist(), low.tolist(), high.tolist(), strict=True):
                for number in items[first:end].tolist():
                    item = self._words[number]
                    reach = min(len(item), self.ngram)
                    if reach == length or np.array_equal(hashes[place : place + reach], item):
                        runs.add((place, place + reach))
                        numbers.add(number)
        return sorted(runs), sorted(numbers)

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
        return Change(
            "\n\n".join(kept), {"contaminated": passages}, {"contamination": [list(self.items[number][:2]) for number in numbers]}
        )
