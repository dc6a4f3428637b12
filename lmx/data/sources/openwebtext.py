"""OpenWebText: tars of xz-compressed tars of texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmx.data.documents import Document
from lmx.data.sources.compressed import damage, opened, unpacked
from lmx.data.sources.paths import each, found, grouped, unreadable, whole
from lmx.data.sources.source import UNIT, Omitted, Unit
from lmx.data.sources.tars import members

ARCHIVES = (".tar", ".tar.xz", "_data.xz")


@dataclass(frozen=True)
class OpenWebText:
    """`openwebtext.tar.xz`, `subsets/urlsf_subset00.tar`, or the `urlsf_subset00-1_data.xz` in them: a file, a glob, or those of a folder.

    An archive is not cut. A document is called after its way through the archives; its metadata have the MD5 of its URL.
    """

    path: str
    name: str = "openwebtext"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        return grouped(found(self.path, lambda path: path.name.endswith(ARCHIVES), ", ".join(ARCHIVES), name=self.name), self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        with opened(path, self.name) as file:
            yield from self._archive(file, str(path), relative)

    def _archive(self, file: BinaryIO, where: str, id: str) -> Iterator[Document | Omitted]:
        for item in members(file, where):
            if isinstance(item, Omitted):
                yield item
                continue
            name, _, contents = item
            inside = f"{where}/{name}"
            if name.endswith(ARCHIVES):
                try:
                    archive = unpacked(contents, inside, self.name)
                except (*damage(), OSError) as error:
                    yield unreadable(inside, error)
                else:
                    with archive:
                        yield from self._archive(archive, inside, f"{id}/{name}")
            elif name.endswith(".txt"):
                stem = name.removesuffix(".txt")
                yield whole(contents, f"{id}/{stem}", where, {"url_md5": stem.rpartition("-")[2]}, where=inside)
            else:
                yield Omitted(inside, "not_text")
