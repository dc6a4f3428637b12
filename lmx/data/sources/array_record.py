"""ArrayRecord, the random-access format of Grain and TFDS."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources.paths import documented, each, found, grouped, parts
from lmx.data.sources.records import CREATED, first_line, from_record, sound, utf8
from lmx.data.sources.source import UNIT, Omitted, Unit

RECORDS = 256  # read at once


@dataclass(frozen=True)
class ArrayRecord:
    """A record a document, from a file, a glob, or the .array_record files below a folder. Without an id of its own it is `file:number`.

    If a file's first record is a JSON object, so is each; else each is UTF-8 text.
    """

    path: str
    text: str = "text"
    id: str = "id"
    created: tuple[str, ...] = CREATED
    """As for `Jsonl`."""
    name: str = "array_record"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: path.suffix.lower() == ".array_record", ".array_record", name=self.name)
        return grouped(files, self.path, size, _parts)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        return documented(records(path, start, stop), path, relative, self._document, "record")

    def _document(self, record: tuple[bytes, bool], id: str, source: str, _: str) -> Document:
        data, as_json = record
        if not as_json:
            return Document(id, utf8(data), source)
        return from_record(sound(data), id, source, text=self.text, key=self.id, created=self.created)


def records(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, tuple[bytes, bool]] | Omitted]:
    """The records `[start, stop)` with their numbers, and whether the file's are JSON objects. Of damaged ones the others are read."""
    reader = _reader(path)
    if isinstance(reader, Exception):
        yield Omitted(str(path), f"is not a whole ArrayRecord file ({first_line(reader)}); write it again", damaged=True)
        return
    stop = reader.num_records() if stop is None else stop
    as_json = False
    if stop:
        first = _read(reader, 0, 1)[0]
        as_json = isinstance(first, bytes) and _is_object(first)
    for begin in range(start, stop, RECORDS):
        for number, data in enumerate(_read(reader, begin, min(begin + RECORDS, stop)), begin):
            if isinstance(data, Exception):
                yield Omitted(f"{path}, record {number}", f"is damaged ({first_line(data)}); write it again", damaged=True)
            else:
                yield number, (data, as_json)
    reader.close()


def _read(reader: Any, start: int, stop: int) -> list[bytes | Exception]:
    """Records, each by itself where not all can be read."""
    try:
        return reader.read(list(range(start, stop)))
    except (RuntimeError, ValueError, IndexError) as error:
        if stop - start == 1:
            return [error]
        return [record for number in range(start, stop) for record in _read(reader, number, number + 1)]


def _reader(path: Path) -> Any:
    """A reader, or what is wrong with the file."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        if not reader.num_records():
            reader.close()  # only this says that the file was cut off; until then it seems to have no records
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        return reader
    except (RuntimeError, ValueError) as error:
        return error


def _parts(path: Path, count: int) -> list[tuple[int, int | None]]:
    reader = _reader(path)
    if isinstance(reader, Exception):  # reading it says so
        return []
    total = reader.num_records()
    reader.close()
    return parts(total, min(count, total))


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(sound(data), dict)
    except ValueError:
        return False
