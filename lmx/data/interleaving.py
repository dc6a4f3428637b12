"""Which component of a mixture global example j is, and which of that component's: exact shares, found either way in a few operations.

Shares are constant on segments of the run (a curriculum's stages, and what is left once a component is used up). On a segment the first N
slots are divided down a balanced tree of components, half of them against the other half: N x share slots, rounded, go to one side, the rest
to the other. Both counts only grow with N, so slot N is the one by which a count grows, and its number is that count; and the slot of a
component's n-th example is a division back up the tree. What rounding left over is handed to the next segment. So after any N slots each
component's count is its share to within `ceil(log2 components) / 2 + 1` examples however long the run is, and in whole numbers everywhere.

Within blocks of 64 slots a permutation seeded by where the block begins then takes the regularity out. Blocks do not cross segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmx.data.packing import permutation

UNITS = 1 << 28  # a share is a whole number of these: 2**32 examples times a share stay within 64 bits
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Interleaving:
    """An order of components, made by `interleave`. Segments are of slots; slots are global examples before blocks are permuted."""

    begins: np.ndarray
    """int64 `[segments + 1]`: the first slot of each; the last entry is `total`."""
    edges: np.ndarray
    """int64 `[segments, components + 1]`: shares summed from the left, from 0 to `UNITS`."""
    phases: np.ndarray
    """int64 `[segments, components]`: what each division of the tree begins with, by the component where it divides."""
    counts: np.ndarray
    """int64 `[segments + 1, components]`: examples of each component before the segment."""
    seed: int | None
    """Of the permutations; None: none."""

    @property
    def total(self) -> int:
        """Global examples: where the order ends."""
        return int(self.begins[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The component of each global example, and its number among the examples of that one; int64 `[ids]` both.

        Raises IndexError for an example outside 0..total-1.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.total):
            raise IndexError(f"examples {ids.min()} to {ids.max()} of a mixture of {self.total}")
        segment = self._segment(ids)
        slots = self._permuted(ids, segment, inverse=False) - self.begins[segment]
        component, nth = np.zeros_like(ids), np.zeros_like(ids)

        def descend(some: np.ndarray, low: int, high: int, n: np.ndarray) -> None:
            if not len(some):
                return
            if high - low == 1:
                component[some], nth[some] = low, n + self.counts[segment[some], low]
                return
            middle, edges = (low + high) // 2, self.edges[segment[some]]
            phase = self.phases[segment[some], middle]
            node, left = edges[:, high] - edges[:, low], edges[:, middle] - edges[:, low]
            before = (n * left + phase) // node
            is_left = ((n + 1) * left + phase) // node > before
            descend(some[is_left], low, middle, before[is_left])
            descend(some[~is_left], middle, high, (n - before)[~is_left])

        descend(np.arange(len(ids)), 0, self.counts.shape[1], slots)
        return component, nth

    def find(self, component: int, nth: np.ndarray) -> np.ndarray:
        """The inverse: the global examples, int64 `[nth]`, that are a component's examples by number. Raises IndexError for one that never
        comes."""
        nth = np.asarray(nth, np.int64)
        if len(nth) and not (nth.min() >= 0 and nth.max() < self.counts[-1, component]):
            raise IndexError(f"examples {nth.min()} to {nth.max()} of {self.counts[-1, component]} of component {component}")
        segment = np.searchsorted(self.counts[:, component], nth, side="right") - 1
        slot = _slot(self.edges[segment], self.phases[segment], component, nth - self.counts[segment, component])
        return self._permuted(slot + self.begins[segment], segment, inverse=True)

    def used(self, examples: int) -> np.ndarray:
        """How many examples of each component, int64 `[components]`, are among the first so many, up to the permutation of the last block."""
        examples = min(examples, self.total)
        if not len(self.edges):
            return self.counts[0]
        segment = min(int(self._segment(np.array(examples))), len(self.edges) - 1)
        split = _split(examples - int(self.begins[segment]), self.edges[segment].tolist(), self.phases[segment].tolist())
        return self.counts[segment] + np.asarray(split, np.int64)

    def _segment(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.begins, ids, side="right") - 1

    def _permuted(self, ids: np.ndarray, segment: np.ndarray, *, inverse: bool) -> np.ndarray:
        if self.seed is None:
            return ids
        starts = ids - (ids - self.begins[segment]) % BLOCK
        ends = np.minimum(starts + BLOCK, self.begins[segment + 1])
        found = np.empty_like(ids)
        for start, end in dict(zip(starts.tolist(), ends.tolist(), strict=True)).items():
            order = permutation(end - start, self.seed, start, stream=2)
            here = starts == start
            found[here] = start + (np.argsort(order) if inverse else order)[ids[here] - start]
        return found


def interleave(
    pieces: Sequence[tuple[int, Sequence[float]]],
    caps: Sequence[int | None],
    *,
    end: int,
    seed: int | None,
    redistribute: bool = True,
) -> Interleaving:
    """The order of a mixture.

    Args:
      pieces: the first slot of each part of the run, from 0 on, and the shares in it; they need not add up to one.
      caps: how many examples of each component there are to use, None for no end.
      end: slots of a run that no cap ends.
      redistribute: whether the others have the share of a component that is used up; else the order ends there.

    It ends early where none is left of the components that have a share.
    """
    rows: list[tuple[int, list[int], list[int], list[int]]] = []
    size = len(caps)
    counts, rest, slot = [0] * size, [UNITS // 2] * size, 0  # what is left over is counted in UNITS of an example
    stops = [*(begin for begin, _ in pieces[1:]), end]
    for (_, shares), stop in zip(pieces, stops, strict=True):
        while slot < min(stop, end):
            alive = [0.0 if cap is not None and n >= cap else share for share, cap, n in zip(shares, caps, counts, strict=True)]
            if not any(alive) or (not redistribute and alive != list(shares)):
                return _interleaving(rows, slot, counts, seed)
            edges = _edges(alive)
            nodes = [edges[high] - edges[low] for low, high in _nodes(size)]
            phases = [r * node // UNITS for r, node in zip(rest, nodes, strict=True)]
            rows.append((slot, edges, phases, list(counts)))
            until = min(stop, end)
            for c, cap in enumerate(caps):
                if cap is not None and alive[c] and edges[c + 1] > edges[c]:
                    until = min(until, slot + _slot_of(edges, phases, c, cap - counts[c] - 1) + 1)
            left: dict[int, int] = {}
            counts = [a + b for a, b in zip(counts, _split(until - slot, edges, phases, left), strict=True)]
            rest = [left[m] * UNITS // nodes[m] if left.get(m) is not None and nodes[m] else rest[m] for m in range(size)]
            slot = until
    return _interleaving(rows, slot, counts, seed)


def _interleaving(rows: list[tuple[int, list[int], list[int], list[int]]], total: int, counts: list[int], seed: int | None) -> Interleaving:
    begins, edges, phases, before = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    size, count = len(counts), len(rows)
    return Interleaving(
        begins=np.array([*begins, total], np.int64),
        edges=np.array(edges, np.int64).reshape(count, size + 1),
        phases=np.array(phases, np.int64).reshape(count, size),
        counts=np.array([*before, counts], np.int64),
        seed=seed,
    )


def _edges(shares: Sequence[float]) -> list[int]:
    """Shares in whole `UNITS`, by largest remainder, summed from the left."""
    total = sum(shares)
    exact = [share / total * UNITS for share in shares]
    whole = [int(x) for x in exact]
    for i in sorted(range(len(shares)), key=lambda i: whole[i] - exact[i])[: UNITS - sum(whole)]:
        whole[i] += 1
    edges = [0]
    for units in whole:
        edges.append(edges[-1] + units)
    return edges


def _nodes(size: int) -> list[tuple[int, int]]:
    """The components `[low, high)` of the tree's division at each one, by where it divides; nothing is divided at 0."""
    found = [(0, 0)] * size

    def visit(low: int, high: int) -> None:
        if high - low > 1:
            middle = (low + high) // 2
            found[middle] = (low, high)
            visit(low, middle)
            visit(middle, high)

    visit(0, size)
    return found


def _split(slots: int, edges: list[int], phases: list[int], left: dict[int, int] | None = None) -> list[int]:
    """How many of a segment's first slots each component has; `left`, if given, gets what each division leaves over."""
    found = [0] * (len(edges) - 1)

    def visit(low: int, high: int, n: int) -> None:
        if high - low == 1:
            found[low] = n
            return
        middle = (low + high) // 2
        node = edges[high] - edges[low]
        first, over = divmod(n * (edges[middle] - edges[low]) + phases[middle], node) if node else (0, None)
        if left is not None:
            left[middle] = over
        visit(low, middle, first)
        visit(middle, high, n - first)

    visit(0, len(found), slots)
    return found


def _path(size: int, component: int) -> list[tuple[int, int, int, bool]]:
    """The divisions above a component, the nearest first: low, middle, high, and whether it is on the left."""
    path, low, high = [], 0, size
    while high - low > 1:
        middle = (low + high) // 2
        path.append((low, middle, high, component < middle))
        low, high = (low, middle) if component < middle else (middle, high)
    return path[::-1]


def _slot(edges: np.ndarray, phases: np.ndarray, component: int, nth: np.ndarray) -> np.ndarray:
    """The slot within its segment, a row of `edges` and `phases` each, of a component's examples by number within it."""
    for low, middle, high, is_left in _path(edges.shape[1] - 1, component):
        node, phase = edges[:, high] - edges[:, low], phases[:, middle]
        if is_left:
            nth = -((phase - (nth + 1) * node) // (edges[:, middle] - edges[:, low])) - 1
        else:
            nth = (nth * node + phase) // (edges[:, high] - edges[:, middle])
    return nth


def _slot_of(edges: list[int], phases: list[int], component: int, nth: int) -> int:
    """`_slot` in Python's integers, which a cap far away does not overflow."""
    row = np.array([edges], object), np.array([phases], object)
    return int(_slot(*row, component, np.array([nth], object))[0])
