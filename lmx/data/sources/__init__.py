"""Where documents come from: one file a release format.

| source | reads | a unit is | id | metadata, time | omitted |
| --- | --- | --- | --- | --- | --- |
| `Texts` | .txt, .md | files | path | | |
| `Jsonl` | .jsonl, .ndjson, .json | files or bytes | the record's, else `file@byte` | its other fields, a time of `created` | |
| `Parquet` | .parquet | files or row groups | the record's, else `file:row` | as `Jsonl` | |
| `ArrayRecord` | .array_record | files or records | the record's, else `file:record` | as `Jsonl` | |
| `Tfds` | a prepared data set | records | the record's, else `data set/split:record` | as `Jsonl` | |
| `Gutenberg` | .txt | files | path | title, author, language, ebook, …; release | other_encoding |
| `PG19` | its folder | files | `split/book` | title, year, url; year | |
| `BookCorpus` | .txt, tar | files or bytes | path, `file@byte`, `archive/path` | | not_text, link |
| `OpenWebText` | tar, _data.xz | files | `archive/archive/path` | url_md5 | not_text, link |
| `Reddit` | RS_…, RC_… | files or bytes | `t3_…`, `t1_…` | url, title, subreddit, author, score, …; posting | deleted, removed, empty, link, |
| | | | | | no_score, low_score, over_18, subreddit |
| `Wikipedia` | .xml | files or bytes | `file:page id` | url, title, page_id, revision_id, language; revision | namespace, redirect, |
| | | | | | model, deleted, empty |
| `StackExchange` | Posts.xml, .7z | files | `file:question` | url, title, site, tags, score, license, author, answers; question | post_type, |
| | | | | | low_score, few_answers, no_question, empty |
| `Wet` | .warc.wet | files or members | `file@byte` | url, record_id, digest, offset, languages, …; crawl | record_type, language, too_long, empty |
| `Warc` | .warc | files or members | `file@byte` | as `Wet`, charset; crawl | as `Wet`, status, mime, content_encoding |
| `CodeTree` | a folder, tar | files | path, `archive/path` | path, language, licenses | link, those of `CodeRules` |
| `CodeTable` | .jsonl, .parquet | as these | `file@byte`, `file:row` | path, language, licenses, repo, hash, ref | no_path, binary, as `CodeTree` |

A source's first field is what it reads, but for TFDS a `path`: a file, a glob (these are read whatever they are called), or a folder; its last
is its `name`, which errors begin with. Files may be compressed (.gz, .xz, .bz2, .zst) where the format is not; compressed ones are cut only
into members. Paths in ids are below the source. Times are ISO 8601 in UTC. `Omitted.where` begins with the whole path.
"""

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
