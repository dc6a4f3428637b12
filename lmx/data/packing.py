"""The index plan of an epoch: which spans of which documents make up packed example i, and in which order examples come.

A span is `tokens[start:stop]` of one document, n + 1 tokens giving n pairs: inputs `span[:-1]`, targets `span[1:]`. Where a document goes
on in another example, the next span starts with the token this one ended with: there a target, here the first input. So in every epoch each
token of a document but its first is a target exactly once, none is predicted from another document, and an example of `length` pairs is
full with `length` targets. Attention does not reach back over a cut: positions start at 0 in every span.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Packing = Literal["concatenate", "first_fit", "stream"]
PACKINGS = get_args(Packing)


@dataclass(frozen=True, eq=False)
class Plan:
    """The packed examples of one epoch. Example i consists of spans `first[i]` to `first[i + 1]`, in that order."""

    document: np.ndarray
    """int64 `[spans]`"""
    start: np.ndarray
    """int64 `[spans]`: the span's first token within its document."""
    stop: np.ndarray
    """int64 `[spans]`: one past its last token (which is only a target), so `stop - start - 1` pairs, at least 1."""
    first: np.ndarray
    """int64 `[examples + 1]`"""

    def __len__(self) -> int:
        """Examples."""
        return len(self.first) - 1


def plan(lengths: np.ndarray, length: int, *, packing: Packing = "concatenate", order: np.ndarray | None = None) -> Plan:
    """Pack documents of `lengths` tokens `[documents]` into examples of `length` pairs.

    - `"concatenate"`: the pairs of all documents in a row, cut every `length` pairs; every example but the last is full. A cut falls
      anywhere: a document goes on in the next example (see above for the token at the cut). `order` (a permutation of the documents) is the
      order of the row, so that each epoch can cut elsewhere; the number of examples does not depend on it.
    - `"stream"`: the same; `lmx.data.pipeline` gives it all documents as one.
    - `"first_fit"`: documents are kept whole and go, in order, into the first example with room; examples end with padding. Only a document
      longer than an example is cut, into full spans and a rest that is placed like a document. (About 5 microseconds a document.)

    Documents of one token or none have nothing to predict and no span. Raises ValueError when that is all of them, or for a bad argument.
    """
    lengths = np.asarray(lengths, np.int64)
    if length < 1:
        raise ValueError(f"data.length={length} is not positive; use the number of tokens in a packed example, 256 say")
    if packing not in PACKINGS:
        raise ValueError(f"data.packing={packing!r} is not one of {', '.join(PACKINGS)}")
    pairs = np.maximum(lengths - 1, 0)
    if not pairs.sum():
        raise ValueError(f"nothing to predict: none of the {len(lengths)} documents is longer than one token; give data.train more text")
    if order is None:
        order = np.arange(len(lengths))
    return (_first_fit if packing == "first_fit" else _concatenate)(pairs[order], order, length)


@dataclass(frozen=True)
class Fill:
    """How well a way of packing fills its examples."""

    packing: Packing
    examples: int
    filled: float
    """The share of columns that predict something; the rest is padding."""
    cut: int
    """Documents that are in more than one example."""

    def __str__(self) -> str:
        return f"{self.packing}: {self.examples:,} examples, {1 - self.filled:.2%} padding, {self.cut:,} documents cut"


def fill(lengths: np.ndarray, length: int, packing: Packing) -> Fill:
    """What packing documents of `lengths` tokens into examples of `length` pairs comes to. Raises ValueError as `plan` does."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    packed = plan(ends[-1:] if packing == "stream" else lengths, length, packing=packing)
    pairs = int((packed.stop - packed.start - 1).sum())
    if packing == "stream":  # whose only document is all of them
        edges = np.arange(1, len(packed)) * length
        nth = np.searchsorted(ends, edges, side="right")
        cut = len(np.unique(nth[(edges > (ends - lengths)[nth]) & (edges < ends[nth] - 1)]))
    else:
        cut = int((np.bincount(packed.document) > 1).sum())
    return Fill(packing, len(packed), pairs / (len(packed) * length), cut)


def _concatenate(pairs: np.ndarray, order: np.ndarray, length: int) -> Plan:
    ends = np.cumsum(pairs)
    begins = ends - pairs
    total = ends[-1]
    edges = np.arange(0, total, length)
    # Spans lie between consecutive cuts: where a document begins and where an example does. (Two sorted runs: a stable sort merges them.)
    cuts = np.sort(np.concatenate([begins[pairs > 0], edges]), kind="stable")
    cuts = cuts[np.append(True, np.diff(cuts) > 0)]
    # Of documents that begin at the same place only the last is not empty.
    nth = np.searchsorted(begins, cuts, side="right") - 1
    start = cuts - begins[nth]
    stop = np.append(cuts[1:], total) - begins[nth] + 1
    return Plan(order[nth], start, stop, np.append(np.searchsorted(cuts, edges), len(cuts)))


def _first_fit(pairs: np.ndarray, order: np.ndarray, length: int) -> Plan:
    full, rest = np.divmod(pairs, length)
    # Full spans need no search: an example each. The rests are numbered after them, by where they are placed.
    whole = np.repeat(np.arange(len(pairs)), full)
    index = np.arange(len(whole)) - np.repeat(np.cumsum(full) - full, full)
    partial = np.flatnonzero(rest)
    bins = place(rest[partial], length)
    nth = np.concatenate([whole, partial])
    start = np.concatenate([index * length, full[partial] * length])
    stop = start + np.concatenate([np.full(len(whole), length), rest[partial]]) + 1
    example = np.concatenate([np.arange(len(whole)), len(whole) + bins])
    by_example = np.argsort(example, kind="stable")
    counts = np.bincount(example)
    return Plan(order[nth][by_example], start[by_example], stop[by_example], np.append(0, np.cumsum(counts)))


def place(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """First fit: the bin `[items]` of each item, opened as needed. A tree of the largest room among bins finds it in O(log bins)."""
    if not len(sizes):
        return np.zeros(0, np.int64)
    # At most one bin can be less than half full, which bounds how many there are.
    bins = min(len(sizes), 2 * int(-(-sizes.sum() // capacity)) + 1)
    leaves = 1 << (bins - 1).bit_length()
    room = [capacity] * (2 * leaves)
    placed = []
    for size in sizes.tolist():
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        room[node] -= size
        placed.append(node - leaves)
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return np.asarray(placed, np.int64)


def permutation(size: int, seed: int, epoch: int, *, stream: int = 0) -> np.ndarray:
    """A random permutation of 0..size-1, int64 `[size]`: a pure function of its arguments. Each `stream` is another one.

    Sorts Philox's raw numbers rather than asking NumPy to shuffle: those are promised to stay the same across NumPy's versions, shuffles
    are not, and a run must be able to go on after an upgrade.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return np.argsort(bits.random_raw(size), kind="stable")
