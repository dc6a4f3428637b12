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

    def to_line(self) -> bytes:
        d = self.document
        about = {"id": d.id, "source": d.source, "created": d.created, "metadata": d.metadata, "decisions": self.decisions}
        return b'%s,"text":%s}\n' % (_encode(about)[:-1].encode(), _quoted(d.text))


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_CONTROLS = bytes(range(32))


def _quoted(text: str) -> bytes:
    """A text as JSON, as `_encode` writes it; twice as fast where there are no control characters but line ends."""
    data = text.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    if len(data.translate(None, _CONTROLS)) < len(data):
        return _encode(text).encode()
    return b'"%s"' % data


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file of them."""
    with Path(path).open("rb") as file:
        for line in file:
            data = json.loads(line)
            document = Document(data["id"], data["text"], data["source"], data["metadata"], data["created"])
            yield Record(document, tuple(data["decisions"]))


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
