"""The files of a dump, and the units they are cut into."""

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lmx.data.sources.source import Unit


def root(path: str) -> Path:
    """The folder that names within a source are relative to: the source itself, or what stands before a glob's first magic."""
    given = Path(path)
    if given.is_dir():
        return given
    if given.exists():
        return given.parent
    fixed = []
    for part in given.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def relative(path: str | Path, base: Path) -> str:
    return Path(path).relative_to(base).as_posix()


def files(path: str, wanted: Callable[[str], bool], expected: str, name: str) -> list[Path]:
    """The files that a file's path, a folder (every one below it that is wanted, by its name in lower case) or a glob stands for, sorted.

    Raises FileNotFoundError where there are none.
    """
    given = Path(path)
    if given.is_file():
        return [given]
    found = given.rglob("*") if given.is_dir() else map(Path, glob.glob(path, recursive=True))
    kept = sorted(file for file in found if wanted(file.name.lower()) and file.is_file())
    if not kept:
        raise FileNotFoundError(f"{name}: {path!r} holds no {expected}; give such a file, a folder with some below it or a glob")
    return kept


def grouped(paths: Sequence[Path], base: Path, size: int, parts: Callable[[Path], int | None] = lambda path: None) -> Iterator[Unit]:
    """Units in the order of the files: small files together up to `size` bytes, a large one in ranges of its bytes where it can be cut.

    `parts(path)` is how many bytes of a file there are to cut, None where it is one whole.
    """
    group: list[str] = []
    held = 0
    for path in paths:
        length = path.stat().st_size if path.exists() else 0  # a link may lead nowhere
        if group and held + length > size:
            yield Unit(relative(group[0], base), tuple(group))
            group, held = [], 0
        if length > size and (end := parts(path)) is not None:
            for start in range(0, end, size):
                yield Unit(f"{relative(path, base)}@{start}", (str(path),), start, start + size if start + size < end else None)
        else:
            group.append(str(path))
            held += length
    if group:
        yield Unit(relative(group[0], base), tuple(group))
