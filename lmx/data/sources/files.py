"""Where documents come from: text files, JSON lines, ArrayRecord, TFDS. What is wrong with a source is said in one line."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources.compressed import damage, opened

TEXT = (".txt", ".md")
JSON_LINES = (".jsonl",)
JSON = (".json",)
RECORDS = (".array_record",)
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
EXPECTED = "expected .txt, .md, .jsonl or .json (each may end in .gz, .xz, .bz2 or .zst too), or .array_record"

# A TFDS split ("train", "train[:10%]", "train+test") starts with a letter, a version ("1.0.0") with a digit: so `ag_news_subset:1.0.0` is
# all name.
TFDS = re.compile(r"(?P<name>.+?)(?::(?P<split>[A-Za-z_][\w+\[\]:%-]*))?")


def documents(source: str, *, field: str = "text", name: str = "source") -> Iterator[Document]:
    """The documents of a source, in a fixed order (files sorted by path, records as they lie), one in memory at a time.

    `source` is one of
    - a file: `.txt`/`.md` (one document), `.jsonl` (one a line), `.json` (one object or a list of them), each also compressed with
      `.gz`, `.xz`, `.bz2` or `.zst`; `.array_record` (each record UTF-8 text, or, if the first record is a JSON object, each a JSON
      object);
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
        root, files = _root(source), source_files(source, name=name)
        read = (document for path in files for document in _file(path, _relative(path, root), field, name))
    return _not_empty(read, source, name)


def source_files(source: str, *, name: str = "source") -> list[Path]:
    """The files a source (not a `tfds:` one) is made of, sorted. Raises FileNotFoundError or ValueError as `documents` does."""
    if not source:
        raise ValueError(f"{name}='' names nothing; give a file, a folder, a glob or tfds:NAME")
    path = Path(source)
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = [p for p in below if _kind(p)]
        if not files:
            found = ", ".join(sorted({p.suffix or p.name for p in below})[:5]) or "nothing"
            raise FileNotFoundError(f"{name}={source!r} is a folder without a file to read (it holds {found}); {EXPECTED}")
        return files
    if path.exists():
        files = [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
        if not files and glob.has_magic(source):
            raise FileNotFoundError(
                f"{name}={source!r} matches no file; check the pattern (** goes into folders) and the working directory"
            )
        if not files:
            raise FileNotFoundError(
                f"{name}={source!r} does not exist; give a file, a folder, a glob or tfds:NAME (working directory: {Path.cwd()})"
            )
    for p in files:
        if not _kind(p):
            raise ValueError(f"{name}: {p} is of an unknown kind {''.join(p.suffixes[-2:]) or '(no suffix)'!r}; {EXPECTED}")
    return files


def source_hash(source: str, *, name: str = "source") -> str:
    """SHA-256 (hex) of everything that decides a source's documents: the files' contents, their names below the source, a TFDS split.

    Reads every byte once. Where the files lie does not matter, so a copied corpus keeps its cache. Raises as `documents` does.
    """
    digest = hashlib.sha256()
    if source.startswith("tfds:"):
        builder, split = _tfds_builder(source, name)
        root = Path(builder.data_dir)
        files = sorted(p for p in root.rglob("*") if p.is_file())
        digest.update(split.encode() + b"\0")
    else:
        root, files = _root(source), source_files(source, name=name)
    for path in files:
        try:
            with path.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise ValueError(f"{name}: {path} cannot be read ({error.strerror}); check its permissions") from error
        digest.update(_relative(path, root).encode() + b"\0" + contents)
    return digest.hexdigest()


def _root(source: str) -> Path:
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


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in RECORDS:
            return None
    last = suffixes[-1] if suffixes else ""
    return last if last in TEXT + JSON_LINES + JSON + RECORDS else None


def _stem(relative: str, path: Path) -> str:
    """A file's id: its path below the source without the suffixes that say its kind."""
    return relative[: relative.lower().rfind(_kind(path))]


def _file(path: Path, relative: str, field: str, name: str) -> Iterator[Document]:
    kind = _kind(path)
    try:
        if kind in RECORDS:
            yield from _array_record(path, relative, field, name)
        elif kind in JSON_LINES:
            yield from _json_lines(path, relative, field, name)
        elif kind in JSON:
            with opened(path, name) as file:
                value = _json(file.read(), f"{name}: {path}")
            for number, record in enumerate(value if isinstance(value, list) else [value]):
                yield _from_record(record, f"{name}: {path}, record {number}", f"{relative}:{number}", str(path), field)
        else:
            with opened(path, name) as file:
                yield Document(_stem(relative, path), _utf8(file.read(), f"{name}: {path}"), str(path))
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
                yield _from_record(_json(line, where, offset), where, f"{relative}:{number}", str(path), field)
            offset += len(line)


def _array_record(path: Path, relative: str, field: str, name: str) -> Iterator[Document]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        count = reader.num_records()
        if not count:
            reader.close()  # only this says that the file was cut off; until then it seems to have no records
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {path} is not a whole ArrayRecord file ({_line(error)}); write it again") from error
    as_json = None
    for first in range(0, count, 256):
        try:
            records = reader.read(list(range(first, min(first + 256, count))))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {path} is damaged near record {first} ({_line(error)}); write it again") from error
        for number, record in enumerate(records, first):
            where, id = f"{name}: {path}, record {number}", f"{relative}:{number}"
            if as_json is None:
                as_json = _is_object(record)
            if as_json:
                yield _from_record(_json(record, where), where, id, str(path), field)
            else:
                yield Document(id, _utf8(record, where), str(path))
    reader.close()


def _tfds_builder(source: str, name: str):
    """A prepared TFDS builder and the split. Raises ValueError in one line whatever TFDS has to say."""
    given = source.removeprefix("tfds:")
    whole = Path(given).is_dir()
    match = TFDS.fullmatch(given)
    if not match:
        raise ValueError(f"{name}={source!r} names no data set; expected tfds:NAME[:split] or tfds:DIRECTORY[:split]")
    dataset, split = (given, None) if whole else match.group("name", "split")
    import tensorflow_datasets as tfds

    try:
        if Path(dataset).is_dir():
            builder = tfds.builder_from_directory(dataset)
        else:
            builder = tfds.builder(dataset, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # TFDS raises many types, and each is about the name or the directory given
        raise ValueError(
            f"{name}={source!r}: TFDS cannot open it ({_line(error)}); give a name from the TFDS catalogue or a prepared directory"
        ) from error
    return builder, split or "train"


def _tfds(source: str, field: str, name: str) -> Iterator[Document]:
    builder, split = _tfds_builder(source, name)
    try:
        data = builder.as_data_source(split=split)
    except Exception as error:  # as above: an unknown split, or files that are no ArrayRecord
        known = ", ".join(builder.info.splits)
        raise ValueError(
            f"{name}={source!r}: no split {split!r} to read ({_line(error)}); it has {known}, and must be stored as array_record"
        ) from error
    return _tfds_records(data, builder.info.name, split, source, field, name)


def _tfds_records(data: Any, dataset: str, split: str, source: str, field: str, name: str) -> Iterator[Document]:
    where = f"{name}={source!r}, record"
    for number in range(len(data)):
        record = data[number]
        if isinstance(record, Mapping):  # TFDS gives text as bytes
            text = {key: _utf8(record[key], f"{where} {number}, {key}") for key in (field, "id") if isinstance(record.get(key), bytes)}
            record = {**record, **text}
        yield _from_record(record, f"{where} {number}", f"{dataset}/{split}:{number}", source, field)


def _from_record(record: Any, where: str, id: str, source: str, field: str) -> Document:
    problem = ""
    if not isinstance(record, Mapping):
        problem = f"is {type(record).__name__} {str(record)[:40]!r}, expected an object with the field {field!r}"
    elif field not in record:
        problem = f"has no field {field!r}, only {', '.join(map(repr, record)) or 'none'}; set data.field"
    elif not isinstance(record[field], str):
        problem = f"has {type(record[field]).__name__} in its field {field!r}, expected text; set data.field"
    if problem:
        raise ValueError(f"{where} {problem}")
    rest = {key: value for key, value in record.items() if key not in (field, "id")}
    return Document(str(record.get("id", id)), record[field], source, rest)


def _utf8(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = offset + error.start
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {byte}; convert it (iconv -t utf-8) or leave it out"
        ) from error


def _json(data: bytes, where: str, offset: int = 0) -> Any:
    text = _utf8(data, where, offset)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({_line(error)}): {text.strip()[:40]!r}") from error


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
