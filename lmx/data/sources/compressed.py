"""Files opened as what they are: compression is told by the first bytes, never by the name; all members and frames are read."""

import bz2
import gzip
import importlib
import lzma
import zlib
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

WINDOW = 31  # log2 of the bytes that PushShift's zstd files look back
ZSTD = b"\x28\xb5\x2f\xfd"
MODULES = ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma))


def opened(path: str | Path, name: str = "source") -> BinaryIO:
    """A file's bytes, unpacked if it is gzip, bzip2, xz or zstd. `name` is what errors call the source.

    Raises OSError where the file cannot be opened and ValueError, naming the extra, for zstd without a package that reads it. Reading a
    damaged or cut off file raises one of `damage()`.
    """
    path = Path(path)
    return _unpacked(path, _magic(path), str(path), name) or path.open("rb")


def unpacked(file: BufferedReader, where: str, name: str = "source") -> BinaryIO:
    """As `opened`, of a file in a file (an archive in an archive). `where` is what errors call it."""
    return _unpacked(file, file.peek(6)[:6], where, name) or file


def packed(path: str | Path) -> bool:
    """Whether `opened` would unpack it."""
    return _magic(Path(path)).startswith((ZSTD, *(start for start, _ in MODULES)))


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file can raise. (OSError too, from bz2 and gzip: catch it after these.)"""
    try:
        extra = (_zstd("", "").ZstdError,)
    except ValueError:
        extra = ()
    return (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, *extra)


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(6)


def _unpacked(file: Path | BufferedReader, magic: bytes, where: str, name: str) -> BinaryIO | None:
    if magic.startswith(ZSTD):
        zstd = _zstd(where, name)
        return zstd.open(file, "rb", options={zstd.DecompressionParameter.window_log_max: WINDOW})
    return next((module.open(file, "rb") for start, module in MODULES if magic.startswith(start)), None)


def _zstd(path: str, name: str) -> ModuleType:
    """Python 3.14's module or its backport. (The older `zstandard` package takes a file that was cut off for a whole one.)"""
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise ValueError(f"{name}: {path} needs the backports.zstd package, which is not installed; pip install 'lmx[zstd]'")
