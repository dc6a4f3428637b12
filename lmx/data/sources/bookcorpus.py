"""BookCorpus in its three releases: a sentence a line, and two of a book a file."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmx.data.documents import Document
from lmx.data.sources.compressed import kind, opened
from lmx.data.sources.paths import BLOCK, each, found, grouped, lines, suffix, whole
from lmx.data.sources.records import utf8
from lmx.data.sources.source import UNIT, Omitted, Unit
from lmx.data.sources.tars import SUFFIXES, members


@dataclass(frozen=True)
class BookCorpus:
    """A file, a glob, or the .txt files and tars below a folder: the same files, packed or not.

    - `books_large_p1.txt`, `books_large_p2.txt` and `all.txt` (`bookcorpus.tar.bz2`; what soskek/bookcorpus joins): a sentence a line, books
      run together. `lines_per_document` lines make a document, `file@byte`; the uncompressed files are cut there.
    - `books1/epubtxt/*.epub.txt` (`books1.tar.gz`) and `out_txts/*.txt`: a book a file and a document.
    """

    path: str
    lines_per_document: int = 512
    sentences: str = r"(books_large_p\d+|all)\.txt"
    """The names of files with a sentence a line, a regular expression; other .txt files hold a book."""
    name: str = "bookcorpus"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        if self.lines_per_document < 1:
            raise ValueError(f"{self.name}: lines_per_document={self.lines_per_document}, expected at least 1")
        return grouped(found(self.path, _wanted, ".txt, .tar, .tar.gz or .tar.bz2", name=self.name), self.path, size, self._parts)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        with opened(path, self.name) as file:
            if suffix(path) not in SUFFIXES:
                yield from self._texts(file, str(path), relative, start, stop)
                return
            for item in members(file, str(path)):
                if isinstance(item, Omitted):
                    yield item
                elif not item[0].endswith(".txt") or _is_list(item[0]):
                    yield Omitted(f"{path}/{item[0]}", "not_text")
                else:
                    yield from self._texts(item[2], f"{path}/{item[0]}", f"{relative}/{item[0]}")

    def _texts(self, file: BinaryIO, where: str, id: str, start: int = 0, stop: int | None = None) -> Iterator[Document | Omitted]:
        if not self._has_sentences(where):
            yield whole(file, id, where)
            return
        for run in batched(lines(file, where, start, stop), self.lines_per_document):
            kept = [line for line in run if not isinstance(line, Omitted)]
            if kept:
                first = kept[0][0]
                try:
                    text = utf8(b"\n".join(line.removesuffix(b"\r") for _, line in kept), first)
                    yield Document(f"{id}@{first}", text, where)
                except ValueError as error:
                    yield Omitted(f"{where}, {len(kept)} lines from byte {first}", str(error), damaged=True)
            yield from (line for line in run if isinstance(line, Omitted))

    def _has_sentences(self, where: str) -> bool:
        return re.fullmatch(rf"({self.sentences})(\.(gz|xz|bz2|zst))?", Path(where).name) is not None

    def _parts(self, path: Path, count: int) -> list[tuple[int, int | None]]:
        """Cut where a document begins. Lines are counted from the file's first, so this reads it."""
        if not self._has_sentences(str(path)) or kind(path):
            return []
        total = path.stat().st_size
        starts, seen, offset = [0], 0, 0
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                for start in (ends[-(seen + 1) % self.lines_per_document :: self.lines_per_document] + offset + 1).tolist():
                    if starts[-1] + total // count <= start < total:
                        starts.append(start)
                seen += len(ends)
                offset += len(block)
        return list(zip(starts, [*starts[1:], None], strict=True))


def _is_list(name: str) -> bool:
    """books1.tar.gz holds lists of its books' URLs."""
    return name.endswith("urls.txt")


def _wanted(path: Path) -> bool:
    return suffix(path) in SUFFIXES or (suffix(path) == ".txt" and not _is_list(path.name))
