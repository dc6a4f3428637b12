"""What sources share: their files, units of them, their lines, and what is made of a file's text or of its records."""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lmx.data.documents import Document
from lmx.data.sources.compressed import damage, kind, opened
from lmx.data.sources.records import first_line, sound, utf8
from lmx.data.sources.source import Omitted, Unit

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
BLOCK = 1 << 20  # bytes


def suffix(path: Path) -> str:
    """What says its kind, in lower case, whatever it is compressed with: `.jsonl` of `a.JSONL.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def root(source: str) -> Path:
    """The folder that ids are relative to: the source itself, or what stands before a glob's first magic."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    fixed = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()


def found(
    source: str, wanted: Callable[[Path], bool], expected: str, *, name: str = "source", give: str = "a file, a folder, a glob"
) -> list[Path]:
    """The files of a source, sorted: a file, those that a glob matches (whatever they are called), or those below a folder that are `wanted`
    and not hidden.

    Raises FileNotFoundError where there is none (a folder with none says what is `expected`), ValueError where nothing is named.
    """
    if not source:
        raise ValueError(f"{name}='' names nothing; give {give}")
    path = Path(source)
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = [p for p in below if wanted(p)]
        if not files:
            holds = ", ".join(sorted({p.suffix or p.name for p in below})[:5]) or "nothing"
            raise FileNotFoundError(f"{name}={source!r} is a folder without a file to read (it holds {holds}); expected {expected}")
        return files
    if path.exists():
        return [path]
    files = sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
    if not files and glob.has_magic(source):
        raise FileNotFoundError(f"{name}={source!r} matches no file; check the pattern (** goes into folders) and the working directory")
    if not files:
        raise FileNotFoundError(f"{name}={source!r} does not exist; give {give} (working directory: {Path.cwd()})")
    return files


def grouped(
    files: Sequence[Path], source: str, size: int, cut: Callable[[Path, int], Sequence[tuple[int, int | None]]] | None = None
) -> list[Unit]:
    """Units of about `size` bytes, files in their order. `cut(file, parts)` gives about so many parts of a file, or none: it stays whole."""
    if size < 1:
        raise ValueError(f"size={size} bytes of a unit, expected at least 1")
    base, units = root(source), []
    group: list[Path] = []
    held = 0

    def close() -> None:
        if group:
            more = f"+{len(group) - 1}" if len(group) > 1 else ""
            units.append(Unit(relative(group[0], base) + more, tuple(map(str, group))))
            group.clear()

    for path in files:
        length = path.stat().st_size if path.exists() else 0  # a link may lead nowhere
        parts = cut(path, -(-length // size)) if cut and length > size else ()
        if held + length > size:
            close()
            held = 0
        if len(parts) > 1:
            units += [Unit(f"{relative(path, base)}@{start}", (str(path),), start, stop) for start, stop in parts]
        else:
            group.append(path)
            held += length
    close()
    return units


def parts(total: int, count: int) -> list[tuple[int, int | None]]:
    """Bounds of `count` equal parts of `total`; the last has no end."""
    bounds = sorted({total * i // count for i in range(count)})
    return list(zip(bounds, [*bounds[1:], None], strict=True))


def byte_parts(path: Path, count: int) -> list[tuple[int, int | None]]:
    """Of a file that `lines` can read from any byte on; a compressed one has none."""
    return [] if kind(path) else parts(path.stat().st_size, count)


def each[T](unit: Unit, source: str, read: Callable[[Path, str, int, int | None], Iterator[T | Omitted]]) -> Iterator[T | Omitted]:
    """What `read(path, path below the source, start, stop)` gives for each file of a unit. A file that cannot be read is yielded as that."""
    base = root(source)
    for path in map(Path, unit.paths):
        try:
            yield from read(path, relative(path, base), unit.start, unit.stop)
        except (*damage(), OSError) as error:
            yield unreadable(str(path), error)


def documented[T](
    records: Iterable[tuple[int | str, Any] | Omitted],
    path: Path,
    relative: str,
    make: Callable[[Any, str, str, str], T | Omitted],
    counted: str = "byte",
) -> Iterator[T | Omitted]:
    """What `make(record, id, source, where)` makes of numbered records; its ValueError is that record's damage. What they are counted in
    is `counted`: ids are `file@byte`, or `file:number` of a record or page."""
    sign, source = "@" if counted == "byte" else ":", str(path)
    for item in records:
        if isinstance(item, Omitted):
            yield item
            continue
        number, record = item
        where = f"{source}, {counted} {number}"
        try:
            made = make(record, f"{relative}{sign}{number}", source, where)
        except ValueError as error:
            made = Omitted(where, str(error), damaged=True)
        yield made


def whole(
    file: BinaryIO, id: str, source: str, metadata: Mapping[str, Any] | None = None, created: str = "", *, where: str = ""
) -> Document | Omitted:
    """The document that all of a file is."""
    try:
        return Document(id, utf8(file.read()), source, metadata or {}, created)
    except ValueError as error:
        return Omitted(where or source, str(error), damaged=True)
    except (*damage(), OSError) as error:
        return unreadable(where or source, error)


def unreadable(where: str, error: Exception) -> Omitted:
    return Omitted(where, f"cannot be read ({first_line(error)})", damaged=True)


def lines(file: BinaryIO, where: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes] | Omitted]:
    """The lines that begin at a byte in `[start, stop)`, each with that byte and without its `\\n`; empty ones too.

    Damage ends it: the lines before it are whole.
    """
    skip = start > 0
    if skip:  # the line with the byte before is another part's, and may end there
        start -= 1
        file.seek(start)
    offset, begun = start, []
    while True:
        try:
            block = file.read1(BLOCK)
        except (*damage(), OSError) as error:
            yield unreadable(f"{where}, from byte {offset}", error)
            return
        ended = block.split(b"\n")
        begun.append(ended[0])
        if len(ended) == 1 and block:
            continue
        ended[0] = b"".join(begun)
        if block:
            begun = [ended.pop()]
        for line in ended:
            if stop is not None and offset >= stop:
                return
            if not skip and (block or line):
                yield offset, line
            skip = False
            offset += len(line) + 1
        if not block:
            return


def json_records(path: Path, name: str, start: int, stop: int | None) -> Iterator[tuple[int, object] | Omitted]:
    """The JSON values of the lines of `[start, stop)` with their bytes; what is none is yielded as that. Empty lines are none."""
    with opened(path, name) as file:
        for line in lines(file, str(path), start, stop):
            if isinstance(line, Omitted):
                yield line
                continue
            offset, data = line
            if offset == 0:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data or data.isspace():
                continue
            try:
                record = sound(data, offset)
            except ValueError as error:
                yield Omitted(f"{path}, byte {offset}", str(error), damaged=True)
            else:
                yield offset, record
