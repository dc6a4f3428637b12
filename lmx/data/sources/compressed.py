"""Files opened as what they are: compression is told by the first bytes, never by the name; all members and frames are read."""

import bz2
import gzip
import importlib
import lzma
import zlib
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

WINDOW = 31  # log2 of the bytes that PushShift's zstd files look back
GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
MODULES = {GZIP: gzip, BZIP2: bz2, XZ: lzma}


def opened(path: str | Path, name: str = "source") -> BinaryIO:
    """A file's bytes, unpacked if it is gzip, bzip2, xz or zstd. `name` is what errors call the source.

    Raises OSError where the file cannot be opened and ValueError, naming the extra, for zstd without a package that reads it. Reading a
    damaged or cut off file raises one of `damage()`.
    """
    path = Path(path)
    return _unpacked(path, kind(path), f"{name}: {path}") or path.open("rb")


def unpacked(file: BufferedReader, where: str, name: str = "source") -> BinaryIO:
    """As `opened`, of a file in a file (an archive in an archive). `where` is what errors call it."""
    return _unpacked(file, _kind(file.peek(6)), f"{name}: {where}") or file


def unpacker(kind: bytes) -> Any:
    """Unpacks one member or frame, piece by piece."""
    if kind == GZIP:
        return zlib.decompressobj(31)
    if kind == ZSTD:
        zstd = _zstd("a zstd file")
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW})
    return bz2.BZ2Decompressor() if kind == BZIP2 else lzma.LZMADecompressor()


def kind(path: str | Path) -> bytes:
    """What a file's members begin with: GZIP, BZIP2, XZ or ZSTD; empty where it is not compressed."""
    with Path(path).open("rb") as file:
        return _kind(file.read(6))


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file can raise. (OSError too, from bz2 and gzip: catch it after these.)"""
    try:
        extra = (_zstd("").ZstdError,)
    except ValueError:
        extra = ()
    return (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, *extra)


def package(module: str, where: str, extra: str = "data") -> ModuleType:
    """A module of a package that lmx does without otherwise. Raises ValueError that says what needs it and the extra it is in."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = module if module.endswith(".zstd") else module.partition(".")[0]
        raise ValueError(f"{where} needs the {wanted} package, which is not installed ({error}); pip install 'lmx[{extra}]'") from error


def _kind(data: bytes) -> bytes:
    return next((kind for kind in (*MODULES, ZSTD) if data.startswith(kind)), b"")


def _unpacked(file: Path | BufferedReader, kind: bytes, where: str) -> BinaryIO | None:
    if kind == ZSTD:
        zstd = _zstd(where)
        return zstd.open(file, "rb", options={zstd.DecompressionParameter.window_log_max: WINDOW})
    return MODULES[kind].open(file, "rb") if kind else None


def _zstd(where: str) -> ModuleType:
    """Python 3.14's module or its backport. (The older `zstandard` package takes a file that was cut off for a whole one.)"""
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return package("backports.zstd", where, "zstd")
