"""Documents on their way through a recipe: one JSON line each, with the decisions so far. And files that are whole or not there."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmx.data.clean.step import Ragged
from lmx.data.documents import Document


@dataclass(frozen=True, slots=True)
class Record:
    """A document and what was decided of it on the way."""

    document: Document
    decisions: tuple[Mapping[str, Any], ...] = field(default=())
    """One for each step that changed it, in order: `{"step", "counts", "metadata", "bytes"}` (its length before)."""
    terms: tuple[str, ...] = ()
    """The identity terms of the text as it was read; empty where a recipe does not count them."""

    def to_line(self) -> bytes:
        d = self.document
        fields = {"id": d.id, "source": d.source, "created": d.created, "metadata": d.metadata, "decisions": self.decisions, "text": d.text}
        fields |= {"terms": self.terms} if self.terms else {}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Record":
        """What `to_line` wrote."""
        data = json.loads(line)
        document = Document(data["id"], data["text"], data["source"], data["metadata"], data["created"])
        return cls(document, tuple(data["decisions"]), tuple(data.get("terms", ())))


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file of them."""
    with Path(path).open("rb") as file:
        yield from map(Record.from_line, file)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with whole(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n")


def open_ragged(path: Path) -> Ragged:
    """An array for each document, memory-mapped, as `write_ragged` wrote it."""
    values, offsets = (path / f"{name}.npy" for name in ("values", "offsets"))
    return Ragged(*(np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None) for file in (values, offsets)))  # none is empty


def write_ragged(path: Path, ragged: Ragged) -> None:
    """Write an array for each document into a folder; `offsets.npy` comes last and says that all is there."""
    path.mkdir(exist_ok=True)
    for name in ("values", "offsets"):
        with whole(path / f"{name}.npy") as file:
            np.save(file, getattr(ragged, name))
