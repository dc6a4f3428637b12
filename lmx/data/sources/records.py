"""Bytes to records to documents, the same for every container. What is wrong is a ValueError that reads on after the record's place."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from lmx.data.documents import Document

CREATED = ("created", "timestamp", "added")  # where C4 and Dolma say when a document was written or crawled: the first that says it
EPOCH = datetime(1970, 1, 1)
YEAR, SECONDS = re.compile(r"\d{4}"), re.compile(r"\d+(\.\d+)?")
UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")  # nearly every time is written so, and stays as it is
SCAN = json.JSONDecoder().scan_once  # json.loads without its looking for white space first: a quarter of its time for a short record
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def utf8(data: bytes, offset: int = 0) -> str:
    """Raises ValueError, with the place in the file if the data begin at `offset` of it."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = offset + error.start
        raise ValueError(
            f"is not UTF-8: byte {data[error.start]:#04x} at offset {byte}; convert it (iconv -t utf-8) or leave it out"
        ) from error


def parsed(data: bytes, offset: int = 0) -> Any:
    """A JSON value. Raises ValueError as `utf8`, and for what is not JSON."""
    text = utf8(data, offset)
    try:
        value, end = SCAN(text, 0)
        if end == len(text) or text[end:].isspace():
            return value
    except (StopIteration, ValueError, RecursionError):  # json.loads says what is wrong
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({first_line(error)}): {text.strip()[:40]!r}") from error


def sound(data: bytes, offset: int = 0) -> Any:
    """A JSON value that can be written again as UTF-8: JSON may escape half a surrogate pair, which is no text. Raises ValueError else."""
    value = parsed(data, offset)
    if SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair; repair or leave out that text") from error
    return value


def from_record(
    record: Any, id: str, source: str, *, text: str = "text", key: str = "id", created: Sequence[str] = (), knob: str = "text"
) -> Document:
    """The document of a record: its field `text`, its id from the field `key` (else `id`), the rest its metadata.

    The first field of `created` that holds a time is its time. Raises ValueError for what has no text; `knob` is where its field is chosen.
    """
    if not isinstance(record, dict | Mapping):
        raise ValueError(f"is {type(record).__name__} {str(record)[:40]!r}, expected an object with the field {text!r}")
    if text not in record:
        raise ValueError(f"has no field {text!r}, only {', '.join(map(repr, record)) or 'none'}; set {knob}")
    if not isinstance(record[text], str):
        raise ValueError(f"has {type(record[text]).__name__} in its field {text!r}, expected text; set {knob}")
    rest, when = dict(record), ""
    body, known = rest.pop(text), rest.pop(key, None)
    for name in created:
        if name in rest and (when := iso(rest[name])):
            del rest[name]
            break
    return Document(id if known is None else str(known), body, source, rest, when)


def from_fields(text: str, key: str, created: Sequence[str]) -> Callable[..., Document]:
    """`from_record` of these fields, as `documented` calls it."""
    return lambda record, id, source, _: from_record(record, id, source, text=text, key=key, created=created)


def iso(value: Any) -> str:
    """A time as ISO 8601 in UTC: from seconds since 1970 (a number, or its digits as text), or from ISO 8601. Empty for what is none.

    Dates and years stay what they are; a time without a zone is UTC's.
    """
    if isinstance(value, str) and YEAR.fullmatch(value):
        return value
    try:
        if isinstance(value, str) and UTC_TIME.fullmatch(value):
            datetime.fromisoformat(value)
            return value
        if isinstance(value, str) and not SECONDS.fullmatch(value):
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            return (EPOCH + timedelta(seconds=float(value))).isoformat() + "Z"
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).replace(tzinfo=None)
            return value.isoformat() + "Z"
    except (ValueError, OverflowError, OSError):
        return ""
    return value.isoformat() if isinstance(value, date) else ""


def plain(value: Any) -> Any:
    """A value of Arrow, NumPy or TFDS as one that JSON can hold. Raises ValueError for bytes that are not UTF-8."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return utf8(value)
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, date):
        return iso(value)
    if isinstance(value, Decimal):
        return str(value)
    raise ValueError(f"holds {type(value).__name__} {str(value)[:40]!r}, which JSON cannot")


def first_line(error: BaseException) -> str:
    """Of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
