"""Documents on their way through a recipe: one JSON line each, with the decisions so far. And arrays of each, in files."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.clean.step import Ragged
from lmx.data.documents import Document
from lmx.data.whole import whole


@dataclass(frozen=True, slots=True)
class Record:
    """A document and what was decided of it on the way."""

    document: Document
    decisions: tuple[Mapping[str, Any], ...] = field(default=())
    """One for each step that changed it, in order: `{"step", "counts", "metadata", "bytes"}` (its length before)."""
    terms: tuple[str, ...] = ()
    """The identity terms of the text as it was read; empty where a recipe does not count them."""

    def to_line(self) -> bytes:
        """Raises ValueError for metadata that JSON cannot hold."""
        d = self.document
        about = {"id": d.id, "source": d.source, "created": d.created, "metadata": d.metadata, "decisions": self.decisions}
        about |= {"terms": self.terms} if self.terms else {}
        try:
            return b'%s,"text":%s}\n' % (_encode(about)[:-1].encode(), _quoted(d.text))
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"document {d.id!r} of {d.source} has metadata that cannot be written as JSON: {error}") from error

    @classmethod
    def from_line(cls, line: bytes) -> "Record":
        """What `to_line` wrote."""
        data = json.loads(line)
        document = Document(data["id"], data["text"], data["source"], data["metadata"], data["created"])
        return cls(document, tuple(data["decisions"]), tuple(data.get("terms", ())))


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
        yield from map(Record.from_line, file)


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


class Arrays(ExitStack):
    """Arrays of one dtype, one after another, as they come: into `PATH.values.npy` and `PATH.lengths.npy` when the block ends."""

    def __init__(self, path: Path, what: str):
        super().__init__()
        self._what = what
        self._files = [self.enter_context(whole(path.with_name(f"{path.name}.{name}.npy"))) for name in ("values", "lengths")]
        self._counts, self._dtypes = [0, 0], [np.dtype(np.uint64), np.dtype(np.int64)]
        self._header()

    def append(self, array: np.ndarray) -> None:
        """Raises ValueError for an array of another dtype than the others'."""
        if not self._counts[1]:
            self._dtypes[0] = array.dtype
            self._header()
        if array.dtype != self._dtypes[0]:
            raise ValueError(f"{self._what} gives {array.dtype} of one document and {self._dtypes[0]} of another")
        for which, part in enumerate((array, np.array([len(array)], np.int64))):
            self._files[which].write(part.tobytes())
            self._counts[which] += len(part)

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            self._header()
        return super().__exit__(*error)

    def _header(self) -> None:
        """NumPy leaves room in it for a first dimension that grows, so it can be written again when that is known."""
        for file, count, dtype in zip(self._files, self._counts, self._dtypes, strict=True):
            file.seek(0)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
