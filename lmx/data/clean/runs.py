"""Runs of items that occur again in a corpus: of tokens, or of paragraphs."""

from collections.abc import Iterator

import numpy as np

from lmx.data.clean.groups import firsts, gathered
from lmx.data.clean.hashing import BLOCK, mix, windows
from lmx.data.clean.step import Ragged


def repeated_runs(items: Ragged, length: int) -> Ragged:
    """Of each document what occurred before in the corpus: three numbers a run, its first item, its end, and the document of the first
    occurrence (of the run's first `length` items).

    An item is repeated if it is in a run of `length` items (uint64) of its document that occurred earlier, in another document or in the
    same, but is not itself in that first occurrence: of "ababab…" one run of `length` stays. That is what a suffix array finds as substrings
    of at least `length` items that occur twice (Lee et al. 2022), without those that come first. Runs are found by a hash, and then compared.

    Memory is bounded whatever the number of items; temporary files take 16 bytes an item, and 8 for each that is repeated.
    """
    values, offsets = items.values, items.offsets
    count = int(np.maximum(np.diff(offsets) - length + 1, 0).sum())

    def same(first: np.ndarray, again: np.ndarray) -> np.ndarray:
        reach = np.arange(length)
        found = np.empty(len(first), bool)
        step = max(1, BLOCK // length)
        for start in range(0, len(first), step):
            part = slice(start, start + step)
            found[part] = (values[first[part, None] + reach] == values[again[part, None] + reach]).all(1)
        return found

    before = firsts(_keys(items, length), count, len(values), same)
    counts = np.zeros(len(items), np.int64)
    runs = gathered(_runs(before, offsets, length, counts))
    return Ragged(runs, np.concatenate([[0], np.cumsum(counts)]))


def _keys(items: Ragged, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places where runs of `length` begin, and the runs' hashes."""
    for start in range(0, len(items.values) - length + 1, BLOCK):
        stop = min(start + BLOCK, len(items.values) - length + 1)
        low, high = np.searchsorted(items.offsets, (start, stop + length - 1), "right")  # documents that end in here
        ends, begins = items.offsets[low:high], items.offsets[low - 1 : high - 1]
        last = np.clip(np.maximum(ends - length + 1, begins) - start, 0, stop - start)  # from here on they reach into the next
        across = np.bincount(last, minlength=stop - start + 1) - np.bincount(
            np.clip(ends - start, 0, stop - start), minlength=stop - start + 1
        )
        places = np.flatnonzero(np.cumsum(across[:-1]) == 0)
        keys = windows(mix(items.values[start : stop + length - 1]), length)
        yield places + start, keys[places]


def _runs(before: np.ndarray, offsets: np.ndarray, length: int, counts: np.ndarray) -> Iterator[np.ndarray]:
    """(first, end, document) of the runs, for some documents at a time; `counts` becomes the numbers of each document."""
    low = 0
    while low < len(counts):
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + BLOCK, "right")) - 1)
        base, size = offsets[low], int(offsets[high] - offsets[low])
        again = np.flatnonzero(before[base : base + size])
        first = before[again + base] - 1
        document = np.searchsorted(offsets[low : high + 1], again + base, "right") - 1
        # Document by document with a gap between, so that runs of two do not touch.
        begins, ends = np.maximum(again, first - base + length) + document, again + length + document
        size += high - low
        depth = np.cumsum(np.bincount(begins, minlength=size + 1) - np.bincount(ends, minlength=size + 1))
        edge = np.flatnonzero(np.diff(depth > 0, prepend=False))
        begin, end = edge[::2], edge[1::2]
        window = np.searchsorted(ends, begin, "right")  # the run's first
        document = document[window]
        place = offsets[low:high][document] - base + document
        source = np.searchsorted(offsets, first[window], "right") - 1
        yield np.stack([begin - place, end - place, source], axis=1)
        counts[low:high] = 3 * np.bincount(document, minlength=high - low)
        low = high
