"""Code: trees of files (`CodeTree`: a checkout, a folder, tar archives) and tables of them (`CodeTable`: GitHub's JSON lines, Parquet)."""

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources import parts
from lmx.data.sources.chain import DamagedError
from lmx.data.sources.code_rules import CodeRules
from lmx.data.sources.compressed import damage, opened
from lmx.data.sources.licenses import FILE, licenses, spelt
from lmx.data.sources.source import UNIT, Omitted, Unit

ARCHIVE = re.compile(r"\.tar(?:\.\w+)?$|\.t[gbx]z2?$|\.tzst$", re.I)
LICENSE_BYTES = 1 << 17  # of a licence file that are read


@dataclass(frozen=True)
class CodeTree:
    """The files below a folder (what lies in `.git` is not looked at), or in tar archives, one document each, folder by folder (in an
    archive: in its order). A file's licences are its own SPDX header's, else those of the licence files in the nearest folder
    above it that has some.

    Omitted: by the rules; `link` (symbolic links). An archive is read twice: its licences may lie behind its code.
    """

    path: str
    """A folder, a tar archive (also compressed), or a glob of those."""
    rules: CodeRules = CodeRules()
    name: str = "code"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        base = parts.root(self.path)
        if Path(self.path).is_dir():
            found = list(_walk(base))
            if not found:
                raise FileNotFoundError(f"{self.name}: {self.path!r} holds no file; give a folder with code below it or a tar archive")
        else:
            found = parts.files(self.path, lambda file: bool(ARCHIVE.search(file)), "tar archive", self.name)
        return list(parts.grouped(found, base, size))

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        base = parts.root(self.path)
        known: dict[str, list[str]] = {}
        for path in unit.paths:
            label = parts.relative(path, base)
            if not Path(self.path).is_dir():
                yield from self._archive(path, label)
                continue
            file = Path(path)
            try:
                if file.is_symlink():
                    yield Omitted(label, "link")
                elif reason := self.rules.of_path(label, file.stat().st_size):
                    yield Omitted(label, reason)
                else:
                    found = _nearest(label, lambda folder: _licenses_in(base / folder), known)
                    yield self._document(label, label, path, file.read_bytes(), found)
            except OSError as error:
                yield Omitted(label, f"cannot be read ({error.strerror or error})", damaged=True)

    def _document(self, id: str, path: str, source: str, data: bytes, found: list[str]) -> Document | Omitted:
        text, language, found, reason = self.rules.judge(path, data, found)
        return Omitted(id, reason) if reason else Document(id, text, source, {"path": path, "language": language, "licenses": found})

    def _archive(self, path: str, label: str) -> Iterator[Document | Omitted]:
        found: dict[str, list[str]] = {}
        try:
            for member, read in _members(path, self.name):
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and FILE.fullmatch(name):
                    found.setdefault(folder, []).extend(licenses(read(LICENSE_BYTES).decode("utf-8", "replace")))
        except DamagedError:
            pass  # said where the files are read
        known: dict[str, list[str]] = {}
        try:
            for member, read in _members(path, self.name):
                id = f"{label}:{member.name}"
                if member.issym() or member.islnk():
                    yield Omitted(id, "link")
                elif member.isfile():
                    if reason := self.rules.of_path(member.name, member.size):
                        yield Omitted(id, reason)
                    else:
                        nearest = _nearest(member.name, lambda folder: sorted(set(found.get(folder, []))), known)
                        yield self._document(id, member.name, path, read(member.size), nearest)
        except DamagedError as error:
            yield Omitted(label, str(error), damaged=True)


@dataclass(frozen=True)
class CodeTable:
    """Files in records: JSON lines as BigQuery exports its `github_repos` tables (joined: a record has its path), or Parquet as The Stack has
    it. Of columns that mean the same the first that a record has counts.

    Omitted: by the rules; `no_path` (the language cannot be told).
    """

    path: str
    """A file, a folder or a glob."""
    rules: CodeRules = CodeRules()
    name: str = "code"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        """Parquet is cut at row groups."""
        wanted = re.compile(r"\.(?:parquet|jsonl|json)(?:\.gz|\.zst|\.bz2|\.xz)?$").search
        base, units = parts.root(self.path), []
        for path in parts.files(self.path, lambda file: bool(wanted(file)), "file .jsonl.gz or .parquet", self.name):
            units += _row_groups(path, base, size, self.name) if _is_parquet(path) else parts.grouped([path], base, size)
        return units

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        base = parts.root(self.path)
        for path in unit.paths:
            label = parts.relative(path, base)
            rows = _parquet(Path(path), label, unit, self.name) if _is_parquet(Path(path)) else _json_lines(path, label, self.name)
            for where, row in rows:
                yield row if isinstance(row, Omitted) else self._document(where, path, row)

    def _document(self, where: str, source: str, row: dict[str, Any]) -> Document | Omitted:
        content, path = _first(row, "content"), _first(row, "path", "sample_path", "max_stars_repo_path")
        if row.get("binary") in (True, "true"):
            return Omitted(where, "binary")
        if not isinstance(content, str):
            return Omitted(where, "has no text in its field 'content'", damaged=True)
        if not isinstance(path, str):
            return Omitted(where, "no_path")
        said = _first(row, "max_stars_repo_licenses", "licenses", "license", "detected_licenses") or []
        said = [said] if isinstance(said, str) else [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
        language = _first(row, "lang", "language")
        text, language, found, reason = self.rules.judge(path, content, spelt(said), language if isinstance(language, str) else "")
        if reason:
            return Omitted(where, reason)
        metadata = {"path": path, "language": language, "licenses": found}
        for key, names in {
            "repo": ("repo_name", "sample_repo_name", "max_stars_repo_name"),
            "hash": ("hexsha", "id"),
            "ref": ("ref",),
        }.items():
            if isinstance(value := _first(row, *names), str):
                metadata[key] = value
        return Document(where, text, source, metadata)


def _walk(base: Path) -> Iterator[Path]:
    """Every file below: a folder's files by name, then its folders."""
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if name != ".git")
        yield from (Path(folder) / name for name in sorted(names) if name != ".git")


def _nearest(path: str, find: Callable[[str], list[str]], known: dict[str, list[str]]) -> list[str]:
    """What `find` gives for the nearest folder above a path for which it gives anything."""
    folders = [parent.as_posix() for parent in PurePosixPath(path).parents]
    for folder in ("" if folder == "." else folder for folder in folders):
        if folder not in known:
            known[folder] = find(folder)
        if known[folder]:
            return known[folder]
    return []


def _licenses_in(folder: Path) -> list[str]:
    found: set[str] = set()
    for path in folder.iterdir():
        if FILE.fullmatch(path.name) and path.is_file():
            with path.open("rb") as file:
                found.update(licenses(file.read(LICENSE_BYTES).decode("utf-8", "replace")))
    return sorted(found)


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header, and an end that is cut off, for an archive's end. Only its empty blocks are that."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise DamagedError(f"is damaged or cut off at byte {archive.offset} ({error})") from error


def _members(path: str, name: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[int], bytes]]]:
    """An archive's members, each with what reads it. Both raise DamagedError."""
    with _unpacking(), opened(path, name) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
        while member := archive.next():
            archive.members = []  # else it keeps all of them
            member.name = member.name.removeprefix("./")

            def read(size: int, member: tarfile.TarInfo = member) -> bytes:
                with _unpacking():
                    return (archive.extractfile(member) or io.BytesIO()).read(size)

            yield member, read


@contextlib.contextmanager
def _unpacking():
    try:
        yield
    except (*damage(), tarfile.TarError, OSError) as error:
        raise DamagedError(f"does not unpack ({' '.join(str(error).split())})") from error


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _json_lines(path: str, label: str, name: str) -> Iterator[tuple[str, dict[str, Any] | Omitted]]:
    try:
        with opened(path, name) as file:
            for number, line in enumerate(file, 1):
                where = f"{label}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield where, Omitted(where, f"is not JSON ({' '.join(str(error).split())})", damaged=True)
                    continue
                yield where, row if isinstance(row, dict) else Omitted(where, f"is {type(row).__name__}, expected an object", damaged=True)
    except damage() as error:
        yield label, Omitted(label, f"does not unpack ({' '.join(str(error).split())})", damaged=True)
    except OSError as error:
        yield label, Omitted(label, f"cannot be read ({error.strerror or ' '.join(str(error).split())})", damaged=True)


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def _pyarrow(name: str):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{name}: Parquet needs the pyarrow package, which is not installed; pip install 'lmx[data]'") from error
    return pyarrow


def _row_groups(path: Path, base: Path, size: int, name: str) -> Iterator[Unit]:
    pyarrow, label = _pyarrow(name), parts.relative(path, base)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            lengths = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError, ValueError):
        lengths = []  # said where it is read
    starts, held = [0], 0
    for group, length in enumerate(lengths):
        if held and held + length > size:
            starts.append(group)
            held = 0
        held += length
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        yield Unit(f"{label}@{start}", (str(path),), start, stop)


def _parquet(path: Path, label: str, unit: Unit, name: str) -> Iterator[tuple[str, dict[str, Any] | Omitted]]:
    pyarrow = _pyarrow(name)
    problems = (pyarrow.ArrowException, OSError, ValueError, MemoryError)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            for group in range(unit.start, len(rows) if unit.stop is None else unit.stop):
                number = sum(rows[:group])
                try:
                    for batch in file.iter_batches(batch_size=64, row_groups=[group], use_threads=False):
                        for row in batch.to_pylist():
                            yield f"{label}:{number}", row
                            number += 1
                except problems as error:
                    reason = f"is damaged in row group {group} ({' '.join(str(error).split())[:200]})"
                    yield label, Omitted(f"{label}:{number}", reason, damaged=True)
    except problems as error:
        yield label, Omitted(label, f"is not a whole Parquet file ({' '.join(str(error).split())[:200]})", damaged=True)
