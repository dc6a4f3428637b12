"""Where documents come from: one file a release format."""

from lmx.data.sources.files import documents, source_files, source_hash
from lmx.data.sources.source import UNIT, Omitted, Source, Unit

__all__ = ["UNIT", "Omitted", "Source", "Unit", "documents", "source_files", "source_hash"]
