"""A source as one stream: shared out to readers, resumed where it was left."""

from collections.abc import Iterator, Sequence
from itertools import islice

from lmx.data.documents import Document
from lmx.data.sources.source import UNIT, Omitted, Source

Position = tuple[str, int]
"""A unit's name, and how many of its documents (and omissions) have been read. JSON holds it, as a list."""


def stream(
    source: Source, *, shard: tuple[int, int] = (0, 1), start: Sequence | None = None, size: int = UNIT
) -> Iterator[tuple[Position, Document | Omitted]]:
    """What a source holds, each with the position after it: given as `start`, with the same `shard` and `size`, it goes on with the next.

    `shard` (i, n) is the i-th of n readers, from 0: it reads the units i, i + n, … Together they read everything once. Resuming reads the
    unit it was left in again, up to there. Raises as `source.units`, and ValueError for a shard or a start that there is not.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard={shard!r}, expected (i, n) with 0 <= i < n")
    units = list(source.units(size))[index::count]
    done = 0
    if start is not None:
        unit, done = start
        names = [u.name for u in units]
        if unit not in names or not isinstance(done, int) or done < 0:
            raise ValueError(
                f"start={start!r} is no position of shard {index} of {count} of {source.name}: it has no unit {unit!r};"
                " give the shard, the size and the files that it was read with"
            )
        units = units[names.index(unit) :]
    return _read(source, units, done)


def _read(source: Source, units: Sequence, done: int) -> Iterator[tuple[Position, Document | Omitted]]:
    for unit in units:
        for number, item in enumerate(islice(source.read(unit), done, None), done + 1):
            yield (unit.name, number), item
        done = 0
