"""Parquet: row groups are its parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources.compressed import package
from lmx.data.sources.paths import documented, each, found, grouped, parts
from lmx.data.sources.records import CREATED, first_line, from_fields, plain
from lmx.data.sources.source import UNIT, Omitted, Unit

ROWS = 256  # read at once


@dataclass(frozen=True)
class Parquet:
    """A row a document, from a file, a glob, or the .parquet files below a folder. Without an id of its own it is `file:row`."""

    path: str
    text: str = "text"
    id: str = "id"
    created: tuple[str, ...] = CREATED
    """As for `Jsonl`."""
    columns: tuple[str, ...] | None = None
    """What is read; None: all. Columns that JSON cannot hold (images) must be left out."""
    name: str = "parquet"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: path.suffix.lower() == ".parquet", ".parquet", name=self.name)
        return grouped(files, self.path, size, row_groups)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        made = from_fields(self.text, self.id, self.created)
        return documented(rows(path, start, stop, self.columns, self.name), path, relative, made, "record")


def rows(
    path: Path, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None, name: str = "source"
) -> Iterator[tuple[int, dict[str, Any]] | Omitted]:
    """The rows of the row groups `[start, stop)` with their numbers in the file, as what JSON can hold. Damage costs a row or a row group."""
    arrow, file = _opened(path, name)
    if isinstance(file, Exception):
        yield Omitted(str(path), f"is not a whole Parquet file ({first_line(file)}); write it again", damaged=True)
        return
    with file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for group in range(start, len(sizes) if stop is None else min(stop, len(sizes))):
            number = first = sum(sizes[:group])
            problem = ""
            try:
                # Batch by batch, each column once to Python: memory does not grow with the row group's pages.
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from _batch(batch, number, path)
                    number += batch.num_rows
            except (arrow.ArrowException, OSError, ValueError) as error:
                problem = first_line(error)
            if problem or number != first + sizes[group]:
                where = f"{path}, row group {group} from record {number}"
                yield Omitted(where, f"is damaged ({problem or 'rows are missing'}); write it again", damaged=True)


def _batch(batch: Any, number: int, path: Path) -> Iterator[tuple[int, dict[str, Any]] | Omitted]:
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except ValueError:  # one of its texts is not UTF-8: the others are read one by one
        columns = None
    for row in range(batch.num_rows):
        try:
            values = [column[row] for column in columns] if columns else [column[row].as_py() for column in batch.columns]
            found = number + row, {name: v if type(v) is str else plain(v) for name, v in zip(names, values, strict=True)}
        except ValueError as error:
            found = Omitted(f"{path}, record {number + row}", first_line(error), damaged=True)
        yield found


def _opened(path: Path, name: str) -> tuple[Any, Any]:
    """pyarrow, and the file, or what is wrong with it."""
    parquet = package("pyarrow.parquet", f"{name}: {path}")
    import pyarrow

    try:
        return pyarrow, parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return pyarrow, error


def row_groups(path: Path, count: int) -> list[tuple[int, int | None]]:
    """Bounds of `count` parts of whole row groups."""
    _, file = _opened(path, "parquet")
    if isinstance(file, Exception):  # reading it says so
        return []
    with file:
        groups = file.metadata.num_row_groups
    return parts(groups, min(count, groups))
