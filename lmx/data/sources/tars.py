"""Members of a tar archive one after the other, read forwards only; an end that is not the archive's own is damage."""

import tarfile
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO

from lmx.data.sources.compressed import damage
from lmx.data.sources.paths import unreadable
from lmx.data.sources.source import Omitted


class Member(tarfile.TarInfo):
    """A header that must be sound: `tarfile` takes most damaged ones for the end, and would go round in circles with a negative size."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
        return member


def members(file: BinaryIO, where: str) -> Iterator[tuple[str, BufferedReader] | Omitted]:
    """The regular files of an unpacked archive: name and contents, to be read before the next is asked for. Damage ends it.

    Reading the contents may raise one of `broken()`.
    """
    last = "its beginning"
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=Member)
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would remember every one
            last = member.name
            if member.isreg():
                yield last, tar.extractfile(member)
    except broken() as error:
        yield unreadable(f"{where}, from {last}", error)


def broken() -> tuple[type[Exception], ...]:
    """What reading a damaged archive can raise."""
    return (*damage(), OSError, ValueError, OverflowError)
