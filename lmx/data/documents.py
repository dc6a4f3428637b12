"""The document: one text and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    A document is the unit that never mixes with another: no token of one is ever predicted from, or attends to, a token of another.
    """

    id: str
    """Names the document within its source: a file's path below the source, a record's `id`, or `file:number`."""

    text: str
    """The whole text, exactly as the source has it: no normalisation, no stripping."""

    source: str
    """The file or data set that it was read from."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of its record (none for text files): what JSON can hold."""

    created: str = ""
    """When it was written or crawled, ISO 8601 in UTC (`2024-01-02T03:04:05Z`, or a date, or a year); empty where the source does not say."""
