"""Where documents come from: one file a release format."""

from lmx.data.sources.code import CodeTable, CodeTree
from lmx.data.sources.code_rules import CodeRules
from lmx.data.sources.files import documents, source_files, source_hash
from lmx.data.sources.source import UNIT, Omitted, Source, Unit
from lmx.data.sources.stackexchange import StackExchange
from lmx.data.sources.warc import Warc, Wet
from lmx.data.sources.wikipedia import Wikipedia

__all__ = [
    "UNIT",
    "CodeRules",
    "CodeTable",
    "CodeTree",
    "Omitted",
    "Source",
    "StackExchange",
    "Unit",
    "Warc",
    "Wet",
    "Wikipedia",
    "documents",
    "source_files",
    "source_hash",
]
