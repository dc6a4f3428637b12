"""Plain folders of text: a file a document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmx.data.documents import Document
from lmx.data.sources.compressed import opened
from lmx.data.sources.paths import each, found, grouped, suffix, whole
from lmx.data.sources.source import UNIT, Omitted, Unit


@dataclass(frozen=True)
class Texts:
    """UTF-8 files (.gz, .xz, .bz2 and .zst too): a file, those of a glob, or those below a folder with one of `suffixes`.

    A document's id is the file's path below the source.
    """

    path: str
    suffixes: tuple[str, ...] = (".txt", ".md")
    name: str = "texts"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: suffix(path) in self.suffixes, " or ".join(self.suffixes), name=self.name)
        return grouped(files, self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        with opened(path, self.name) as file:
            yield whole(file, relative, str(path))
