"""From keys that documents share to groups of duplicates, of which the first in the corpus stays.

Two pure functions do it: `edges` makes of the documents of one key the pairs that belong together, `components` makes groups of pairs; a
cluster's group-by-key can feed them. `shared` is `edges` for all keys of an array at once, and `firsts` finds earlier occurrences among more
keys than memory holds.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from tempfile import TemporaryFile

import numpy as np

from lmx.data.clean.step import Ragged

BUCKET = 1 << 17  # keys grouped at a time; each takes about 60 bytes then
FILES = 512  # open at a time: beyond 67 million keys buckets grow
SCRATCH = 1 << 26  # bytes from which on a result lies in a temporary file

Same = Callable[[np.ndarray, np.ndarray], np.ndarray]


def edges(documents: Iterable[int]) -> list[tuple[int, int]]:
    """(lowest, other) for each other of the documents that share a key, in whatever order they come."""
    first, *others = sorted(set(documents))
    return [(first, other) for other in others]


def shared(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`edges` for all the keys of an array (uint64): where in it a key is first, and where again, ordered by key and place."""
    order = _crowded(keys)
    order = order[np.argsort(keys[order], kind="stable")]
    keys = keys[order]
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    second = np.flatnonzero(np.diff(again, prepend=-1) != 1)  # where in `again` a key's second occurrence stands
    first = np.repeat(again[second] - 1, np.diff(second, append=len(again)))
    return order[first], order[again]


def _crowded(keys: np.ndarray) -> np.ndarray:
    """Places of keys that may be there more than once, in order; to sort only those takes half the time. (Hashes are random in all bits.)"""
    slots = 2 << len(keys).bit_length()
    slot = (keys & np.uint64(slots - 1)).astype(np.intp)
    places = np.arange(len(keys), dtype=np.int32 if len(keys) < 1 << 31 else np.int64)
    last = np.empty(slots, places.dtype)
    last[slot] = places
    crowded = np.zeros(slots, bool)
    crowded[slot[last[slot] != places]] = True
    return np.flatnonzero(crowded[slot])


def components(count: int, left: np.ndarray, right: np.ndarray, parents: np.ndarray | None = None) -> np.ndarray:
    """int64 `[count]`: the lowest document of each one's component in the graph of these edges.

    With `parents`, an earlier result, its components are joined by these edges: where not all edges fit in memory it is done part by part.
    The order of edges and of parts does not matter.
    """
    parents = np.arange(count) if parents is None else parents.copy()
    while True:
        left, right = parents[left], parents[right]
        apart = left != right
        if not apart.any():
            return parents
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))  # roots hang on lower roots
        while not np.array_equal(parents, roots := parents[parents]):
            parents = roots


def duplicates(first: np.ndarray) -> Ragged:
    """Of a document that is not the first of its group the number of that one, of others nothing."""
    later = first != np.arange(len(first))
    return Ragged(first[later], np.concatenate([[0], np.cumsum(later)]))


def firsts(parts: Iterable[tuple[np.ndarray, np.ndarray]], count: int, size: int, same: Same | None = None) -> np.ndarray:
    """int64 `[size]`: for a place whose key has occurred before, 1 + the place where it was first, and 0 for others.

    `parts` are places and their keys (uint64), `count` in all, in ascending order of places; no more than `BUCKET` or so are in memory, the
    others in temporary files. With `same`, which compares what stands at two arrays of places, equal keys alone do not count.
    """
    buckets = min(max(1, -(-count // BUCKET)), FILES)
    found = scratch(size)
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile()) for _ in range(buckets)]
        for places, keys in parts:
            pairs = np.stack([keys, places.astype(np.uint64)], axis=1)
            bucket = ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint16)
            pairs = pairs[np.argsort(bucket, kind="stable")]
            stops = np.cumsum(np.bincount(bucket, minlength=buckets))
            for file, part in zip(files, np.split(pairs, stops[:-1]), strict=True):
                file.write(part.data)
        for file in files:
            file.seek(0)
            pairs = np.frombuffer(file.read(), np.uint64).reshape(-1, 2)
            keys, places = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
            del pairs
            while len(keys):
                first, again = shared(keys)
                match = np.ones(len(again), bool) if same is None else same(places[first], places[again])
                found[places[again[match]]] = places[first[match]] + 1
                keys, places = keys[again[~match]], places[again[~match]]  # those that only collide are grouped among themselves
    return found


def scratch(size: int) -> np.ndarray:
    """int64 `[size]` of zeros: in memory, or where that is much in a temporary file, of which only what is written takes room."""
    if size * 8 < SCRATCH:
        return np.zeros(size, np.int64)
    with TemporaryFile() as file:
        return np.memmap(file, np.int64, "w+", shape=(size,))


def gathered(parts: Iterator[np.ndarray]) -> np.ndarray:
    """Arrays of int64 one after the other: in memory, or where that is much in a temporary file."""
    with TemporaryFile() as file:
        size = sum(file.write(np.ascontiguousarray(part).data) for part in parts)
        file.seek(0)
        if size < SCRATCH:
            return np.frombuffer(file.read(), np.int64)
        return np.memmap(file, np.int64, "r", shape=(size // 8,))
