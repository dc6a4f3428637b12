"""Members of a file, one after the other: how a dump of millions of records is entered in its middle, and left whole by one that is damaged.

gzip, zstd and bzip2 files may be chains of members (frames, streams), each of which unpacks on its own. A member begins with bytes that are
next to never found elsewhere, and is known for one when what it begins to unpack to is what such a file holds. A reader of the range
[start, stop) of a file has the members that begin in it.
"""

import bz2
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmx.data.sources.compressed import WINDOW, _zstd

BLOCK = 1 << 15  # bytes read at once: what lies behind a member's end in its last block is copied
PIECE = 1 << 20  # bytes unpacked at once, at most
TRIAL = 1 << 18  # bytes that a member's first block of data fits in: zstd's are the largest but for bzip2's, whose beginning is long enough

GZIP, ZSTD, BZIP2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh"
STARTS = {
    GZIP: re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    ZSTD: re.compile(rb"\x28\xb5\x2f\xfd"),
    BZIP2: re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}


class DamagedError(Exception):
    """What cannot be read. The message says what is wrong with it, in one line."""


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
        """Unpacked pieces of the member that begins at `position`, which then is behind it. Raises DamagedError."""
        if not self.kind:
            while piece := self._read():
                self._ahead = b""
                self.position += len(piece)
                yield piece
            return
        unpacker = unpacker_of(self.kind)
        try:
            while not unpacker.eof:
                data = self._read() if (hungry := getattr(unpacker, "needs_input", True)) else b""
                piece = unpacker.decompress(data, PIECE)
                self._ahead = unpacker.unused_data if unpacker.eof else getattr(unpacker, "unconsumed_tail", b"")
                self.position += len(data) - len(self._ahead)
                if piece:
                    yield piece
                elif hungry and not data and not unpacker.eof:
                    raise DamagedError("cut off")
        except errors(self.kind) as error:
            raise DamagedError(f"does not unpack ({' '.join(str(error).split())})") from error

    def seek(self, position: int) -> None:
        self.file.seek(position)
        self.position, self._ahead = position, b""

    def find(self, start: int, stop: int | None) -> int | None:
        """Goes to the first member that begins at or behind `start` and before `stop`; None, and nowhere, where none does."""
        pattern, longest = STARTS[self.kind], 10
        self.file.seek(start)
        base, window = start, b""
        while block := self.file.read(PIECE):
            window += block
            for match in pattern.finditer(window):
                at = base + match.start()
                if stop is not None and at >= stop:
                    return None
                if self.is_start(at):
                    self.seek(at)
                    return at
            base, window = base + max(len(window) - longest, 0), window[-longest:]  # a start that is cut is found with the next block
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
        unpacker, made = unpacker_of(self.kind), b""
        try:
            while data and not unpacker.eof and len(made) < len(self.begins) and self.file.tell() - start <= TRIAL:
                made += unpacker.decompress(data, len(self.begins))
                data = self.file.read(BLOCK)
        except errors(self.kind):
            pass
        return made.startswith(self.begins)

    def _read(self) -> bytes:
        ahead, self._ahead = self._ahead, b""
        return ahead or self.file.read(BLOCK)


def kind(path: Path) -> bytes:
    """What a file's members begin with, by its first bytes; empty where it is no chain."""
    with path.open("rb") as file:
        magic = file.read(4)
    return next((start for start in STARTS if magic.startswith(start)), b"")


def unpacker_of(kind: bytes):
    if kind == GZIP:
        return zlib.decompressobj(31)
    if kind == BZIP2:
        return bz2.BZ2Decompressor()
    module = _zstd(Path("a .zst file"), "source")
    return module.ZstdDecompressor(options={module.DecompressionParameter.window_log_max: WINDOW})


def errors(kind: bytes) -> tuple[type[Exception], ...]:
    """What unpacking raises."""
    return (zlib.error, OSError, EOFError, *([_zstd(Path("a .zst file"), "source").ZstdError] if kind == ZSTD else []))
