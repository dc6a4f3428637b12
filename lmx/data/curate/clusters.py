"""What duplicates there were: groups of documents of which one stayed, by size, and the largest to read."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from lmx.data.curate.recipe import Recipe, passes
from lmx.data.curate.records import Record, open_ragged, read_records
from lmx.data.curate.work import Place


@dataclass(frozen=True)
class Clusters:
    """The duplicates that a corpus step found in a run's folder. Documents have the numbers that the step gave them."""

    folder: Path
    number: int
    """The pass that extracted them."""
    dropped: np.ndarray
    """Those that did not stay."""
    kept: np.ndarray
    """For each of them the one that did."""

    @cached_property
    def sizes(self) -> Counter[int]:
        """How many clusters have so many documents."""
        _, counts = np.unique(self.kept, return_counts=True)
        sizes, clusters = np.unique(counts + 1, return_counts=True)
        return Counter(dict(zip(sizes.tolist(), clusters.tolist(), strict=True)))

    def largest(self, count: int, members: int = 2) -> list[tuple[int, Record, list[Record]]]:
        """The largest: documents in it, the one that stayed, and the first of those that did not."""
        kept, counts = np.unique(self.kept, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:count]
        return [
            (
                int(counts[i]) + 1,
                self.record(kept[i]),
                [self.record(n) for n in self.dropped[np.flatnonzero(self.kept == kept[i])[:members]]],
            )
            for i in order
        ]

    @cached_property
    def _ends(self) -> np.ndarray:
        """The number after each unit's last document."""
        paths = sorted((self.folder / "work" / str(self.number)).glob("*.ids.lengths.npy"))
        return np.cumsum([np.load(path, mmap_mode="r").size for path in paths])

    def record(self, document: int) -> Record:
        """A document as the step saw it."""
        unit = int(np.searchsorted(self._ends, document, "right"))
        line = int(document) - (int(self._ends[unit - 1]) if unit else 0)
        return next(islice(read_records(Place(self.folder).of(self.number, unit, "kept.jsonl")), line, None))


def clusters(recipe: Recipe, folder: Path, step: str) -> Clusters | None:
    """The clusters of a corpus step that drops whole documents, or None for one that cuts parts out, or that found no duplicate."""
    for number, (_, _, after) in enumerate(passes(recipe)):
        if after is not None and after.name == step:
            resolved = open_ragged(Place(folder).ragged(number, "resolved"))
            lengths = np.diff(resolved.offsets)
            if lengths.size and lengths.max() == 1:
                return Clusters(folder, number, np.flatnonzero(lengths), np.asarray(resolved.values))
    return None
