"""Where documents come from: one file a release format."""

from lmx.data.sources.array_record import ArrayRecord
from lmx.data.sources.bookcorpus import BookCorpus
from lmx.data.sources.code import CodeTable, CodeTree
from lmx.data.sources.code_rules import CodeRules
from lmx.data.sources.files import documents, source_files, source_hash
from lmx.data.sources.gutenberg import PG19, Gutenberg
from lmx.data.sources.jsonl import Jsonl
from lmx.data.sources.openwebtext import OpenWebText
from lmx.data.sources.parquet import Parquet
from lmx.data.sources.reddit import Reddit, links
from lmx.data.sources.source import UNIT, Omitted, Source, Unit
from lmx.data.sources.stackexchange import StackExchange
from lmx.data.sources.stream import Position, stream
from lmx.data.sources.texts import Texts
from lmx.data.sources.tfds import Tfds
from lmx.data.sources.warc import Warc, Wet
from lmx.data.sources.wikipedia import Wikipedia

__all__ = [
    "PG19",
    "UNIT",
    "ArrayRecord",
    "BookCorpus",
    "CodeRules",
    "CodeTable",
    "CodeTree",
    "Gutenberg",
    "Jsonl",
    "Omitted",
    "OpenWebText",
    "Parquet",
    "Position",
    "Reddit",
    "Source",
    "StackExchange",
    "Texts",
    "Tfds",
    "Unit",
    "Warc",
    "Wet",
    "Wikipedia",
    "documents",
    "links",
    "source_files",
    "source_hash",
    "stream",
]
