"""Damage is named where it is, what stands beside it is read, and no bytes whatever hang a reader or make it raise."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_cases import BODY, CASES, SENTENCES, SUBMISSIONS, book, ndjson, tar, zstd
from source_checks import read

from lmx.data import Document
from lmx.data.sources import PG19, ArrayRecord, BookCorpus, Gutenberg, Jsonl, Omitted, OpenWebText, Parquet, Reddit, Texts
from lmx.data.sources.tars import members


def split(source):
    """Documents' texts, and the damage."""
    items = read(source)
    return [i.text for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Omitted) and i.damaged]


LINES = [json.dumps({"text": f"line {i} " + "x" * 50}).encode() + b"\n" for i in range(40)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_cut_file_gives_what_came_before_and_says_so(tmp_path, pack):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(b"".join(LINES))[:-20])
    texts, damage = split(Jsonl(str(path)))
    assert texts == [json.loads(line)["text"] for line in LINES][: len(texts)]
    assert len(damage) == 1
    assert damage[0].where.startswith(str(path))
    assert "byte" in damage[0].where
    if pack is bytes:
        assert len(texts) == 39
        assert damage[0].where == f"{path}, byte {len(b''.join(LINES[:39]))}"


def test_gzip_keeps_the_members_before_the_damaged_one(tmp_path):
    members = [gzip.compress(line) for line in LINES]
    members[30] = members[30][:-8] + b"\0" * 8  # its checksum
    path = tmp_path / "a.json.gz"
    path.write_bytes(b"".join(members))
    texts, damage = split(Jsonl(str(path)))
    assert len(texts) >= 30
    assert [item.reason for item in damage] == [damage[0].reason]
    assert "cannot be read" in damage[0].reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at offset 24"),
        (b'{"text": ', "is not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["a"]', "is list"),
        (b'{"body": "a"}', "has no field 'text', only 'body'; set text"),
        (b'{"text": null}', "has NoneType in its field 'text'"),
        (b'{"text": "a", "note": "\\ud800"}', "holds half a surrogate pair"),
    ],
)
def test_a_damaged_line_costs_that_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"a"}\n\n' + line + b'\n{"text":"\\ud83d\\ude00"}\n')
    texts, damage = split(Jsonl(str(path)))
    assert texts == ["a", "\U0001f600"]
    assert [item.where for item in damage] == [f"{path}, byte 14"]
    assert damage[0].reason.startswith(reason)


def test_parquet_damage_costs_a_row_group(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i} " + "y" * 40 for i in range(12)]})
    pyarrow.parquet.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"row 5") + 4] ^= 1
    path.write_bytes(data)
    texts, damage = split(Parquet(str(path)))
    assert [int(text.split()[1]) for text in texts] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [item.where for item in damage] == [f"{path}, row group 1 from record 4"]
    path.write_bytes(data[:-50])
    assert split(Parquet(str(path)))[0] == []
    assert "is not a whole Parquet file" in split(Parquet(str(path)))[1][0].reason


def test_parquet_text_that_is_not_utf8_costs_a_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    texts, damage = split(Parquet(str(tmp_path)))
    assert texts == ["a", "c"]
    assert damage[0].where.endswith("a.parquet, record 1")


def test_array_record_cut_off(tmp_path):
    source, _ = CASES["array_record"](tmp_path)
    path = tmp_path / "plain.array_record"
    path.write_bytes(path.read_bytes()[:-100])
    texts, damage = split(source)
    assert texts == [f"Record {i}." for i in range(5)]
    assert damage == [Omitted(str(path), damage[0].reason, damaged=True)]
    assert damage[0].reason.startswith("is not a whole ArrayRecord file")


def test_books(tmp_path):
    (tmp_path / "1-0.txt").write_bytes(book(1, "UTF-8").replace(b"caf", b"caf\xff"))
    whole = book(2, "UTF-8")
    (tmp_path / "2-0.txt").write_bytes(whole[: whole.index(b"nobody")])
    texts, damage = split(Gutenberg(str(tmp_path)))
    assert texts == [BODY[: BODY.index("nobody")]]
    assert [item.where for item in damage] == [str(tmp_path / "1-0.txt"), f"{tmp_path / '2-0.txt'}, its end"]
    assert damage[0].reason.startswith("is not UTF-8")
    (tmp_path / "metadata.csv").write_bytes(b"1,\xff,1900,x\n")
    assert {item.where for item in split(PG19(str(tmp_path)))[1]} >= {str(tmp_path / "metadata.csv"), str(tmp_path / "1-0.txt")}


def test_bookcorpus_bad_line_costs_its_run(tmp_path):
    lines = [sentence.encode() for sentence in SENTENCES]
    lines[4] = b"the lamp \xff"
    (tmp_path / "all.txt").write_bytes(b"\n".join(lines))
    texts, damage = split(BookCorpus(str(tmp_path), lines_per_document=3))
    assert texts == ["\n".join(SENTENCES[a:b]) for a, b in ((0, 3), (6, 9), (9, 10))]
    assert damage[0].where == f"{tmp_path / 'all.txt'}, 3 lines from byte {sum(len(line) + 1 for line in lines[:3])}"


def test_archives(tmp_path):
    files = {f"{i:07}-{i:032x}.txt": f"text {i}".encode() for i in range(6)}
    whole = tar(files)
    (tmp_path / "urlsf_subset00-0_data.xz").write_bytes(lzma.compress(whole))
    texts = [f"text {i}" for i in range(6)]
    assert split(OpenWebText(str(tmp_path))) == (texts, [])
    broken = {
        "header": whole[: 1024 * 3 + 20] + b"\xff" + whole[1024 * 3 + 21 :],  # `tarfile` takes that for the end
        "cut in a file": whole[: 1024 * 3 + 514],
        "cut in a header": whole[: 1024 * 3 + 100],
        "cut between": whole[: 1024 * 3],
    }
    for name, data in broken.items():
        (tmp_path / "urlsf_subset00-0_data.xz").write_bytes(lzma.compress(data))
        found, damage = split(OpenWebText(str(tmp_path)))
        assert found == texts[:3], name
        assert damage, name
        assert damage[0].where.startswith(str(tmp_path / "urlsf_subset00-0_data.xz")), name


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.text(st.sampled_from("aé/ b.ü\u4e2d"), min_size=1, max_size=9), min_size=1, max_size=6),
    repeated=st.sampled_from([1, 12, 40]),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 70_000]), min_size=6, max_size=6),
    kinds=st.lists(st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]), min_size=6, max_size=6),
    read=st.integers(0, 600),
)
def test_archives_are_read_as_tarfile_reads_them(names, repeated, layout, sizes, kinds, read):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as archive:
        for name, size, kind in zip(names, sizes, kinds, strict=False):
            entry = tarfile.TarInfo(name.strip("/") * (1 if layout == tarfile.USTAR_FORMAT else repeated) + "x")
            entry.type, entry.linkname, entry.size = kind, "there", size if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(name.encode() * size))
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        expected = [(entry.name, archive.extractfile(entry).read()) for entry in archive if entry.isreg()]
    out.seek(0)
    files = (item for item in members(out, "x") if not isinstance(item, Omitted))
    assert [(name, size, contents.read()) for name, size, contents in files] == [(name, len(data), data) for name, data in expected]
    out.seek(0)
    items = [item if isinstance(item, Omitted) else (item[0], item[2].read(read)) for item in members(out, "x")]
    assert [item for item in items if not isinstance(item, Omitted)] == [(name, data[:read]) for name, data in expected]
    assert [item.reason for item in items if isinstance(item, Omitted)] == ["link"] * kinds[: len(names)].count(tarfile.SYMTYPE)


def test_a_damaged_archive_in_an_archive_costs_itself(tmp_path):
    inner = [lzma.compress(tar({f"{i:07}-{i:032x}.txt": f"text {i}".encode()})) for i in range(3)]
    inner[1] = inner[1][:60]
    (tmp_path / "urlsf_subset00.tar").write_bytes(tar({f"urlsf_subset00-{i}_data.xz": data for i, data in enumerate(inner)}))
    texts, damage = split(OpenWebText(str(tmp_path)))
    assert texts == ["text 0", "text 2"]
    assert len(damage) == 1
    assert "urlsf_subset00-1_data.xz" in damage[0].where


def test_a_tar_with_a_negative_size_ends(tmp_path):
    entry = tarfile.TarInfo("a.txt")
    entry.size = -4096
    header = entry.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(tar({"b.txt": b"b"})[:1024] + header + b"\0" * 1024)
    assert split(BookCorpus(str(tmp_path / "a.tar")))[0] == ["b"]
    assert len(split(BookCorpus(str(tmp_path / "a.tar")))[1]) == 1


def test_reddit_lines(tmp_path):
    odd = [{"id": "1"}, {"title": 3, "selftext": "a"}, ["a"], {"title": "A", "selftext": "b", "score": "many"}]
    path = tmp_path / "RS_2011-01.xz"
    path.write_bytes(lzma.compress(ndjson(SUBMISSIONS[1], *odd) + b"\0\0\0\n" + ndjson(SUBMISSIONS[1])))
    texts, damage = split(Reddit(str(tmp_path), min_score=3))
    assert len(texts) == 2
    assert [item.reason.split(" ")[0] for item in damage] == ["is", "has", "is", "has", "is"]


FUZZED = sorted(CASES)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    found = {}
    for name in FUZZED:
        folder = tmp_path_factory.mktemp(name)
        source, _ = CASES[name](folder)
        found[name] = (folder, source)
    return found


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_bytes_break_a_reader(valid, tmp_path, name, data):
    """Of a valid file: bits flipped, cut off, pieces left out; or bytes that never were one. Read in one unit and in many."""
    folder, source = valid[name]
    changed = tmp_path / "changed"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(folder, changed)
    files = sorted(p for p in changed.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "leave out", "random", "random inside"]))
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, max(0, len(content) * 8 - 1)), min_size=1, max_size=4)):
            if content:
                content[at // 8] ^= 1 << (at % 8)
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content))) :]
    elif kind == "leave out":
        start = data.draw(st.integers(0, len(content)))
        del content[start : start + data.draw(st.integers(1, 100))]
    else:
        start = data.draw(st.integers(0, len(content))) if kind == "random inside" else 0
        content[start:] = data.draw(st.binary(max_size=300))
    path.write_bytes(content)
    moved = type(source)(**{**{f: getattr(source, f) for f in source.__dataclass_fields__}, "path": moved_path(source, folder, changed)})
    for size in (1 << 20, 100):
        for item in read(moved, size):
            assert isinstance(item, Document | Omitted)
            if isinstance(item, Document):
                (item.text + item.id).encode()
                json.dumps(dict(item.metadata))
            else:
                assert item.where.startswith(str(changed))
                assert "\n" not in item.reason
            assert item != Omitted("", "")


def moved_path(source, folder: Path, changed: Path) -> str:
    return str(changed / Path(source.path).relative_to(folder))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=2000), pack=st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]))
def test_packed_noise(tmp_path, content, pack):
    """What unpacks well and is no archive, no lines and no text."""
    for name, make in (
        ("a.tar", BookCorpus),
        ("a_data.xz", OpenWebText),
        ("all.txt", BookCorpus),
        ("a.jsonl", Jsonl),
        ("RC_1", Reddit),
        ("a.txt", Texts),
        ("a.array_record", ArrayRecord),
    ):
        path = tmp_path / name
        path.write_bytes(pack(content))
        for item in read(make(str(path))):
            assert isinstance(item, Document) or item.damaged or item.reason == "not_text"


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12), data=st.data(), end=st.booleans())
def test_lines_of_a_part_are_those_that_begin_in_it(lines, data, end):
    from lmx.data.sources.paths import lines as read

    content = b"\n".join(lines) + b"\n" * end
    start = data.draw(st.integers(0, len(content) + 2))
    starts, at = [], 0
    for line in content.split(b"\n"):
        starts.append((at, line))
        at += len(line) + 1
    if not starts[-1][1]:
        starts.pop()
    first = list(read(io.BufferedReader(io.BytesIO(content)), "x", 0, start))
    second = list(read(io.BufferedReader(io.BytesIO(content)), "x", start))
    assert first == [line for line in starts if line[0] < start]
    assert second == [line for line in starts if line[0] >= start]
