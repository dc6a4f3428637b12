"""Web archives: pages and their text, and what a damaged record costs."""

import gzip
import io
import lzma
import re
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_cases import zstd
from source_checks import damage, documents, omitted, read, same_in_units_of, survives, wrecks

from lmx.data import Document
from lmx.data.sources import Omitted, Warc, Wet

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def record(kind, block, **headers):
    lines = {"WARC-Type": kind, "WARC-Date": "2024-01-02T03:04:05Z", "Content-Length": len(block), **headers}
    head = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in lines.items())
    return f"WARC/1.0\r\n{head}\r\n".encode() + block + b"\r\n\r\n"


def conversion(number, text, **headers):
    return record("conversion", text.encode(), WARC_Target_URI=f"http://toy.example/{number}", Content_Type="text/plain", **headers)


def wet_records():
    return [
        record("warcinfo", b"Software-Info: none\r\n"),
        conversion(1, "Hello é\nworld", WARC_Identified_Content_Language="eng,deu", WARC_Block_Digest="sha1:A"),
        conversion(2, "This page quotes\r\n\r\nWARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 3\r\n\r\nabc\r\n\r\nand goes on."),
        conversion(3, "Guten Tag", WARC_Identified_Content_Language="deu"),
        conversion(4, "   \n"),
    ]


def wet_documents(path, offsets):
    url = "http://toy.example/"
    return [
        Omitted(f"{path}, byte {offsets[0]}", "record_type"),
        Document(
            f"{path.name}@{offsets[1]}",
            "Hello é\nworld",
            str(path),
            {"url": url + "1", "digest": "sha1:A", "offset": offsets[1], "languages": ["eng", "deu"]},
            "2024-01-02T03:04:05Z",
        ),
        Document(
            f"{path.name}@{offsets[2]}",
            "This page quotes\r\n\r\nWARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 3\r\n\r\nabc\r\n\r\nand goes on.",
            str(path),
            {"url": url + "2", "offset": offsets[2]},
            "2024-01-02T03:04:05Z",
        ),
        Document(
            f"{path.name}@{offsets[3]}",
            "Guten Tag",
            str(path),
            {"url": url + "3", "offset": offsets[3], "languages": ["deu"]},
            "2024-01-02T03:04:05Z",
        ),
        Omitted(f"{path}, byte {offsets[4]}", "empty"),
    ]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd), ("", bytes)])
def test_wet(tmp_path, suffix, pack):
    members = [pack(part) for part in wet_records()]
    path = tmp_path / f"CC-MAIN-1.warc.wet{suffix}"
    path.write_bytes(b"".join(members))
    offsets = [sum(map(len, members[:n])) for n in range(5)]
    assert same_in_units_of(Wet(str(tmp_path)), (1, 7, 100, 500)) == wet_documents(path, offsets)
    assert read(Wet(str(path))) == read(Wet(str(tmp_path)))
    assert len(Wet(str(path)).units(100)) == (1 if not suffix else -(-path.stat().st_size // 100))


def test_all_records_in_one_member(tmp_path):
    (tmp_path / "a.wet.gz").write_bytes(gzip.compress(b"".join(wet_records())))
    found = same_in_units_of(Wet(str(tmp_path)), (1, 100))
    assert [d.text for d in documents(found)] == [d.text for d in documents(wet_documents(tmp_path / "a.wet.gz", range(5)))]
    start = len(wet_records()[0])
    assert (found[0].where, found[1].id) == (f"{tmp_path}/a.wet.gz, byte 0", f"a.wet.gz@0+{start}")


def test_languages_and_length(tmp_path):
    (tmp_path / "a.wet").write_bytes(b"".join(wet_records()))
    assert [d.metadata["url"][-1] for d in documents(read(Wet(str(tmp_path), languages=("eng",))))] == ["1", "2"]
    assert [d.metadata["url"][-1] for d in documents(read(Wet(str(tmp_path), longest=20)))] == ["1", "3"]
    assert [reason for _, reason in omitted(read(Wet(str(tmp_path), languages=("eng",), longest=20)))] == [
        "record_type",
        "too_long",
        "language",
        "empty",
    ]


def page(text, head=""):
    """HTML long enough to be a page's main text."""
    return f"<!DOCTYPE html><html{head}><head><title>Toys</title></head><body><main><p>{text}</p></main></body></html>"


def response(body, content_type="text/html; charset=utf-8", status="200 OK", http="", **headers):
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\n" + (f"Content-Type: {content_type}\r\n" if content_type else "") + http + "\r\n"
    return record("response", head.encode() + body, Content_Type="application/http; msgtype=response", **headers)


def read_page(tmp_path, *records, **options):
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    return read(Warc(str(tmp_path), extractor="resiliparse", **options))


def test_pages(tmp_path):
    body = page("The toy is <b>new</b>.", ' lang="en-GB"')
    found = read_page(tmp_path, record("request", b"GET /\r\n\r\n"), response(body, WARC_Target_URI="<http://toy.example/>"))
    offset = len(gzip.compress(record("request", b"GET /\r\n\r\n")))
    assert found == [
        Omitted(f"{tmp_path}/a.warc.gz, byte 0", "record_type"),
        Document(
            f"a.warc.gz@{offset}",
            "The toy is new.",
            str(tmp_path / "a.warc.gz"),
            {"url": "http://toy.example/", "offset": offset, "charset": "utf-8", "languages": ["en"]},
            "2024-01-02T03:04:05Z",
        ),
    ]


def test_trafilatura(tmp_path):
    pytest.importorskip("trafilatura", reason="not installed, or not whole", exc_type=ImportError)
    text = "The shop of toys opened its doors on a cold day, and the whole street came to look at what was in its windows. " * 3
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(response(page(text))))
    twice = read(Warc(str(tmp_path))) + read(Warc(str(tmp_path)))
    assert [d.text for d in documents(twice)] == [text.strip()] * 2  # no memory of pages seen


@pytest.mark.parametrize(
    ("charset", "content_type", "head", "found"),
    [
        ("utf-8", "text/html; charset=UTF-8", "", "utf-8"),
        ("cp1252", 'text/html; charset="iso-8859-1"', "", "cp1252"),
        ("koi8-r", "text/html", '<meta charset="koi8-r">', "koi8-r"),
        ("shift_jis", "text/html", '<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">', "shift_jis"),
        ("utf-8", "text/html", "", "utf-8"),
        ("utf-16", "text/html; charset=utf-8", "", "utf-16-le"),
        ("cp1251", "text/html; charset=utf-8", "", "cp1251"),  # the server is wrong: detected
        ("utf-8", "text/html; charset=no-such", "", "utf-8"),
    ],
)
def test_charsets(tmp_path, charset, content_type, head, found):
    words = {"koi8-r": "Игрушка упала", "shift_jis": "おもちゃが落ちた", "cp1251": "Игрушка упала на пол и разбилась вдребезги. " * 5}
    text = words.get(charset, "Le jouet est tombé").strip()
    body = page(text).replace("<title>", head + "<title>").encode(charset)
    (document,) = documents(read_page(tmp_path, response(body, content_type)))
    assert (document.text, document.metadata["charset"]) == (text, found)


def chunked(body):
    return b"".join(b"%x;x=1\r\n%s\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50)) + b"0\r\n\r\n"


def raw_deflate(body):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("encode", "http"),
    [
        (chunked, "Transfer-Encoding: chunked\r\n"),
        (bytes, "Transfer-Encoding: chunked\r\nContent-Encoding: br\r\n"),  # the archive has decoded it
        (gzip.compress, "Content-Encoding: gzip\r\n"),
        (bytes, "Content-Encoding: gzip\r\n"),
        (zlib.compress, "Content-Encoding: deflate\r\n"),
        (raw_deflate, "Content-Encoding: deflate\r\n"),
        (bytes, "Content-Encoding: deflate\r\n"),
        (zstd, "Content-Encoding: zstd\r\n"),
        (lambda body: chunked(gzip.compress(body)), "content-encoding: GZIP\r\nX-Long: a\r\n b\r\ntransfer-encoding: chunked\r\n"),
    ],
)
def test_encodings(tmp_path, encode, http):
    (document,) = documents(read_page(tmp_path, response(encode(page("The toy fell down.").encode()), http=http)))
    assert document.text == "The toy fell down."


def test_rules(tmp_path):
    body = page("The toy fell down.")
    packed = gzip.compress(body.encode() * 100)
    found = read_page(
        tmp_path,
        response(body, status="404 Not Found"),
        response(body, "application/pdf"),
        response(body, "text/plain", WARC_Identified_Payload_Type="text/html"),
        response(body, ""),
        response(b"\x89PNG", ""),
        response(page("x", ' lang="de"')),
        response(page("x"), http="Content-Language: fr-CA, en\r\n"),
        response(b"\x0b\x02\x80\x00", http="Content-Encoding: br\r\n"),
        response("<html><body></body></html>"),
        response(packed, http="Content-Encoding: gzip\r\n"),
        response(page("The toy fell down." * 1000)),
        response(packed[:-9], http="Content-Encoding: gzip\r\n"),
        response(b"5\r\n<p>ab\r\nffff\r\nab", http="Transfer-Encoding: chunked\r\n"),
        record("response", b"220 ftp.example ready\r\n"),
        languages=("en",),
        longest=9000,
    )
    assert [item.text if isinstance(item, Document) else item.reason for item in found] == [
        "status",
        "mime",
        "The toy fell down.",
        "The toy fell down.",
        "mime",
        "language",
        "language",
        "content_encoding",
        "empty",
        "too_long",
        "too_long",
        "too_long",
        "breaks off inside a chunk",
        "is no HTTP response",
    ]
    assert [reason for _, reason in damage(found)] == [item.reason for item in found[-2:]]


def wet_file(pack=gzip.compress, count=6):
    return [pack(conversion(number, f"Page {number} " + "of toys " * number)) for number in range(count)]


def kept(tmp_path, data, name="a.wet.gz"):
    (tmp_path / name).write_bytes(data)
    found = survives(Wet(str(tmp_path / name)), (1, 50, 300, 1000))
    return [int(d.text.split()[1]) for d in documents(found)], damage(found)


def test_a_damaged_member_costs_one_record(tmp_path):
    members = wet_file()
    third = sum(map(len, members[:3]))
    flipped = bytearray(members[3])
    flipped[-6] ^= 1  # its checksum: the text looks whole
    for bad in (
        bytes(flipped),
        b"\0" * len(members[3]),
        members[3][:-20],
        gzip.compress(b"not a record"),
        b"\x1f\x8b\x08\x00" + b"\xff" * 90,
    ):
        found, problems = kept(tmp_path, b"".join([*members[:3], bad, *members[4:]]))
        assert found == [0, 1, 2, 4, 5]
        assert [where for where, _ in problems] == [f"a.wet.gz, byte {third}"]
    found, problems = kept(tmp_path, b"".join(members)[:-10])
    assert found == [0, 1, 2, 3, 4]
    assert problems == [(f"a.wet.gz, byte {sum(map(len, members[:5]))}", "cannot be read (it is cut off)")]
    assert kept(tmp_path, b"") == ([], [("a.wet.gz", "is empty")])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b"Content-Length: many", "has Content-Length 'many', expected a number of bytes"),
        (b"Content-Length: -3", "has Content-Length '-3', expected a number of bytes"),
        (b"Content-Length: 100000000000", r"cannot be read \(it ends \d+ bytes before its record does\)"),
        (b"X: 3", "has Content-Length '', expected a number of bytes"),
    ],
)
def test_a_wrong_length_costs_one_record(tmp_path, wrong, said):
    bad = re.sub(rb"Content-Length: \d+", wrong, conversion(3, "Page 3"))
    members = wet_file()
    found, problems = kept(tmp_path, b"".join([*members[:3], gzip.compress(bad), *members[4:]]))
    assert found == [0, 1, 2, 4, 5]
    assert [bool(re.fullmatch(said, reason)) for _, reason in problems] == [True]
    found, problems = kept(
        tmp_path, b"".join(map(gzip.decompress, members[:3])) + bad + b"".join(map(gzip.decompress, members[4:])), "a.wet"
    )
    assert found == ([0, 1, 2] if b"1000" in wrong else [0, 1, 2, 4, 5])
    assert len(problems) == 1


def test_what_is_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wet='.*' is a folder without a file to read \(it holds nothing\); expected .warc"):
        Wet(str(tmp_path)).units()
    with pytest.raises(ValueError, match="extractor='lynx' is not known; use 'trafilatura' or 'resiliparse'"):
        Warc(str(tmp_path), extractor="lynx")
    (tmp_path / "a.warc").write_bytes(b"text\n" * 10)
    assert damage(read(Wet(str(tmp_path)))) == [("a.warc, byte 0", "does not begin with WARC/1.")]


def test_as_warcio_reads(tmp_path):
    warcio = pytest.importorskip("warcio", reason="the data extra is not installed")
    from warcio.archiveiterator import ArchiveIterator
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    path = tmp_path / "a.warc.gz"
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(20):
            head = StatusAndHeaders("200 OK", [("Content-Type", "text/html"), ("X-Number", str(number))], protocol="HTTP/1.1")
            body = page(f"Toy number {number} fell down.").encode()
            writer.write_record(
                writer.create_warc_record(f"http://toy.example/{number}", "response", payload=io.BytesIO(body), http_headers=head)
            )
    found = read(Warc(str(path), extractor="resiliparse"))
    with path.open("rb") as file:
        iterator = ArchiveIterator(file)
        for document, theirs in zip(found, iterator, strict=True):
            assert document.text in theirs.content_stream().read().decode()
            headers = theirs.rec_headers
            assert document.metadata["url"] == headers["WARC-Target-URI"]
            assert f"<{document.metadata['record_id']}>" == headers["WARC-Record-ID"]
            assert document.metadata["digest"] == headers["WARC-Payload-Digest"]
            assert document.metadata["offset"] == iterator.get_record_offset()
            assert document.created == headers["WARC-Date"]
    assert warcio


WET = b"".join(wet_file()) + gzip.compress(wet_records()[1] + wet_records()[2])
WARC = [
    response(page("The toy fell down.")),
    response(chunked(gzip.compress(page("Le jouet").encode("cp1252"))), http="Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n"),
]


@FUZZ
@given(st.one_of(wrecks(WET), wrecks(b"".join(wet_records()))), st.integers(1, 400))
def test_any_bytes_as_wet(tmp_path, data, size):
    (tmp_path / "a.wet.gz").write_bytes(data)
    survives(Wet(str(tmp_path)), (size,))


@FUZZ
@given(st.one_of(wrecks(WARC[0]), wrecks(WARC[1]), wrecks(b"".join(map(gzip.compress, WARC)))), st.integers(1, 400))
def test_any_bytes_as_warc(tmp_path, data, size):
    (tmp_path / "a.warc").write_bytes(data)
    survives(Warc(str(tmp_path), extractor="resiliparse"), (size,))


@FUZZ
@given(st.data())
def test_any_bytes_as_frames_of_zstd(tmp_path, data):
    whole = b"".join(wet_file(zstd))
    (tmp_path / "a.warc.zst").write_bytes(data.draw(wrecks(whole)))
    survives(Wet(str(tmp_path)), (data.draw(st.integers(1, 400)),))
