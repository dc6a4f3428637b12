"""JSON lines: `.jsonl`, C4's `.json.gz`, Dolma's records, compressed or not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmx.data.documents import Document
from lmx.data.sources.paths import byte_parts, documented, each, found, grouped, json_records, suffix
from lmx.data.sources.records import CREATED, from_fields
from lmx.data.sources.source import UNIT, Omitted, Unit


@dataclass(frozen=True)
class Jsonl:
    """An object a line, from a file, a glob, or the .jsonl, .ndjson and .json files below a folder (.gz, .xz, .bz2 and .zst too).

    Uncompressed files are cut at line ends. A document without an id of its own is called `file@byte`, the byte its line begins at.
    """

    path: str
    text: str = "text"
    """The field with the text."""
    id: str = "id"
    """The field with its id, unique in the source; where a record has none, or no such field, the place is its id."""
    created: tuple[str, ...] = CREATED
    """The fields that may say when it was written or crawled (ISO 8601, or seconds since 1970): the first that does."""
    name: str = "jsonl"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: suffix(path) in (".jsonl", ".ndjson", ".json"), ".jsonl, .ndjson or .json", name=self.name)
        return grouped(files, self.path, size, byte_parts)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        made = from_fields(self.text, self.id, self.created)
        return documented(json_records(path, self.name, start, stop), path, relative, made)
