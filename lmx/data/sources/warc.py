"""CommonCrawl and other web archives: `Warc` (pages, as they were sent) and `Wet` (their text).

A file is a chain of gzip members, a record each, or zstd frames (without a dictionary), or not compressed. Records are found by their
`Content-Length`, never by looking for the next `WARC/1.0`: pages quote it. What is damaged costs the one record, for the next member is
found by how it begins.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmx.data.documents import Document
from lmx.data.sources import parts
from lmx.data.sources.chain import Chain, DamagedError, kind
from lmx.data.sources.http import END, Page, content, decoded, fields, parse
from lmx.data.sources.source import UNIT, Omitted, Unit

HEAD = 1 << 16  # bytes of a record's header, at most
NEXT = re.compile(rb"\r?\n\r?\n(?=WARC/1\.\d\r?\n)")
BLANK = re.compile(rb"[\r\n]*")
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")


@dataclass(frozen=True)
class Record:
    place: str
    """`file:offset` of its member, `+offset` in it where that is not 0."""
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

    def metadata(self) -> dict[str, Any]:
        headers = self.headers
        known = {
            "url": headers.get("warc-target-uri", "").strip("<>"),
            "record_id": headers.get("warc-record-id", "").strip("<>"),
            "digest": headers.get("warc-payload-digest") or headers.get("warc-block-digest", ""),
            "truncated": headers.get("warc-truncated", ""),
        }
        return {key: value for key, value in known.items() if value} | {"offset": self.offset}

    @property
    def created(self) -> str:
        date = self.headers.get("warc-date", "")
        return date if DATE.fullmatch(date) else ""


@dataclass(frozen=True)
class Wet:
    """The text that CommonCrawl extracts from pages: `conversion` records of `.warc.wet.gz` files.

    Omitted: `record_type` (warcinfo), `language`, `too_long`, `no_text`. Text that is not UTF-8 is damaged.
    """

    path: str
    """A file, a folder or a glob."""
    languages: tuple[str, ...] = ()
    """Only pages whose main language, as the crawler identified it (ISO 639-3: `eng`), is one of these, or is not said. Empty: all."""
    longest: int = 64 << 20
    """Bytes of a record that is kept, at most."""
    name: str = "wet"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        return _units(self.path, size, self.name)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        for path, record in _read(self.path, unit, self.longest):
            if isinstance(record, Omitted):
                yield record
            elif reason := _left_out(record, "conversion", self.languages, languages := record.languages):
                yield Omitted(record.place, reason)
            else:
                try:
                    text = record.block.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    yield Omitted(record.place, f"is not UTF-8: byte {error.start}", damaged=True)
                    continue
                if text.strip():
                    metadata = record.metadata() | ({"languages": languages} if languages else {})
                    yield Document(record.place, text, path, metadata, record.created)
                else:
                    yield Omitted(record.place, "no_text")


@dataclass(frozen=True)
class Warc:
    """The text of web pages: HTML `response` records of `.warc.gz` files.

    Omitted: `record_type` (requests, metadata, revisits), `too_long`, `status`, `mime`, `content_encoding` (brotli: CommonCrawl stores pages
    decoded), `language`, `no_text`. A response that is no HTTP, or that an extractor cannot take, is damaged.
    """

    path: str
    """A file, a folder or a glob."""
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
        for path, record in _read(self.path, unit, self.longest):
            yield record if isinstance(record, Omitted) else self._document(record, path, extract)

    def _document(self, record: Record, path: str, extract) -> Document | Omitted:
        if reason := _left_out(record, "response", (), ()):
            return Omitted(record.place, reason)
        page = parse(record.block)
        if page is None:
            return Omitted(record.place, "is no HTTP response", damaged=True)
        if page.status not in self.statuses:
            return Omitted(record.place, "status")
        if _mime(record, page) not in self.types:
            return Omitted(record.place, "mime")
        body = content(page, self.longest)
        if isinstance(body, str):
            return Omitted(record.place, body, damaged=body not in ("content_encoding", "too_long"))
        html, charset = decoded(body, page.headers.get("content-type", ""))
        languages = record.languages or _declared(html, page)
        if self.languages and languages and languages[0] not in self.languages:
            return Omitted(record.place, "language")
        try:
            text = extract(html)
        except Exception as error:  # a page is any bytes, and what a parser of those raises has no end
            return Omitted(record.place, f"{self.extractor} raised {type(error).__name__}", damaged=True)
        if not text or text.isspace():
            return Omitted(record.place, "no_text")
        metadata = record.metadata() | {"charset": charset} | ({"languages": languages} if languages else {})
        return Document(record.place, text, path, metadata, record.created)


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


def _extractor(extractor: str, name: str):
    try:
        if extractor == "resiliparse":
            from resiliparse.extract.html2text import extract_plain_text

            return lambda html: extract_plain_text(html, main_content=True, alt_texts=False)
        from trafilatura import extract
    except ImportError as error:
        raise ValueError(f"{name}: extractor={extractor!r} needs its package ({error}); pip install 'lmx[data]'") from error

    # Not trafilatura's own deduplication: what that leaves out depends on which pages the process has seen before.
    return lambda html: extract(html, favor_precision=True, include_comments=False)


def _units(path: str, size: int, name: str) -> Sequence[Unit]:
    wanted = re.compile(r"\.(?:warc|wet)(?:\.wet)?(?:\.gz|\.zst)?$").search
    found = parts.files(path, lambda file: bool(wanted(file)), "file .warc, .warc.gz, .warc.wet.gz or .warc.zst", name)
    return list(parts.grouped(found, parts.root(path), size, lambda file: file.stat().st_size if kind(file) else None))


def _read(path: str, unit: Unit, longest: int) -> Iterator[tuple[str, Record | Omitted]]:
    base = parts.root(path)
    for file in unit.paths:
        for record in records(Path(file), parts.relative(file, base), unit.start, unit.stop, longest):
            yield file, record


def records(path: Path, label: str, start: int, stop: int | None, longest: int) -> Iterator[Record | Omitted]:
    """The records whose members begin in a range of a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            chain = Chain(file, kind(path), b"WARC/1.")
            if size == 0:
                yield Omitted(f"{label}:0", "is empty", damaged=True)
            if start and chain.find(start, stop) is None:
                return
            # Where the range ends at something that is no member, that belongs to this unit: the next one looks for a member.
            while chain.position < size and (stop is None or chain.position < stop or not chain.is_start(chain.position)):
                begin = chain.position
                try:
                    yield from _member(chain.member(), label, begin if chain.kind else None, longest)
                except DamagedError as error:
                    yield Omitted(f"{label}:{begin}", str(error), damaged=True)
                    if not chain.kind or chain.find(begin + 1, stop) is None:
                        return
    except OSError as error:
        yield Omitted(label, f"cannot be read ({error.strerror or error})", damaged=True)


def _member(pieces: Iterator[bytes], label: str, member: int | None, longest: int) -> Iterator[Record | Omitted]:
    """The records of a member. The last one only when the member has come to its end, which is where its checksum is."""
    window = Window(pieces)
    while window.skip_blank():
        inside = window.position
        offset = inside if member is None else member
        place = f"{label}:{offset}" + (f"+{inside}" if inside and member is not None else "")
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
            yield Omitted(place, problem, damaged=True)
            window.to_next()
            continue
        block = window.take(length, length <= longest)
        window.skip_blank()
        yield Record(place, offset, headers, block)


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
        """The next bytes, or None and only past them. Raises DamagedError where there are fewer."""
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
                raise DamagedError(f"ends {missing} bytes before its record does")

    def to_next(self) -> None:
        """To the next thing that looks like a record's beginning, or to the end."""
        while not (match := NEXT.search(self.data, self.at)):
            self.at = max(self.at, len(self.data) - 16)
            if not self.more():
                self.at = len(self.data)
                return
        self.at = match.end()
