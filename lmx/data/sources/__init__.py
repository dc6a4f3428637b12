"""Where documents come from: one file a release format."""

from lmx.data.sources.array_record import ArrayRecord
from lmx.data.sources.files import documents, source_files, source_hash
from lmx.data.sources.jsonl import Jsonl
from lmx.data.sources.parquet import Parquet
from lmx.data.sources.source import UNIT, Omitted, Source, Unit
from lmx.data.sources.texts import Texts
from lmx.data.sources.tfds import Tfds

__all__ = [
    "UNIT",
    "ArrayRecord",
    "Jsonl",
    "Omitted",
    "Parquet",
    "Source",
    "Texts",
    "Tfds",
    "Unit",
    "documents",
    "source_files",
    "source_hash",
]
