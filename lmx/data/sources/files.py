"""Where documents come from: text files, JSON lines, ArrayRecord, Parquet, TFDS. What is wrong with a source is said in one line."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources import array_record, parquet, tfds
from lmx.data.sources.compressed import damage, opened
from lmx.data.sources.paths import COMPRESSED, found, relative, root, suffix
from lmx.data.sources.records import from_record, parsed, utf8
from lmx.data.sources.source import Omitted

TEXT = (".txt", ".md")
JSON_LINES = (".jsonl",)
JSON = (".json",)
RECORDS = (".array_record", ".parquet")
EXPECTED = ".txt, .md, .jsonl or .json (each may end in .gz, .xz, .bz2 or .zst too), .array_record or .parquet"


def documents(source: str, *, field: str = "text", name: str = "source") -> Iterator[Document]:
    """The documents of a source, in a fixed order (files sorted by path, records as they lie), one in memory at a time.

    `source` is one of
    - a file: `.txt`/`.md` (one document), `.jsonl` (one a line), `.json` (one object or a list of them), each also compressed with
      `.gz`, `.xz`, `.bz2` or `.zst`; `.array_record` (each record UTF-8 text, or, if the first record is a JSON object, each a JSON
      object); `.parquet` (a row a document);
    - a folder (every file of those kinds below it; files of other kinds are not looked at) or a glob (`"books/**/*.txt"`);
    - `tfds:NAME[:split]` (prepared in TFDS's own data directory, downloaded if it is not there yet) or `tfds:DIRECTORY[:split]`; split
      `train` if not given. Read without TensorFlow, so it must be stored as ArrayRecord.

    `field` names the text in JSON and TFDS records; `id`, where a record has it, becomes the document's id, the rest its metadata.
    `name` is what errors call the source: the knob that was turned (`data.train`).

    Raises, before the first document: FileNotFoundError when nothing is there, ValueError for a kind of file not known. While reading:
    ValueError for a damaged file, text that is not UTF-8 (with the byte offset), a record without the field (with its line), and at the
    end when no document held any text.
    """
    if source.startswith("tfds:"):
        read = _tfds(source, field, name)
    else:
        base, files = root(source), source_files(source, name=name)
        read = (document for path in files for document in _file(path, relative(path, base), field, name))
    return _not_empty(read, source, name)


def source_files(source: str, *, name: str = "source") -> list[Path]:
    """The files a source (not a `tfds:` one) is made of, sorted. Raises FileNotFoundError or ValueError as `documents` does."""
    give = "a file, a folder, a glob or tfds:NAME"
    files = found(source, lambda path: bool(_kind(path)), EXPECTED, name=name, give=give)
    for p in files:
        if not _kind(p):
            raise ValueError(f"{name}: {p} is of an unknown kind {''.join(p.suffixes[-2:]) or '(no suffix)'!r}; expected {EXPECTED}")
    return files


def source_hash(source: str, *, name: str = "source") -> str:
    """SHA-256 (hex) of everything that decides a source's documents: the files' contents, their names below the source, a TFDS split.

    Reads every byte once. Where the files lie does not matter, so a copied corpus keeps its cache. Raises as `documents` does.
    """
    digest = hashlib.sha256()
    if source.startswith("tfds:"):
        builder, split = tfds.built(source.removeprefix("tfds:"), name)
        base = Path(builder.data_dir)
        files = sorted(p for p in base.rglob("*") if p.is_file())
        digest.update(split.encode() + b"\0")
    else:
        base, files = root(source), source_files(source, name=name)
    for path in files:
        try:
            with path.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise ValueError(f"{name}: {path} cannot be read ({error.strerror}); check its permissions") from error
        digest.update(relative(path, base).encode() + b"\0" + contents)
    return digest.hexdigest()


def _kind(path: Path) -> str | None:
    kind = suffix(path)
    if kind in RECORDS and path.suffix.lower() in COMPRESSED:
        return None
    return kind if kind in TEXT + JSON_LINES + JSON + RECORDS else None


def _stem(relative: str, path: Path) -> str:
    """A file's id: its path below the source without the suffixes that say its kind."""
    return relative[: relative.lower().rfind(_kind(path))]


def _file(path: Path, relative: str, field: str, name: str) -> Iterator[Document]:
    kind = _kind(path)
    try:
        if kind in RECORDS:
            yield from _records(path, relative, field, name)
        elif kind in JSON_LINES:
            yield from _json_lines(path, relative, field, name)
        elif kind in JSON:
            with opened(path, name) as file:
                value = _at(f"{name}: {path}", parsed, file.read())
            for number, record in enumerate(value if isinstance(value, list) else [value]):
                yield _from_record(record, f"{name}: {path}, record {number}", f"{relative}:{number}", str(path), field)
        else:
            with opened(path, name) as file:
                yield Document(_stem(relative, path), _at(f"{name}: {path}", utf8, file.read()), str(path))
    except damage() as error:
        raise ValueError(f"{name}: {path} is damaged ({error}); unpack it by hand to see how far it is whole") from error
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read ({error.strerror or error}); check the file and its permissions") from error


def _json_lines(path: Path, relative: str, field: str, name: str) -> Iterator[Document]:
    offset = 0
    with opened(path, name) as file:
        for number, line in enumerate(file, 1):
            where = f"{name}: {path}, line {number}"
            if line.strip():
                yield _from_record(_at(where, parsed, line, offset), where, f"{relative}:{number}", str(path), field)
            offset += len(line)


def _records(path: Path, relative: str, field: str, name: str) -> Iterator[Document]:
    as_parquet = _kind(path) == ".parquet"
    for item in parquet.rows(path, name=name) if as_parquet else array_record.records(path):
        if isinstance(item, Omitted):
            raise ValueError(f"{name}: {item.where} {item.reason}")
        number, record = item
        record, as_json = (record, True) if as_parquet else record
        where, id = f"{name}: {path}, record {number}", f"{relative}:{number}"
        if as_json:
            yield _from_record(record if as_parquet else _at(where, parsed, record), where, id, str(path), field)
        else:
            yield Document(id, _at(where, utf8, record), str(path))


def _tfds(source: str, field: str, name: str) -> Iterator[Document]:
    dataset = source.removeprefix("tfds:")
    builder, split = tfds.built(dataset, name)
    data, prefix = tfds.opened_split(builder, split, dataset, name)
    return _tfds_records(data, prefix, source, field, name)


def _tfds_records(data: Any, prefix: str, source: str, field: str, name: str) -> Iterator[Document]:
    where = f"{name}={source!r}, record"
    for number in range(len(data)):
        record = data[number]
        if isinstance(record, Mapping):  # TFDS gives text as bytes
            known = [key for key in (field, "id") if isinstance(record.get(key), bytes)]
            record = {**record, **{key: _at(f"{where} {number}, {key}", utf8, record[key]) for key in known}}
        yield _from_record(record, f"{where} {number}", f"{prefix}:{number}", source, field)


def _from_record(record: Any, where: str, id: str, source: str, field: str) -> Document:
    return _at(where, from_record, record, id, source, text=field, knob="data.field")


def _at[T](where: str, made: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What `made` makes of its arguments; its ValueError says where."""
    try:
        return made(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _not_empty(read: Iterator[Document], source: str, name: str) -> Iterator[Document]:
    empty = True
    for document in read:
        # JSON may escape half a surrogate pair, which is no text: nothing could encode it as UTF-8, now or when it is generated.
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            where = f"{name}: document {document.id!r} of {document.source}"
            raise ValueError(f"{where} holds half a surrogate pair at character {error.start}; repair or leave out that text") from error
        empty = empty and not document.text
        yield document
    if empty:
        raise ValueError(f"{name}={source!r} holds no text: every document is empty, or there is none")
