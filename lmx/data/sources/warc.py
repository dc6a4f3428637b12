"""CommonCrawl and other web archives: `Warc` (pages, as they were sent) and `Wet` (their text).

A file is a chain of gzip members, a record each, or zstd frames (without a dictionary), or not compressed. Records are found by their
`Content-Length`, never by looking for the next `WARC/1.0`: pages quote it. What is damaged costs the one record, for the next member is
found by how it begins.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lmx.data.documents import Document
from lmx.data.sources.chain import Chain
from lmx.data.sources.compressed import damage, kind, package
from lmx.data.sources.http import END, Page, content, decoded, fields, parse
from lmx.data.sources.paths import documented, each, found, grouped, parts, suffix, unreadable
from lmx.data.sources.records import iso, utf8
from lmx.data.sources.source import UNIT, Omitted, Unit

HEAD = 1 << 16  # bytes of a record's header, at most
NEXT = re.compile(rb"\r?\n\r?\n(?=WARC/1\.\d\r?\n)")
BLANK = re.compile(rb"[\r\n]*")
Extract = Callable[[str], str | None]


@dataclass(frozen=True)
class Record:
    offset: int
    """Of its member in the file, in bytes; of itself, where nothing is compressed."""
    headers: Mapping[str, str]
    """By lower-case name."""
    block: bytes | None
    """None where it is longer than the reader keeps."""

    @property
    def languages(self) -> list[str]:
        """As the crawler identified them, the main one first: ISO 639-3 codes."""
        return [code.strip() for code in self.headers.get("warc-identified-content-language", "").split(",") if code.strip()]

    def metadata(self, languages: list[str], **more: str) -> dict[str, Any]:
        headers = self.headers
        known = {
            "url": headers.get("warc-target-uri", "").strip("<>"),
            "record_id": headers.get("warc-record-id", "").strip("<>"),
            "digest": headers.get("warc-payload-digest") or headers.get("warc-block-digest", ""),
            "truncated": headers.get("warc-truncated", ""),
        }
        found = {key: value for key, value in known.items() if value} | {"offset": self.offset} | more
        return found | {"languages": languages} if languages else found

    @property
    def created(self) -> str:
        return iso(self.headers.get("warc-date"))


@dataclass(frozen=True)
class Wet:
    """The text that CommonCrawl extracts from pages: `conversion` records, from a file, a glob, or the .wet and .warc files below a folder (.gz
    and .zst too; cut at members). `file@byte` is an id, of the member, and `+byte` in it where the record does not begin it.

    Omitted: `record_type` (warcinfo), `language`, `too_long`, `empty`.
    """

    path: str
    languages: tuple[str, ...] = ()
    """Only pages whose main language, as the crawler identified it (ISO 639-3: `eng`), is one of these, or is not said. Empty: all."""
    longest: int = 64 << 20
    """Bytes of a record that is kept, at most."""
    name: str = "wet"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        return _units(self.path, size, self.name)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        return documented(records(path, start, stop, self.longest), path, relative, self._document)

    def _document(self, record: Record, id: str, source: str, where: str) -> Document | Omitted:
        languages = record.languages
        if reason := _left_out(record, "conversion", self.languages, languages):
            return Omitted(where, reason)
        text = utf8(record.block).removeprefix("\ufeff")
        if not text or text.isspace():
            return Omitted(where, "empty")
        return Document(id, text, source, record.metadata(languages), record.created)


@dataclass(frozen=True)
class Warc:
    """The text of web pages: HTML `response` records, from files as `Wet` has them, with its ids.

    Omitted: `record_type` (requests, metadata, revisits), `too_long`, `status`, `mime`, `content_encoding` (brotli: CommonCrawl stores pages
    decoded), `language`, `empty`. A response that is no HTTP, or that an extractor cannot take, is damaged.
    """

    path: str
    extractor: Literal["trafilatura", "resiliparse"] = "trafilatura"
    """trafilatura keeps what is most surely the main text (Barbaresi, 2021); resiliparse is many times as fast and keeps more (Bevendorff
    and others, 2018; the choice of DCLM)."""
    statuses: tuple[int, ...] = (200,)
    types: tuple[str, ...] = ("text/html", "application/xhtml+xml")
    """MIME types, as the crawler identified them (`WARC-Identified-Payload-Type`), else as the server said."""
    languages: tuple[str, ...] = ()
    """Only pages whose language is one of these, or is not said. As the crawler identified it (`eng`), else as the page or the server says,
    without the region (`en`). Empty: all."""
    longest: int = 16 << 20
    """Bytes of a record, and of a page unpacked, that is kept, at most."""
    name: str = "warc"

    def __post_init__(self):
        if self.extractor not in ("trafilatura", "resiliparse"):
            raise ValueError(f"{self.name}: extractor={self.extractor!r} is not known; use 'trafilatura' or 'resiliparse'")

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        return _units(self.path, size, self.name)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        extract = _extractor(self.extractor, self.name)
        return each(unit, self.path, partial(self._file, extract))

    def _file(self, extract: Extract, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        return documented(records(path, start, stop, self.longest), path, relative, partial(self._document, extract))

    def _document(self, extract: Extract, record: Record, id: str, source: str, where: str) -> Document | Omitted:
        if reason := _left_out(record, "response", (), ()):
            return Omitted(where, reason)
        page = parse(record.block)
        if page is None:
            return Omitted(where, "is no HTTP response", damaged=True)
        if page.status not in self.statuses:
            return Omitted(where, "status")
        if _mime(record, page) not in self.types:
            return Omitted(where, "mime")
        body = content(page, self.longest)
        if isinstance(body, str):
            return Omitted(where, body, damaged=body not in ("content_encoding", "too_long"))
        html, charset = decoded(body, page.headers.get("content-type", ""))
        languages = record.languages or _declared(html, page)
        if self.languages and languages and languages[0] not in self.languages:
            return Omitted(where, "language")
        try:
            text = extract(html)
        except Exception as error:  # a page is any bytes, and what a parser of those raises has no end
            return Omitted(where, f"{self.extractor} raised {type(error).__name__}", damaged=True)
        if not text or text.isspace():
            return Omitted(where, "empty")
        return Document(id, text, source, record.metadata(languages, charset=charset), record.created)


def _left_out(record: Record, wanted: str, languages: Sequence[str], found: Sequence[str]) -> str:
    if record.headers.get("warc-type") != wanted:
        return "record_type"
    if languages and found and found[0] not in languages:
        return "language"
    return "too_long" if record.block is None else ""


def _mime(record: Record, page: Page) -> str:
    said = record.headers.get("warc-identified-payload-type") or page.headers.get("content-type", "")
    return said.partition(";")[0].strip().lower() or ("text/html" if re.match(rb"\s*<(?:!doctype )?html", page.body, re.I) else "")


def _declared(html: str, page: Page) -> list[str]:
    match = re.search(r"""<html\b[^>]*?\blang\s*=\s*["']?([A-Za-z]{2,3})\b""", html[:4096], re.I)
    said = match.group(1) if match else page.headers.get("content-language", "").partition(",")[0]
    code = re.split("[-_]", said.strip())[0].lower()
    return [code] if re.fullmatch("[a-z]{2,3}", code) else []


def _extractor(extractor: str, name: str) -> Extract:
    where = f"{name}: extractor={extractor!r}"
    if extractor == "resiliparse":
        return partial(package("resiliparse.extract.html2text", where).extract_plain_text, main_content=True, alt_texts=False)
    # Not trafilatura's own deduplication: what that leaves out depends on which pages the process has seen before.
    return partial(package("trafilatura", where).extract, favor_precision=True, include_comments=False)


def _units(path: str, size: int, name: str) -> Sequence[Unit]:
    files = found(path, lambda file: suffix(file) in (".warc", ".wet"), ".warc, .warc.gz, .warc.wet.gz or .warc.zst", name=name)
    return grouped(files, path, size, lambda file, count: parts(file.stat().st_size, count) if kind(file) else [])


def records(path: Path, start: int, stop: int | None, longest: int) -> Iterator[tuple[str, Record] | Omitted]:
    """The records whose members begin in a range of a file, each with its place: `offset` of its member, `+offset` in that where it is not 0."""
    size = path.stat().st_size
    with path.open("rb") as file:
        chain = Chain(file, kind(path), b"WARC/1.")
        if size == 0:
            yield Omitted(str(path), "is empty", damaged=True)
        if start and chain.find(start, stop) is None:
            return
        # Where the range ends at something that is no member, that belongs to this unit: the next one looks for a member.
        while chain.position < size and (stop is None or chain.position < stop or not chain.is_start(chain.position)):
            begin = chain.position
            try:
                yield from _member(chain.member(), path, begin if chain.kind else None, longest)
            except (*damage(), OSError) as error:
                yield unreadable(f"{path}, byte {begin}", error)
                if not chain.kind or chain.find(begin + 1, stop) is None:
                    return


def _member(pieces: Iterator[bytes], path: Path, member: int | None, longest: int) -> Iterator[tuple[str, Record] | Omitted]:
    """The records of a member. The last one only when the member has come to its end, which is where its checksum is."""
    window = Window(pieces)
    while window.skip_blank():
        inside = window.position
        offset = inside if member is None else member
        place = f"{offset}+{inside}" if inside and member is not None else str(offset)
        problem, length, headers = "", 0, {}
        head = window.head()
        if not head.startswith(b"WARC/1."):
            problem = "does not begin with WARC/1."
        else:
            headers = fields(head)
            said = headers.get("content-length", "")
            if re.fullmatch(r"[0-9]{1,15}", said):
                length = int(said)
            else:
                problem = f"has Content-Length {said[:20]!r}, expected a number of bytes"
        if problem:
            yield Omitted(f"{path}, byte {place}", problem, damaged=True)
            window.to_next()
            continue
        block = window.take(length, length <= longest)
        window.skip_blank()
        yield place, Record(offset, headers, block)


class Window:
    """Bytes that come in pieces, read from front to back."""

    def __init__(self, pieces: Iterator[bytes]):
        self.pieces, self.data, self.at, self.before = pieces, b"", 0, 0

    @property
    def position(self) -> int:
        return self.before + self.at

    def more(self) -> bool:
        piece = next(self.pieces, b"")
        self.before += self.at
        self.data, self.at = self.data[self.at :] + piece, 0
        return bool(piece)

    def skip_blank(self) -> bool:
        """Goes behind line ends; whether there is anything then."""
        while True:
            self.at = BLANK.match(self.data, self.at).end()
            if self.at < len(self.data):
                return True
            if not self.more():
                return False

    def head(self) -> bytes:
        """What stands before the next empty line, which it goes behind; empty, and nothing, where that does not come."""
        while not (match := END.search(self.data, self.at)):
            if len(self.data) - self.at > HEAD or not self.more():
                return b""
        found = self.data[self.at : match.start()]
        self.at = match.end()
        return found

    def take(self, length: int, keep: bool) -> bytes | None:
        """The next bytes, or None and only past them. Raises EOFError where there are fewer."""
        taken, missing = [], length
        while True:
            part = self.data[self.at : self.at + missing]
            self.at += len(part)
            missing -= len(part)
            if keep:
                taken.append(part)
            if not missing:
                return b"".join(taken) if keep else None
            if not self.more():
                raise EOFError(f"it ends {missing} bytes before its record does")

    def to_next(self) -> None:
        """To the next thing that looks like a record's beginning, or to the end."""
        while not (match := NEXT.search(self.data, self.at)):
            self.at = max(self.at, len(self.data) - 16)
            if not self.more():
                self.at = len(self.data)
                return
        self.at = match.end()
