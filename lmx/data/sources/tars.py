"""Members of a tar archive one after the other, read forwards only; an end that is not the archive's own is damage.

`tarfile` takes most damaged headers for the end, believes any size and, before 3.12.12, goes round in circles with a negative one.
"""

import io
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO

from lmx.data.sources.compressed import damage
from lmx.data.sources.paths import BLOCK, unreadable
from lmx.data.sources.source import Omitted

SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst")  # beside what `suffix` takes away
HEADER = 512  # bytes: of a header, and what contents are filled up to
LONGEST = 1 << 20  # bytes of a name
FILES, LINKS, DATALESS = b"0\x007", b"12", b"123456"  # types: links, devices and folders are followed by no contents


class Contents(io.RawIOBase):
    """The next `size` bytes of a file. Reading raises EOFError where it ends before, and `broken` tells afterwards that it raised."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.broken = file, size, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.broken = True
        data = self.file.read(min(len(buffer), self.left, BLOCK))
        if self.left and not data:
            raise EOFError("the archive is cut off")
        self.broken = False
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def skip(self) -> None:
        while self.left:
            self.read(BLOCK)


def members(file: BinaryIO, where: str) -> Iterator[tuple[str, int, BufferedReader] | Omitted]:
    """The regular files of an unpacked archive: name, bytes and contents, to be read before the next is asked for; links are omitted.

    Damage ends it. What reading the contents raises (one of `damage()`, or OSError) is for the reader to say.
    """
    last, given = "its beginning", {}
    try:
        while (header := Contents(file, HEADER).readall()).strip(b"\0"):
            name, size, kind = _header(header)
            if kind in (b"x", b"L"):
                given |= _given(file, size, kind)
                continue
            last, size = given.get("path", name), int(given.get("size", size))
            given = {} if kind != b"g" else given
            if kind == b"S" or size < 0:
                raise ValueError(f"{last!r} is a sparse file or has {size} bytes: no archive of texts")
            size = 0 if kind in DATALESS else size
            contents = Contents(file, size)
            if kind in LINKS:
                yield Omitted(f"{where}/{last}", "link")
            elif kind in FILES and not last.endswith("/"):
                yield last, size, BufferedReader(contents, min(max(size, 1), BLOCK))
            if contents.broken:
                return
            contents.skip()
            Contents(file, -size % HEADER).skip()
        while file.read(BLOCK):  # a checksum may follow
            pass
    except (*damage(), OSError, ValueError) as error:
        yield unreadable(f"{where}, from {last}", error)


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type. Raises ValueError for what is no header."""
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("a header's checksum is wrong")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return name, _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    """Octal digits, or after a byte of its own a big integer."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], signed=field[0] == 0xFF)
    return int(field.strip(b" \0") or b"0", 8)


def _given(file: BinaryIO, size: int, kind: bytes) -> dict[str, str]:
    """What a header before the header says of it: `path` and `size` of pax (kind x), the name of GNU (L)."""
    if size > LONGEST:
        raise ValueError(f"a name of {size} bytes")
    data = Contents(file, size).readall()
    Contents(file, -size % HEADER).skip()
    if kind == b"L":
        return {"path": _text(data)}
    fields = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        record, data = data[len(length) + 1 : int(length)], data[max(1, int(length)) :]
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        fields[key.decode(errors="replace")] = value.decode(errors="replace")
    return fields


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")
