"""Tiny files of every release format, made of text of our own, and the documents that they hold."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lmx.data import Document
from lmx.data.sources import (
    PG19,
    ArrayRecord,
    BookCorpus,
    Gutenberg,
    Jsonl,
    Omitted,
    OpenWebText,
    Parquet,
    Reddit,
    Source,
    Texts,
)

Case = tuple[Source, list[Document | Omitted]]


def ndjson(*records: dict, escaped: bool = False) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=escaped).encode() + b"\n" for record in records)


def tar(files: dict[str, bytes], folder: str = "", mode: str = "w") -> bytes:
    """An archive of a folder, as `tar c` makes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        if folder:
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    """As PushShift packs: with a window of 2 GiB, which readers refuse if they are not told."""
    zstd = pytest.importorskip(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", reason="the zstd extra is not installed"
    )
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 0}
    packer = zstd.ZstdCompressor(options=options)
    return packer.compress(data) + packer.flush()


def jsonl(folder: Path) -> Case:
    dolma = [
        {
            "id": "d/1",
            "text": "Der Hund schläft.",
            "source": "toy",
            "added": "2024-02-03T00:00:00.000Z",
            "created": "2019-04-25T14:57:54+02:00",
        },
        {"id": "d/2", "text": "A cat\nsits.", "source": "toy", "added": "2024-02-03", "metadata": {"provenance": "a.gz:2"}},
    ]
    c4 = [{"text": "Rain fell.", "timestamp": "2019-04-25T12:57:54Z", "url": "http://toy.example/"}, {"text": "", "timestamp": None}]
    (folder / "c4-train.00000-of-00002.json.gz").write_bytes(gzip.compress(ndjson(c4[0])) + gzip.compress(ndjson(c4[1])))
    first, second = ndjson(dolma[0]), ndjson(dolma[1]).rstrip()
    (folder / "dolma").mkdir()
    (folder / "dolma" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + first[:-1] + b"\r\n\r\n" + second)
    (folder / "readme.html").write_bytes(b"no records")
    zip_file, plain = str(folder / "c4-train.00000-of-00002.json.gz"), str(folder / "dolma" / "a.jsonl")
    names = [f"c4-train.00000-of-00002.json.gz@{at}" for at in (0, len(ndjson(c4[0])))]
    return Jsonl(str(folder)), [
        Document(names[0], "Rain fell.", zip_file, {"url": "http://toy.example/"}, "2019-04-25T12:57:54Z"),
        Document(names[1], "", zip_file, {"timestamp": None}),
        Document("d/1", "Der Hund schläft.", plain, {"source": "toy", "added": dolma[0]["added"]}, "2019-04-25T12:57:54Z"),
        Document("d/2", "A cat\nsits.", plain, {"source": "toy", "metadata": {"provenance": "a.gz:2"}}, "2024-02-03"),
    ]


def texts(folder: Path) -> Case:
    (folder / "b").mkdir()
    files = {"a.txt": b"One.\r\n", "b/c.md.xz": lzma.compress("Zwölf.".encode()), "b/d.txt": b"", "e.log": b"no", ".f.txt": b"no"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = {"a.txt": "One.\r\n", "b/c.md.xz": "Zwölf.", "b/d.txt": ""}
    return Texts(str(folder)), [Document(name, text, str(folder / name)) for name, text in found.items()]


def parquet(folder: Path) -> Case:
    import datetime

    import pyarrow
    import pyarrow.parquet

    texts = [f"Row {i} of the tåble." for i in range(7)]
    times = [datetime.datetime(2020, 1, 1 + i, 12, tzinfo=datetime.UTC) for i in range(7)]
    ids = [None if i in (0, 5) else f"p{i}" for i in range(7)]
    table = {"id": ids, "text": texts, "created": times, "tags": [["x"] * (i % 3) for i in range(7)]}
    path = folder / "part-0.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2, write_page_checksum=True)
    return Parquet(str(folder)), [
        Document(ids[i] or f"part-0.parquet:{i}", texts[i], str(path), {"tags": table["tags"][i]}, f"2020-01-0{1 + i}T12:00:00Z")
        for i in range(7)
    ]


def array_record(folder: Path) -> Case:
    from array_record.python.array_record_module import ArrayRecordWriter

    records = {
        "objects.array_record": [json.dumps({"text": f"Record {i}.", "n": i}).encode() for i in range(5)],
        "plain.array_record": [f"Plain {i} é.".encode() for i in range(4)],
    }
    for name, data in records.items():
        writer = ArrayRecordWriter(str(folder / name), "group_size:1")
        for record in data:
            writer.write(record)
        writer.close()
    first, second = (str(folder / name) for name in records)
    return ArrayRecord(str(folder)), [
        *(Document(f"objects.array_record:{i}", f"Record {i}.", first, {"n": i}) for i in range(5)),
        *(Document(f"plain.array_record:{i}", f"Plain {i} é.", second) for i in range(4)),
    ]


HEADER = """The Project Gutenberg EBook of Toy Tales, by Ann Ymous

This eBook is for the use of anyone anywhere at no cost.

Title: Toy Tales
       and Others
Author: Ann Ymous
Release Date: June 2, 2008 [EBook #{number}]
Language: English
Character set encoding: {encoding}

*** START OF THIS PROJECT GUTENBERG EBOOK TOY TALES ***



Produced by Some One and
the Others.



"""
BODY = "TOY TALES\n\n\nIt rained all day in the café, and\nnobody came.\n"
FOOTER = """


End of the Project Gutenberg EBook of Toy Tales, by Ann Ymous

*** END OF THIS PROJECT GUTENBERG EBOOK TOY TALES ***

***** This file should be named {number}.txt *****
*** START: FULL LICENSE ***
"""


def book(number: int, encoding: str) -> bytes:
    text = HEADER.format(number=number, encoding=encoding) + BODY + FOOTER.format(number=number)
    return text.replace("\n", "\r\n").encode({"ASCII": "ascii"}.get(encoding, encoding), "replace")


def gutenberg(folder: Path) -> Case:
    (folder / "1").mkdir()
    (folder / "2").mkdir()
    (folder / "1" / "11-0.txt").write_bytes(b"\xef\xbb\xbf" + book(11, "UTF-8"))
    (folder / "1" / "11-8.txt").write_bytes(book(11, "ISO-8859-1"))
    (folder / "1" / "11.txt").write_bytes(book(11, "ASCII"))
    (folder / "2" / "22-8.txt").write_bytes(book(22, "ISO-8859-1"))
    (folder / "2" / "no_markers.txt").write_bytes(b"Only a text.\r\n")
    fields = {"title": "Toy Tales and Others", "author": "Ann Ymous", "release_date": "June 2, 2008", "language": "English"}
    fields["credits"] = "Produced by Some One and the Others."
    more = [{**fields, "character_set_encoding": name, "ebook": n} for name, n in (("UTF-8", 11), ("ISO-8859-1", 22))]
    return Gutenberg(str(folder)), [
        Document("1/11-0.txt", BODY, str(folder / "1" / "11-0.txt"), more[0], "2008-06-02"),
        Omitted(str(folder / "1" / "11-8.txt"), "other_encoding"),
        Omitted(str(folder / "1" / "11.txt"), "other_encoding"),
        Document("2/22-8.txt", BODY, str(folder / "2" / "22-8.txt"), more[1], "2008-06-02"),
        Document("2/no_markers.txt", "Only a text.\n", str(folder / "2" / "no_markers.txt")),
    ]


def pg19(folder: Path) -> Case:
    for split, number in (("test", 7), ("train", 5), ("train", 6)):
        (folder / split).mkdir(exist_ok=True)
        (folder / split / f"{number}.txt").write_text(f"Book {number} é\n", encoding="utf-8")
    (folder / "metadata.csv").write_text(
        '5,A Toy, and More,1901,http://toy.example/5\n6,"Quoted, too",1840,http://toy.example/6\n', encoding="utf-8"
    )
    five = {"title": "A Toy, and More", "year": "1901", "url": "http://toy.example/5"}
    six = {"title": "Quoted, too", "year": "1840", "url": "http://toy.example/6"}
    return PG19(str(folder)), [
        Document("test/7", "Book 7 é\n", str(folder / "test" / "7.txt")),
        Document("train/5", "Book 5 é\n", str(folder / "train" / "5.txt"), five, "1901"),
        Document("train/6", "Book 6 é\n", str(folder / "train" / "6.txt"), six, "1840"),
    ]


SENTENCES = [f"the lamp number {i} went out ." for i in range(10)]


def runs(id: str, source: str, lines: int = 3) -> list[Document]:
    """The documents of `lines` lines that SENTENCES make."""
    starts = range(0, len(SENTENCES), lines)
    at = [sum(len(sentence) + 1 for sentence in SENTENCES[:start]) for start in starts]
    return [Document(f"{id}@{a}", "\n".join(SENTENCES[s : s + lines]), source) for a, s in zip(at, starts, strict=True)]


def bookcorpus(folder: Path) -> Case:
    joined = "".join(f"{sentence}\n" for sentence in SENTENCES).encode()
    (folder / "books_large_p1.txt").write_bytes(joined)
    (folder / "books_large_p2.txt").write_bytes(joined.rstrip())
    (folder / "out_txts").mkdir()
    (folder / "out_txts" / "7__toy.txt").write_bytes(b"A Toy\n\nIt rained.\n")
    return BookCorpus(str(folder), lines_per_document=3), [
        *runs("books_large_p1.txt", str(folder / "books_large_p1.txt")),
        *runs("books_large_p2.txt", str(folder / "books_large_p2.txt")),
        Document("out_txts/7__toy.txt", "A Toy\n\nIt rained.\n", str(folder / "out_txts" / "7__toy.txt")),
    ]


def bookcorpus_tar(folder: Path) -> Case:
    joined = "".join(f"{sentence}\n" for sentence in SENTENCES).encode()
    path = folder / "bookcorpus.tar.bz2"
    path.write_bytes(bz2.compress(tar({"books_large_p1.txt": joined, "books_large_p2.txt": joined})))
    names = ("books_large_p1.txt", "books_large_p2.txt")
    return BookCorpus(str(path), lines_per_document=3), [d for name in names for d in runs(f"{path.name}/{name}", f"{path}/{name}")]


def books1(folder: Path) -> Case:
    path = folder / "books1.tar.gz"
    files = {"books1/epubtxt/a-toy.epub.txt": b"A Toy\n\nIt rained.", "books1/2020-08-27-epub_urls.txt": b"http://toy.example/"}
    path.write_bytes(gzip.compress(tar(files, "books1"), mtime=0))
    return BookCorpus(str(folder)), [
        Document("books1.tar.gz/books1/epubtxt/a-toy.epub.txt", "A Toy\n\nIt rained.", f"{path}/books1/epubtxt/a-toy.epub.txt"),
        Omitted(f"{path}/books1/2020-08-27-epub_urls.txt", "not_text"),
    ]


def openwebtext(folder: Path) -> Case:
    digests = [f"{i:032x}" for i in range(3)]
    texts = [f"Page {i} tells of é.\n\nAnd more." * 5 for i in range(3)]
    inner = [lzma.compress(tar({f"{i:07}-{digests[i]}.txt": texts[i].encode() for i in chosen})) for chosen in ((0, 1), (2,))]
    archives = {f"openwebtext/urlsf_subset00-{i}_data.xz": data for i, data in enumerate(inner)}
    path = folder / "openwebtext.tar.xz"
    path.write_bytes(lzma.compress(tar(archives, "openwebtext")))
    where = ["openwebtext/urlsf_subset00-0_data.xz"] * 2 + ["openwebtext/urlsf_subset00-1_data.xz"]
    return OpenWebText(str(folder)), [
        Document(f"{path.name}/{where[i]}/{i:07}-{digests[i]}", texts[i], f"{path}/{where[i]}", {"url_md5": digests[i]}) for i in range(3)
    ]


SUBMISSIONS = [
    {"id": "8a", "title": "A toy", "selftext": "", "url": "http://toy.example", "score": 4, "over_18": False, "is_self": False},
    {"id": "8b", "title": "Why &amp; how?", "selftext": "I ask &lt;you&gt; &amp;lt;", "url": "", "score": 9, "is_self": True},
    {"id": "8c", "title": "Gone", "selftext": "[removed]", "score": 9, "is_self": True},
    {"id": "8d", "title": "Not here", "selftext": "Well.", "score": 9, "over_18": True, "is_self": True},
]
SUBMISSIONS = [
    {"author": "toy_user", "created_utc": 1119552233 + i, "num_comments": 2, "subreddit": "toys", **r} for i, r in enumerate(SUBMISSIONS)
]
COMMENTS = [
    {"id": "c1", "body": "Nice &gt; toy", "score": 2, "created_utc": "1119552300"},
    {"id": "c2", "body": "[deleted]", "score": 1, "created_utc": 1119552301, "author": "[deleted]"},
    {"id": "c3", "body": "Hm.", "score": None, "created_utc": 1119552302},
]
COMMENTS = [{"author": "toy_user", "link_id": "t3_8a", "parent_id": "t3_8a", "subreddit": "toys", **record} for record in COMMENTS]


def at(records: list[dict], number: int) -> int:
    return len(ndjson(*records[:number]))


def reddit(folder: Path) -> Case:
    comments, submissions = folder / "RC_2005-12.zst", folder / "RS_2005-06"
    comments.write_bytes(zstd(ndjson(*COMMENTS)))
    submissions.write_bytes(ndjson(*SUBMISSIONS))
    (folder / "sha256sums.txt").write_bytes(b"no records")

    def rest(record: dict) -> dict:
        gone = ("id", "body", "selftext", "created_utc", "is_self")
        return {name: value for name, value in record.items() if name not in gone and value is not None}

    return Reddit(str(folder)), [
        Document("t1_c1", "Nice > toy", str(comments), rest(COMMENTS[0]), "2005-06-23T18:45:00Z"),
        Omitted(f"{comments}, byte {at(COMMENTS, 1)}", "deleted"),
        Document("t1_c3", "Hm.", str(comments), rest(COMMENTS[2]), "2005-06-23T18:45:02Z"),
        Omitted(f"{submissions}, byte 0", "link"),
        Document("t3_8b", "Why & how?\n\nI ask <you> &lt;", str(submissions), rest(SUBMISSIONS[1]), "2005-06-23T18:43:54Z"),
        Omitted(f"{submissions}, byte {at(SUBMISSIONS, 2)}", "removed"),
        Omitted(f"{submissions}, byte {at(SUBMISSIONS, 3)}", "over_18"),
    ]


CASES: dict[str, Callable[[Path], Case]] = {
    made.__name__: made
    for made in (jsonl, texts, parquet, array_record, gutenberg, pg19, bookcorpus, bookcorpus_tar, books1, openwebtext, reddit)
}
