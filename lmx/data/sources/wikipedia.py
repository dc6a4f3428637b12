"""Wikipedia and other MediaWiki dumps: `pages-articles.xml`, plain or bzip2 (also multistream), cut anywhere.

`<` is escaped in the text of a dump, so `<page>` is always a page's beginning: pages are found in the bytes, each is parsed on its own, and
what is damaged costs the pages it lies in. A unit has the pages that begin in its range, or in the bzip2 streams that begin in it; it
reads on to the end of the last one, so that dumps whose streams cut pages (pbzip2) are as good as Wikipedia's, and needs no index file.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from lmx.data.documents import Document
from lmx.data.sources.chain import PIECE, Chain
from lmx.data.sources.compressed import BZIP2, damage, kind, package
from lmx.data.sources.paths import documented, each, found, grouped, parts, unreadable
from lmx.data.sources.records import iso
from lmx.data.sources.source import UNIT, Omitted, Unit
from lmx.data.sources.wikitext import plain

NAME = re.compile(r"\.xml(?:-p\d+p\d+)?(?:\.bz2|\.gz|\.zst|\.xz)?$|\.xml-.*\.bz2$")
OPEN, CLOSE, LAST = b"<page>", b"</page>", b"</mediawiki>"
HEAD = 1 << 20  # bytes in which `<siteinfo>` ends


@dataclass(frozen=True)
class Wikipedia:
    """A page a document, from a file, a glob, or the .xml files below a folder (.bz2 and the like too); `file:page id` is its id.

    Its text is what mwparserfromhell makes of it, without the title, which is in the metadata. Of a page with several revisions the last in
    the file counts. Omitted: `namespace`, `redirect`, `model` (pages that are no wikitext), `deleted`, `empty`.
    """

    path: str
    namespaces: tuple[int, ...] = (0,)
    """The only ones to keep, by number; 0: articles."""
    longest: int = 32 << 20
    """Bytes of a page in XML, at most: one in memory at a time."""
    name: str = "wikipedia"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: bool(NAME.search(path.name.lower())), ".xml or .xml.bz2", name=self.name)
        return grouped(files, self.path, size, _parts)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        package("mwparserfromhell", self.name)
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        made = partial(self._document, site=_site(path))
        return documented(pages(path, start, stop, self.longest), path, relative, made, "page")

    def _document(self, page: bytes, id: str, source: str, where: str, site: "Site") -> Document | Omitted:
        try:
            tree = ElementTree.fromstring(page)
        except ElementTree.ParseError as error:
            raise ValueError(f"is not XML ({error})") from error
        title, number, revisions = tree.findtext("title", ""), tree.findtext("id", ""), tree.findall("revision")
        namespace = tree.findtext("ns", "0")
        if not (title and number.isdecimal() and revisions and re.fullmatch(r"-?\d+", namespace)):
            raise ValueError("has no title, no id, no namespace or no revision")
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
        if not (written := plain(text.text or "", site.prefixes)):
            return Omitted(where, "empty")
        known = {
            "title": title,
            "url": site.url + quote(title.replace(" ", "_"), safe="/:@!$&'()*,;=~") if site.url else "",
            "page_id": int(number),
            "revision_id": revision.findtext("id", ""),
            "language": site.language,
        }
        metadata = {key: value for key, value in known.items() if value != ""}
        return Document(id, written, source, metadata, iso(revision.findtext("timestamp")))


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
    except (*damage(), OSError):
        pass  # said where pages are read
    text = head[:HEAD].partition(b"</siteinfo>")[0].decode("utf-8", "replace")
    language = re.search(r'<mediawiki\b[^>]*\bxml:lang="([\w-]+)"', text)
    base = re.search(r"<base>([^<]*/)[^</]*</base>", text)
    names = re.findall(r'<namespace key="(?:-2|6|14)"[^>]*>([^<]+)</namespace>', text)
    return Site(language.group(1) if language else "", base.group(1) if base else "", frozenset(name.lower() for name in names))


def _parts(path: Path, count: int) -> list[tuple[int, int | None]]:
    return parts(path.stat().st_size, count) if kind(path) in (b"", BZIP2) else []


def _number(page: bytes) -> str:
    number = re.search(rb"<id>(\d+)</id>", page)
    return number.group(1).decode() if number else "?"


def pages(path: Path, start: int, stop: int | None, longest: int) -> Iterator[tuple[str, bytes] | Omitted]:
    """The pages that begin in a range, with their numbers, as they stand in the file: `<page>…</page>`."""

    def bad(page: bytes, problem: str) -> Omitted:
        return Omitted(f"{path}, page {_number(page)}", problem, damaged=True)

    data, tail = b"", b""
    owned = 0  # bytes of `data` in which pages of this unit may begin
    ours = start == 0  # whether what was read last is this unit's
    for piece in _pieces(path, start, stop):
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
                yield bad(data[begin:other], "has no </page>")
                at = other
            elif end >= 0:
                at = end + len(CLOSE)
                yield _number(data[begin:at]), data[begin:at]
            elif len(data) >= limit:
                yield bad(data[begin:limit], f"does not end within {longest} bytes")
                at = begin + 1
            else:
                at = begin
                break
        data, owned = data[at:], owned - at
        if owned <= 0 and not ours:
            return
    if owned > 0 and data.startswith(OPEN):
        yield bad(data, "has no </page>")
    if ours and tail is not None and not _whole(path, tail.rstrip(), start):
        yield Omitted(str(path), "ends without </mediawiki>: it is cut off", damaged=True)


def _whole(path: Path, tail: bytes, start: int) -> bool:
    """Whether a dump has its last tag, by the end of what its last unit read: that may begin inside the tag, or behind it."""
    if not kind(path):
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 100, 0))
            return file.read().rstrip().endswith(LAST)
    return tail.endswith(LAST) or (start > 0 and LAST.endswith(tail))


def _pieces(path: Path, start: int, stop: int | None) -> Iterator[tuple[bytes, bool] | Omitted]:
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
            except (*damage(), OSError) as error:
                yield unreadable(f"{path}, from byte {begin}" if ours else "", error)
                if not ours or chain.kind != BZIP2 or chain.find(begin + 1, stop) is None:
                    return
