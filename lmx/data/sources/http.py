"""HTTP responses as archives keep them: head, body as it was sent, body as text."""

import codecs
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lmx.data.sources.compressed import GZIP, ZSTD, damage, unpacker
from lmx.data.sources.records import first_line

END = re.compile(rb"\r?\n\r?\n")
STATUS = re.compile(rb"HTTP/\d(?:\.\d)? +(\d{3})\b")
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
META = re.compile(rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?\s*([\w.:+-]+)""", re.I)
XML = re.compile(rb"""\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([\w.:+-]+)""", re.I)
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
PRESCAN = 1024  # bytes of a page in which HTML wants its charset said


@dataclass(frozen=True)
class Page:
    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes
    """As it was sent, or as the archive decoded it."""


def parse(block: bytes) -> Page | None:
    """A response, None where it is none."""
    status = STATUS.match(block)
    end = END.search(block)
    if not status or not end:
        return None
    return Page(int(status.group(1)), fields(block[: end.start()]), block[end.end() :])


def fields(head: bytes) -> dict[str, str]:
    """Header lines behind the first, by lower-case name; a line that begins with a blank goes on the one before. The first of a name counts."""
    if b"\n " in head or b"\n\t" in head:
        head = re.sub(rb"\r?\n[ \t]+", b" ", head)
    found: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\n")[1:]:
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip().lower(), value.strip())
    return found


def content(page: Page, longest: int) -> bytes | str:
    """The body without its transfer and content encodings, or what is wrong: `content_encoding`, `too_long`, or a sentence where it is damaged.

    Archives often keep the headers and decode the body: an encoding that the body does not begin like is taken as undone.
    """
    body = page.body
    if "chunked" in page.headers.get("transfer-encoding", "").lower() and CHUNK.match(body):
        body = _unchunked(body)
        if body is None:
            return "breaks off inside a chunk"
    for encoding in reversed(page.headers.get("content-encoding", "").lower().split(",")):
        encoding = encoding.strip()
        if encoding in ("gzip", "x-gzip"):
            made = _unpacked(body, unpacker(GZIP), longest) if body.startswith(GZIP) else body
        elif encoding == "deflate":  # with zlib's header, or, from some servers, without; text that is decoded has neither
            begins = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
            made = _unpacked(body, zlib.decompressobj(15 if begins else -15), longest)
            if isinstance(made, str) and not begins:
                made = body
        elif encoding == "zstd":
            made = _unpacked(body, unpacker(ZSTD), longest) if body.startswith(ZSTD) else body
        elif encoding in ("", "identity", "none", "utf-8"):
            made = body
        else:
            made = body if body.lstrip()[:1] == b"<" else "content_encoding"
        if isinstance(made, str):
            return made
        body = made
    return body


def _unchunked(body: bytes) -> bytes | None:
    made, at = [], 0
    while match := CHUNK.match(body, at):
        length = int(match.group(1), 16)
        if not length:
            return b"".join(made)
        at = match.end() + length
        if at > len(body):
            return None
        made.append(body[match.end() : at])
        at += 2 if body.startswith(b"\r\n", at) else 1
    return None


def _unpacked(body: bytes, member: Any, longest: int) -> bytes | str:
    try:
        made = member.decompress(body, longest)
    except (*damage(), OSError) as error:
        return f"cannot be read ({first_line(error)})"
    if member.eof:
        return made
    return "too_long" if len(made) >= longest else "breaks off inside its content encoding"


def decoded(body: bytes, content_type: str) -> tuple[str, str]:
    """A page's text and its charset: by byte order mark, HTTP header, `<meta>` or XML declaration, the first of these that it fits; else
    by detection (uchardet, as resiliparse has it), what does not fit replaced."""
    for mark, charset in MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(charset, "replace"), charset
    said = re.search(r"""charset\s*=\s*["']?\s*([\w.:+-]+)""", content_type, re.I)
    declared = [match.group(1).decode() for match in (META.search(body, 0, PRESCAN), XML.match(body)) if match]
    for label in ([said.group(1)] if said else []) + declared:
        if charset := _codec(label):
            text = _strict(body, charset)
            if text is not None:
                return text, charset
    text = _strict(body, "utf-8")
    if text is not None:
        return text, "utf-8"
    from resiliparse.parse.encoding import detect_encoding

    charset = _codec(detect_encoding(body)) or "utf-8"
    return body.decode(charset, "replace"), charset


def _strict(body: bytes, charset: str) -> str | None:
    """Decoded, None where it does not fit. A character that the end of a page cuts does not count: archives cut long pages anywhere."""
    try:
        return codecs.getincrementaldecoder(charset)().decode(body)
    except UnicodeError:
        return None


@cache
def _codec(label: str) -> str | None:
    """The codec of a label of the WHATWG's list (where `latin1` is windows-1252, as browsers have it)."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    charset = map_encoding_to_html5(label, False)
    try:
        return codecs.lookup(charset).name if charset else None
    except LookupError:
        return None
