"""Where documents come from: one file a release format."""

from lmx.data.sources.array_record import ArrayRecord
from lmx.data.sources.bookcorpus import BookCorpus
from lmx.data.sources.files import documents, source_files, source_hash
from lmx.data.sources.gutenberg import PG19, Gutenberg
from lmx.data.sources.jsonl import Jsonl
from lmx.data.sources.openwebtext import OpenWebText
from lmx.data.sources.parquet import Parquet
from lmx.data.sources.reddit import Reddit, links
from lmx.data.sources.source import UNIT, Omitted, Source, Unit
from lmx.data.sources.stream import Position, stream
from lmx.data.sources.texts import Texts
from lmx.data.sources.tfds import Tfds

__all__ = [
    "PG19",
    "UNIT",
    "ArrayRecord",
    "BookCorpus",
    "Gutenberg",
    "Jsonl",
    "Omitted",
    "OpenWebText",
    "Parquet",
    "Position",
    "Reddit",
    "Source",
    "Texts",
    "Tfds",
    "Unit",
    "documents",
    "links",
    "source_files",
    "source_hash",
    "stream",
]
