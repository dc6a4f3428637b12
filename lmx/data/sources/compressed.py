"""Files opened as what they are: compression is told by the first bytes, never by the name; all members and frames are read."""

import bz2
import gzip
import importlib
import lzma
import zlib
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

WINDOW = 31  # log2 of the bytes that PushShift's zstd files look back


def opened(path: str | Path, name: str = "source") -> BinaryIO:
    """A file's bytes, unpacked if it is gzip, bzip2, xz or zstd. `name` is what errors call the source.

    Raises OSError where the file cannot be opened and ValueError, naming the extra, for zstd without a package that reads it. Reading a
    damaged or cut off file raises one of `damage()`.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        zstd = _zstd(path, name)
        return zstd.open(path, "rb", options={zstd.DecompressionParameter.window_log_max: WINDOW})
    for start, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma)):
        if magic.startswith(start):
            return module.open(path, "rb")
    return path.open("rb")


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file can raise. (OSError too, from bz2 and gzip: catch it after these.)"""
    try:
        extra = (_zstd(Path(), "").ZstdError,)
    except ValueError:
        extra = ()
    return (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, *extra)


def _zstd(path: Path, name: str) -> ModuleType:
    """Python 3.14's module or its backport. (The older `zstandard` package takes a file that was cut off for a whole one.)"""
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise ValueError(f"{name}: {path} needs the backports.zstd package, which is not installed; pip install 'lmx[zstd]'")
