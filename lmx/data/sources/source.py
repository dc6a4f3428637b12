"""What a source is: its units, and the documents of each.

A source is a frozen dataclass of what decides its documents (paths, fields, rules) with two methods. It can be pickled, and reads the real
release format as it is: one file under `lmx/data/sources/`, one line in its `__init__`. Units are how it is read in parallel: what a unit
holds, and the order of documents in it, depend on the files and on `size` alone, never on who reads it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmx.data.documents import Document

UNIT = 64 << 20  # bytes of files in a unit, where a source can be cut at all


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source that one worker reads from its beginning to its end: some whole files, or a part of one."""

    name: str
    """Unique within the source, and the same wherever the files lie: `posts/RS_2005-06.zst`, `dump.xml.bz2@0`."""

    paths: tuple[str, ...]
    start: int = 0
    """Where it begins in its one file, in what the source counts: bytes, row groups, records. With several files 0."""
    stop: int | None = None
    """Where it ends; None: at the end of the file."""


@dataclass(frozen=True, slots=True)
class Omitted:
    """A part of a source that makes no document: nothing is left out without one of these."""

    where: str
    """The file, and the record, line or byte in it."""
    reason: str
    """A short fixed name where the source's own rules leave it out (`redirect`, `deleted`, `low_score`): reports count by it. Where it is
    damaged, what is wrong, in one line."""
    damaged: bool = False
    """It could not be read, or is not what the format says. A run refuses it, or skips and lists it, as it is told."""


class Source(Protocol):
    """Where documents come from. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """What reports call it (`wikipedia`); documents of a mixture are told apart by it."""
        ...

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        """Its parts in order, of about `size` bytes of files each where the format can be cut there; small files are grouped.

        Raises FileNotFoundError where nothing is there and ValueError, in one line, for what is seen to be wrong without reading it.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        """Documents of a unit in a fixed order, each with an `id` unique within the source, and what was left out where it stood.

        One in memory at a time. Damage is yielded, not raised: as much as can be read after it is read. Raises ValueError only for a package
        that is missing (naming the extra).
        """
        ...
