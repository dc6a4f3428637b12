"""Wikipedia and other MediaWiki dumps: `pages-articles.xml`, plain or bzip2 (also multistream), cut anywhere.

`<` is escaped in the text of a dump, so `<page>` is always a page's beginning: pages are found in the bytes, each is parsed on its own, and
what is damaged costs the pages it lies in. A unit has the pages that begin in its range, or in the bzip2 streams that begin in it; it
reads on to the end of the last one, so that dumps whose streams cut pages (pbzip2) are as good as Wikipedia's, and needs no index file.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from lmx.data.documents import Document
from lmx.data.sources import parts
from lmx.data.sources.chain import BZIP2, PIECE, Chain, DamagedError, kind
from lmx.data.sources.source import UNIT, Omitted, Unit
from lmx.data.sources.wikitext import plain

OPEN, CLOSE, LAST = b"<page>", b"</page>", b"</mediawiki>"
HEAD = 1 << 20  # bytes in which `<siteinfo>` ends


@dataclass(frozen=True)
class Wikipedia:
    """Articles as plain text, by mwparserfromhell. The title is in the metadata, the text does not begin with it.

    Omitted: `namespace`, `redirect`, `model` (pages that are no wikitext), `deleted`, `no_text`. Of a page with several revisions the last
    in the file counts.
    """

    path: str
    """A file, a folder or a glob."""
    namespaces: tuple[int, ...] = (0,)
    longest: int = 32 << 20
    """Bytes of a page in XML, at most: one in memory at a time."""
    name: str = "wikipedia"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        wanted = re.compile(r"\.xml(?:-p\d+p\d+)?(?:\.bz2|\.gz|\.zst)?$|\.xml-.*\.bz2$").search
        found = parts.files(self.path, lambda file: bool(wanted(file)), "file .xml or .xml.bz2", self.name)
        return list(
            parts.grouped(found, parts.root(self.path), size, lambda file: file.stat().st_size if kind(file) in (b"", BZIP2) else None)
        )

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        base = parts.root(self.path)
        for path in unit.paths:
            label = parts.relative(path, base)
            site = _site(Path(path))
            for page in pages(Path(path), label, unit.start, unit.stop, self.longest):
                yield page if isinstance(page, Omitted) else self._document(page, label, path, site)

    def _document(self, page: bytes, label: str, path: str, site: "Site") -> Document | Omitted:
        where = _where(label, page)
        try:
            tree = ElementTree.fromstring(page)
        except ElementTree.ParseError as error:
            return Omitted(where, f"is not XML ({error})", damaged=True)
        title, number, revisions = tree.findtext("title", ""), tree.findtext("id", ""), tree.findall("revision")
        namespace = tree.findtext("ns", "0")
        if not (title and number.isdecimal() and revisions and re.fullmatch(r"-?\d+", namespace)):
            return Omitted(where, "has no title, no id, no namespace or no revision", damaged=True)
        revision = revisions[-1]
        text = revision.find("text")
        if int(namespace) not in self.namespaces:
            return Omitted(where, "namespace")
        if tree.find("redirect") is not None or re.match(r"\s*#redirect\b", revision.findtext("text", ""), re.I):
            return Omitted(where, "redirect")
        if revision.findtext("model", "wikitext") != "wikitext":
            return Omitted(where, "model")
        if text is None or text.get("deleted") is not None:
            return Omitted(where, "deleted")
        try:
            written = plain(text.text or "", site.prefixes)
        except DamagedError as error:
            return Omitted(where, str(error), damaged=True)
        if not written:
            return Omitted(where, "no_text")
        known = {
            "title": title,
            "url": site.url + quote(title.replace(" ", "_"), safe="/:@!$&'()*,;=~") if site.url else "",
            "page_id": int(number),
            "revision_id": revision.findtext("id", ""),
            "language": site.language,
        }
        created = revision.findtext("timestamp", "")
        return Document(where, written, path, {key: value for key, value in known.items() if value != ""}, created)


@dataclass(frozen=True)
class Site:
    """What the head of a dump says of its wiki."""

    language: str = ""
    url: str = ""
    """What pages' addresses begin with."""
    prefixes: frozenset[str] = frozenset()
    """The wiki's own names, in lower case, of the namespaces of files, media and categories."""


def _site(path: Path) -> Site:
    head = b""
    try:
        with path.open("rb") as file:
            chain = Chain(file, kind(path))
            size = path.stat().st_size
            while chain.position < size and not (b"</siteinfo>" in head or len(head) > HEAD):
                for piece in chain.member():
                    head += piece
                    if b"</siteinfo>" in head or len(head) > HEAD:
                        break
    except (OSError, DamagedError):
        pass  # said where pages are read
    text = head[:HEAD].partition(b"</siteinfo>")[0].decode("utf-8", "replace")
    language = re.search(r'<mediawiki\b[^>]*\bxml:lang="([\w-]+)"', text)
    base = re.search(r"<base>([^<]*/)[^</]*</base>", text)
    names = re.findall(r'<namespace key="(?:-2|6|14)"[^>]*>([^<]+)</namespace>', text)
    return Site(language.group(1) if language else "", base.group(1) if base else "", frozenset(name.lower() for name in names))


def _where(label: str, page: bytes) -> str:
    number = re.search(rb"<id>(\d+)</id>", page)
    return f"{label}:{number.group(1).decode() if number else '?'}"


def pages(path: Path, label: str, start: int, stop: int | None, longest: int) -> Iterator[bytes | Omitted]:
    """The pages that begin in a range, as they stand in the file: `<page>…</page>`."""
    data, tail = b"", b""
    owned = 0  # bytes of `data` in which pages of this unit may begin
    ours = start == 0  # whether what was read last is this unit's
    try:
        for piece in _pieces(path, label, start, stop):
            if isinstance(piece, Omitted):  # a page that lies across it is lost with it
                data, owned, tail = b"", 0, None
                if piece.where:
                    yield piece
                continue
            more, ours = piece
            data += more
            if ours:
                owned, tail = len(data), ((tail or b"") + more)[-100:]
            at = 0
            while True:
                begin = data.find(OPEN, at)
                if begin < 0:
                    at = max(at, len(data) - len(OPEN) + 1)
                    break
                if begin >= owned:
                    return
                limit = begin + longest
                end = data.find(CLOSE, begin, limit)
                other = data.find(OPEN, begin + 1, limit if end < 0 else end)
                if other >= 0:
                    yield Omitted(_where(label, data[begin:other]), "has no </page>", damaged=True)
                    at = other
                elif end >= 0:
                    yield data[begin : end + len(CLOSE)]
                    at = end + len(CLOSE)
                elif len(data) >= limit:
                    yield Omitted(_where(label, data[begin:limit]), f"does not end within {longest} bytes", damaged=True)
                    at = begin + 1
                else:
                    at = begin
                    break
            data, owned = data[at:], owned - at
            if owned <= 0 and not ours:
                return
        if owned > 0 and data.startswith(OPEN):
            yield Omitted(_where(label, data), "has no </page>", damaged=True)
        if ours and tail is not None and not _whole(path, tail.rstrip(), start):
            yield Omitted(label, "ends without </mediawiki>: it is cut off", damaged=True)
    except OSError as error:
        yield Omitted(label, f"cannot be read ({error.strerror or error})", damaged=True)


def _whole(path: Path, tail: bytes, start: int) -> bool:
    """Whether a dump has its last tag, by the end of what its last unit read: that may begin inside the tag, or behind it."""
    if not kind(path):
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 100, 0))
            return file.read().rstrip().endswith(LAST)
    return tail.endswith(LAST) or (start > 0 and LAST.endswith(tail))


def _pieces(path: Path, label: str, start: int, stop: int | None) -> Iterator[tuple[bytes, bool] | Omitted]:
    """What is unpacked from a range, and then from what follows it; whether it is the range's. Damage of what follows has no place: it is
    said by the unit that it belongs to."""
    size = path.stat().st_size
    with path.open("rb") as file:
        chain = Chain(file, kind(path))
        if not chain.kind:
            file.seek(start)
            while piece := file.read(PIECE):
                mine = len(piece) if stop is None else max(stop - start, 0)
                yield piece[:mine], mine > 0
                if piece[mine:]:
                    yield piece[mine:], False
                start += len(piece)
            return
        if start and chain.find(start, stop) is None:
            return
        while chain.position < size:
            begin = chain.position
            ours = stop is None or begin < stop or (chain.kind == BZIP2 and not chain.is_start(begin))
            try:
                yield b"", ours
                for piece in chain.member():
                    yield piece, ours
            except DamagedError as error:
                yield Omitted(f"{label}:{begin}" if ours else "", str(error), damaged=True)
                if not ours or chain.kind != BZIP2 or chain.find(begin + 1, stop) is None:
                    return
