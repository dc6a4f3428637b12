"""Members of a file, one after the other: how a dump of millions of records is entered in its middle, and left whole by one that is damaged.

Compressed files may be chains of members (zstd's frames, bzip2's streams), each of which unpacks on its own. A member begins with bytes that
are next to never found elsewhere, and is known for one when what it begins to unpack to is what such a file holds. A reader of the range
[start, stop) of a file has the members that begin in it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from lmx.data.sources.compressed import BZIP2, GZIP, XZ, ZSTD, damage, unpacker

BLOCK = 1 << 15  # bytes read at once: what lies behind a member's end in its last block is copied
PIECE = 1 << 20  # bytes unpacked at once, at most
TRIAL = 1 << 18  # bytes that a member's first block of data fits in: zstd's are the largest but for bzip2's, whose beginning is long enough
LONGEST = 10  # bytes of a start

STARTS = {
    GZIP: re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    BZIP2: re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    XZ: re.compile(XZ),
    ZSTD: re.compile(re.escape(ZSTD)),
}


@dataclass
class Chain:
    """A file's members, read one by one. Of a file that is not compressed all is one member."""

    file: BinaryIO
    kind: bytes
    """What members begin with: one of STARTS, or empty where nothing is compressed."""
    begins: bytes = b""
    """What each member unpacks to begins with. Empty: anything."""
    position: int = 0
    """Of the next byte in the file that no member has had."""
    _ahead: bytes = b""

    def member(self) -> Iterator[bytes]:
        """Unpacked pieces of the member that begins at `position`, which then is behind it. Raises OSError and what `damage` names."""
        if not self.kind:
            while piece := self._read():
                self._ahead = b""
                self.position += len(piece)
                yield piece
            return
        member = unpacker(self.kind)
        while not member.eof:
            data = self._read() if (hungry := getattr(member, "needs_input", True)) else b""
            piece = member.decompress(data, PIECE)
            self._ahead = member.unused_data if member.eof else getattr(member, "unconsumed_tail", b"")
            self.position += len(data) - len(self._ahead)
            if piece:
                yield piece
            elif hungry and not data and not member.eof:
                raise EOFError("it is cut off")

    def seek(self, position: int) -> None:
        self.file.seek(position)
        self.position, self._ahead = position, b""

    def find(self, start: int, stop: int | None) -> int | None:
        """Goes to the first member that begins at or behind `start` and before `stop`; None, and nowhere, where none does."""
        self.file.seek(start)
        base, window = start, b""
        while block := self.file.read(PIECE):
            window += block
            for match in STARTS[self.kind].finditer(window):
                at = base + match.start()
                if stop is not None and at >= stop:
                    return None
                if self.is_start(at):
                    self.seek(at)
                    return at
            base, window = base + max(len(window) - LONGEST, 0), window[-LONGEST:]  # a start that is cut is found with the next block
            if stop is not None and base >= stop:
                return None
        return None

    def is_start(self, position: int) -> bool:
        """Whether a member begins there. (A member that begins well may still be damaged further on.)"""
        here = self.file.tell()
        try:
            self.file.seek(position)
            return self._begins()
        finally:
            self.file.seek(here)

    def _begins(self) -> bool:
        start, data = self.file.tell(), self.file.read(BLOCK)
        if not STARTS[self.kind].match(data):
            return False
        if not self.begins:
            return True
        member, made = unpacker(self.kind), b""
        try:
            while data and not member.eof and len(made) < len(self.begins) and self.file.tell() - start <= TRIAL:
                made += member.decompress(data, len(self.begins))
                data = self.file.read(BLOCK)
        except (*damage(), OSError):
            pass
        return made.startswith(self.begins)

    def _read(self) -> bytes:
        ahead, self._ahead = self._ahead, b""
        return ahead or self.file.read(BLOCK)
