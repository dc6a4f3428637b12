"""Sources: what is read, in which order, and the one line that says what is wrong."""

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from lmx.data import Document, documents, source_hash

REPOSITORY = Path(__file__).parents[2]


def read(source, **options):
    return list(documents(str(source), **options))


def texts(source, **options):
    return [document.text for document in read(source, **options)]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_text_files_keep_every_character(tmp_path):
    text = "\ufeffone\r\ntwo \u2581 \u00a0 three\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [Document("a", text, str(tmp_path / "a.txt"))]


def test_folder_is_read_sorted_and_below(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "b/a.md", "b/c.txt.gz", ".hidden/x.txt", "picture.png"):
        data = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [(d.id, d.text) for d in read(tmp_path)] == [("b/a", "b/a.md"), ("b/c", "b/c.txt.gz"), ("z", "z.txt")]


def test_glob(tmp_path):
    for name in ("2.txt", "1.txt", "3.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["1.txt", "2.txt"]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_json_lines(tmp_path, suffix, pack):
    lines = [{"text": "one\ntwo", "id": "x", "year": 1600}, {"text": "zwei \u00fc"}]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n"))
    assert read(path) == [
        Document("x", "one\ntwo", str(path), {"year": 1600}),
        Document(f"a.jsonl{suffix}:2", "zwei \u00fc", str(path)),
    ]


def test_json_list_and_object(tmp_path):
    (tmp_path / "list.json").write_text('[{"body": "a"}, {"body": "b"}]')
    (tmp_path / "one.json").write_text('{"body": "c"}')
    assert texts(tmp_path, field="body") == ["a", "b", "c"]


def test_zstd(tmp_path):
    zstd = pytest.importorskip(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", reason="the zstd extra is not installed"
    )
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"hello" * 1000))
    assert texts(tmp_path / "a.txt.zst") == ["hello" * 1000]
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"hello" * 1000)[:-3])
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "a.txt.zst")


def test_zstd_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match=r"a.txt.zst needs .* pip install 'lmx\[zstd\]'"):
        read(tmp_path / "a.txt.zst")


def write_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record(tmp_path):
    plain = [f"text {i} \u00e9" for i in range(600)]
    write_records(tmp_path / "plain.array_record", [text.encode() for text in plain])
    write_records(tmp_path / "objects.array_record", [json.dumps({"text": t, "id": t[:7]}).encode() for t in plain[:3]])
    assert texts(tmp_path / "plain.array_record") == plain
    assert [d.id for d in read(tmp_path / "plain.array_record")][-1] == "plain.array_record:599"
    assert [(d.id, d.text) for d in read(tmp_path / "objects.array_record")] == [(t[:7], t) for t in plain[:3]]


def test_array_record_cut_off(tmp_path):
    path = tmp_path / "a.array_record"
    write_records(path, [b"hello" * 100] * 100)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole ArrayRecord") as error:
        read(path, name="data.train")
    assert one_line(error).startswith(f"data.train: {path}")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Verses(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"verse": tfds.features.Text(), "number": np.int64})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"verse": f"verse {i} \u00fc", "number": i}

    builder = Verses(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds(tfds_directory):
    found = read(f"tfds:{tfds_directory}", field="verse")
    assert sorted(d.text for d in found) == [f"verse {i} \u00fc" for i in range(5)]
    assert len({d.id for d in found}) == 5
    assert all(d.metadata["number"] == int(d.text.split()[1]) for d in found)
    assert len(read(f"tfds:{tfds_directory}:test", field="verse")) == 2
    assert len(read(f"tfds:{tfds_directory}:train[1:4]", field="verse")) == 3
    assert source_hash(f"tfds:{tfds_directory}:test") != source_hash(f"tfds:{tfds_directory}")
    assert "tensorflow" not in sys.modules


def test_tfds_errors(tfds_directory):
    with pytest.raises(ValueError, match=r"no split 'dev' to read .* it has test, train|it has train, test") as error:
        read(f"tfds:{tfds_directory}:dev", name="data.train")
    one_line(error)
    with pytest.raises(ValueError, match=r"has no field 'text', only .*set data.field"):
        read(f"tfds:{tfds_directory}")
    with pytest.raises(ValueError, match=r"data.train='tfds:no_such_set': TFDS cannot open it") as error:
        read("tfds:no_such_set", name="data.train")
    one_line(error)


@pytest.mark.parametrize(
    ("files", "source", "kind", "message"),
    [
        ({}, "x.txt", FileNotFoundError, r"data.train='.*x.txt' does not exist; give a file, a folder, a glob"),
        ({}, "*.txt", FileNotFoundError, r"data.train='.*\*.txt' matches no file; check the pattern"),
        ({"a.png": b""}, "", FileNotFoundError, r"is a folder without a file to read \(it holds .png\); expected .txt"),
        ({"a.arrow": b""}, "a.arrow", ValueError, r"a.arrow is of an unknown kind '.arrow'; expected .txt, .md, .jsonl"),
        ({"a.array_record.gz": b""}, "a.array_record.gz", ValueError, r"unknown kind '.array_record.gz'"),
        ({"a.txt": b"good \xff bad"}, "a.txt", ValueError, r"a.txt is not UTF-8: byte 0xff at offset 5; convert it"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": "\xfe"}'}, "a.jsonl", ValueError, r"a.jsonl, line 2 is not UTF-8: byte 0xfe at offset 24"),
        (
            {"a.jsonl": b'{"text": "a"}\n\n{"body": "b"}'},
            "a.jsonl",
            ValueError,
            r"a.jsonl, line 3 has no field 'text', only 'body'; set data.field",
        ),
        ({"a.jsonl": b'{"text": 3}'}, "a.jsonl", ValueError, r"a.jsonl, line 1 has int in its field 'text', expected text"),
        ({"a.jsonl": b'"text"'}, "a.jsonl", ValueError, r"a.jsonl, line 1 is str 'text', expected an object"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": '}, "a.jsonl", ValueError, r"a.jsonl, line 2 is not JSON \(.*\): '\{\"text\":'"),
        ({"a.jsonl": b'{"text": "\\ud800"}'}, "a.jsonl", ValueError, r"document 'a.jsonl:1' of .* half a surrogate pair at character 0"),
        ({"a.jsonl.gz": gzip.compress(b'{"text": "a"}' * 99)[:-9]}, "a.jsonl.gz", ValueError, r"a.jsonl.gz is damaged"),
        ({"a.txt.xz": lzma.compress(b"a" * 99)[:-9]}, "a.txt.xz", ValueError, r"a.txt.xz is damaged"),
        ({"a.txt.gz": b"\x1f\x8bplain text"}, "a.txt.gz", ValueError, r"a.txt.gz is damaged"),
        ({"a.txt.bz2": b"BZhplain text"}, "a.txt.bz2", ValueError, r"a.txt.bz2 cannot be read \(Invalid data stream\)"),
        ({"a.txt": b""}, "a.txt", ValueError, r"data.train='.*a.txt' holds no text"),
        ({"a.jsonl": b"\n"}, "a.jsonl", ValueError, r"holds no text: every document is empty, or there is none"),
        ({"a.array_record": b"no records" * 10}, "a.array_record", ValueError, r"a.array_record is not a whole ArrayRecord file"),
    ],
)
def test_errors(tmp_path, files, source, kind, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=message) as error:
        read(tmp_path / source, name="data.train")
    assert one_line(error).startswith("data.train")


def test_no_source_is_an_error():
    with pytest.raises(ValueError, match=r"data.train='' names nothing"):
        documents("", name="data.train")


def test_errors_of_the_path_come_before_the_first_document(tmp_path):
    with pytest.raises(FileNotFoundError):
        documents(str(tmp_path / "x.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "a.txt")


def test_source_hash_is_of_contents_and_names_not_of_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("a")
    assert source_hash(str(tmp_path / "here")) == source_hash(str(tmp_path / "there"))
    (tmp_path / "here" / "a.txt").write_text("b")
    assert source_hash(str(tmp_path / "here")) != source_hash(str(tmp_path / "there"))
    (tmp_path / "here" / "a.txt").rename(tmp_path / "here" / "c.txt")
    (tmp_path / "there" / "a.txt").write_text("b")
    assert source_hash(str(tmp_path / "here")) != source_hash(str(tmp_path / "there"))


def test_shakespeare():
    plays = {split: read(REPOSITORY / "experiments/data/shakespeare" / f"{split}.jsonl.xz") for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in plays.items()} == {"train": 34, "validation": 2, "test": 2}
    everything = [play for found in plays.values() for play in found]
    assert len({play.id for play in everything}) == 38
    for play in everything:
        assert play.text.isascii()
        assert not set(play.text) & set("*_\\#$<>\t\r")
        assert play.text.count("[") == play.text.count("]")
        assert "\n\nACT I\n" in play.text
        assert "  " not in play.text
        assert " \n" not in play.text
        assert "\n\n\n" not in play.text
    hamlet = next(play.text for play in everything if play.id == "hamlet")
    assert hamlet.startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n[FRANCISCO at his post.")
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in hamlet
