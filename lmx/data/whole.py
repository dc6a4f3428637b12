"""Files that are whole or not there, whoever is killed, and folders that one process at a time works in."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

PART = ".part"  # how the names of files end that are not whole yet


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A path to write a file to; it appears at `path` when the block ends, and its bytes are on the disk before its name is.

    The name is drawn: process numbers of several machines, on one file system, can be the same.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}{PART}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is complete."""
    with placed(path) as part, part.open("wb") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    with whole(path) as file:  # names of files may hold bytes that are no UTF-8; `json.loads` reads them again
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode(errors="surrogatepass") + b"\n")


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While nobody else does: waits for who is in such a block for the same folder, and removes what a killed one has left half written.

    Raises ValueError on a file system without locks (Lustre has them with the option `flock`).
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # the system gives it back when its process ends, however that ends
        except OSError as error:
            raise ValueError(f"{folder}: its file system has no locks ({error.strerror}); mount it with them, or use another") from error
        for part in folder.rglob(f".*{PART}"):
            part.unlink(missing_ok=True)
        yield
