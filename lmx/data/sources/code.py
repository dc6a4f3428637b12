"""Code: trees of files (`CodeTree`: a checkout, a folder, tar archives) and tables of them (`CodeTable`: GitHub's JSON lines, Parquet)."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lmx.data.documents import Document
from lmx.data.sources.code_rules import CodeRules
from lmx.data.sources.compressed import damage, opened
from lmx.data.sources.licenses import FILE, licenses, spelt
from lmx.data.sources.parquet import row_groups, rows
from lmx.data.sources.paths import byte_parts, documented, each, found, grouped, json_records, suffix, unreadable
from lmx.data.sources.source import UNIT, Omitted, Unit
from lmx.data.sources.tars import SUFFIXES, members

LICENSE_BYTES = 1 << 17  # of a licence file that are read
# Columns that mean the same, in BigQuery's exports and in The Stack: the first that a record has counts.
CONTENT, PATH, BINARY = ("content",), ("path", "sample_path", "max_stars_repo_path"), ("binary",)
LICENSES, LANGUAGE = ("max_stars_repo_licenses", "licenses", "license", "detected_licenses"), ("lang", "language")
KEPT = {"repo": ("repo_name", "sample_repo_name", "max_stars_repo_name"), "hash": ("hexsha", "id"), "ref": ("ref",)}
COLUMNS = (*CONTENT, *PATH, *BINARY, *LICENSES, *LANGUAGE, *(name for names in KEPT.values() for name in names))


@dataclass(frozen=True)
class CodeTree:
    """A file a document: those below a folder (folder by folder; what lies in `.git` is not looked at), or in a tar archive, or in those that
    a glob matches. `path` or `archive/path` is its id.

    A file's licences are its own SPDX header's, else those of the licence files in the nearest folder above it that has some. An archive is
    read twice: its licences may lie behind its code. Omitted: by the rules; `link`.
    """

    path: str
    rules: CodeRules = CodeRules()
    name: str = "code"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = list(_walk(Path(self.path))) if self.path and Path(self.path).is_dir() else []
        # Without a file below, `found` says so.
        return grouped(files or found(self.path, _is_archive, "code, or a tar archive", name=self.name), self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        if not Path(self.path).is_dir():
            return each(unit, self.path, self._archive)
        known: dict[str, list[str]] = {}
        return each(unit, self.path, lambda path, label, *_: self._file(path, label, known))

    def _file(self, path: Path, label: str, known: dict[str, list[str]]) -> Iterator[Document | Omitted]:
        if path.is_symlink():
            yield Omitted(str(path), "link")
        elif reason := self.rules.of_path(label, path.stat().st_size):
            yield Omitted(str(path), reason)
        else:
            above = _nearest(label, lambda folder: _licenses_in(Path(self.path) / folder), known)
            yield self._document(label, label, str(path), str(path), path.read_bytes(), above)

    def _document(self, id: str, path: str, source: str, where: str, data: bytes, above: list[str]) -> Document | Omitted:
        text, language, found, reason = self.rules.judge(path, data, above)
        return Omitted(where, reason) if reason else Document(id, text, source, {"path": path, "language": language, "licenses": found})

    def _archive(self, file: Path, label: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        found, known = _licenses_of(file, self.name), {}
        with opened(file, self.name) as archive:
            for item in members(archive, str(file)):
                if isinstance(item, Omitted):
                    yield item
                    continue
                path, size, contents = item[0].removeprefix("./"), *item[1:]
                where = f"{file}/{path}"
                if reason := self.rules.of_path(path, size):
                    yield Omitted(where, reason)
                    continue
                try:
                    data = contents.read()
                except (*damage(), OSError) as error:
                    yield unreadable(where, error)
                    continue
                nearest = _nearest(path, lambda folder: sorted(found.get(folder, ())), known)
                yield self._document(f"{label}/{path}", path, str(file), where, data, nearest)


@dataclass(frozen=True)
class CodeTable:
    """A record a document, from a file, a glob, or the .jsonl, .json and .parquet files below a folder: JSON lines as BigQuery exports its
    `github_repos` tables (joined: a record has its path), or Parquet as The Stack has it. `file@byte` or `file:row` is its id.

    Omitted: by the rules; `no_path` (the language cannot be told).
    """

    path: str
    rules: CodeRules = CodeRules()
    name: str = "code"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        kinds = (".jsonl", ".ndjson", ".json", ".parquet")
        files = found(self.path, lambda path: suffix(path) in kinds, ".jsonl, .json or .parquet", name=self.name)
        return grouped(files, self.path, size, lambda path, count: (row_groups if _is_parquet(path) else byte_parts)(path, count))

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        if _is_parquet(path):
            return documented(rows(path, start, stop, COLUMNS, self.name), path, relative, self._document, "record")
        return documented(json_records(path, self.name, start, stop), path, relative, self._document)

    def _document(self, row: Any, id: str, source: str, where: str) -> Document | Omitted:
        if not isinstance(row, dict):
            raise ValueError(f"is {type(row).__name__} {str(row)[:40]!r}, expected an object")
        content, path, language = (_first(row, names) for names in (CONTENT, PATH, LANGUAGE))
        if _first(row, BINARY) in (True, "true"):
            return Omitted(where, "binary")
        if not isinstance(content, str):
            raise ValueError(f"has {type(content).__name__} in its field 'content', expected text")
        if not isinstance(path, str):
            return Omitted(where, "no_path")
        said = _first(row, LICENSES)
        said = [said] if isinstance(said, str) else [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
        text, language, found, reason = self.rules.judge(path, content, spelt(said), language if isinstance(language, str) else "")
        if reason:
            return Omitted(where, reason)
        more = {key: value for key, names in KEPT.items() if isinstance(value := _first(row, names), str)}
        return Document(id, text, source, {"path": path, "language": language, "licenses": found, **more})


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
                found.update(_licenses(file))
    return sorted(found)


def _licenses_of(archive: Path, name: str) -> dict[str, set[str]]:
    """The licences in an archive's folders. What cannot be read is said where its files are."""
    found: dict[str, set[str]] = {}
    with opened(archive, name) as file:
        for item in members(file, str(archive)):
            if not isinstance(item, Omitted) and FILE.fullmatch(PurePosixPath(item[0]).name):
                with contextlib.suppress(*damage(), OSError):
                    found.setdefault(item[0].removeprefix("./").rpartition("/")[0], set()).update(_licenses(item[2]))
    return found


def _licenses(file: BinaryIO) -> list[str]:
    return licenses(file.read(LICENSE_BYTES).decode("utf-8", "replace"))


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _is_archive(path: Path) -> bool:
    return suffix(path) in SUFFIXES
