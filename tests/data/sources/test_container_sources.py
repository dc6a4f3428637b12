"""Containers: fields and times, Parquet in `documents`, TFDS in ranges, and that they agree with `documents`."""

import datetime
import decimal
import json

import numpy as np
import pytest
from source_cases import CASES
from source_checks import read

from lmx.data import Document, documents
from lmx.data.sources import Jsonl, Omitted, Parquet, Tfds, stream
from lmx.data.sources.records import iso, plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1119552233, "2005-06-23T18:43:53Z"),
        ("1119552233", "2005-06-23T18:43:53Z"),
        (1.5, "1970-01-01T00:00:01.500000Z"),
        ("2019-04-25T12:57:54Z", "2019-04-25T12:57:54Z"),
        ("2019-04-25 12:57:54", "2019-04-25T12:57:54Z"),
        ("2019-04-25T12:57:54+02:00", "2019-04-25T10:57:54Z"),
        ("2019-04-25", "2019-04-25"),
        ("1907", "1907"),
        (datetime.date(2019, 4, 25), "2019-04-25"),
        (datetime.datetime(2019, 4, 25, 1), "2019-04-25T01:00:00Z"),
        *((none, "") for none in ("", "yesterday", None, True, 1e30, float("nan"), [], "9" * 400, "2019-99-99")),
    ],
)
def test_times(value, expected):
    assert iso(value) == expected


def test_plain_values():
    value = {"a": np.int64(3), "b": np.array([1.5, 2]), "c": b"x", "d": decimal.Decimal("1.10"), "e": (datetime.date(2020, 1, 2), None)}
    assert plain(value) == {"a": 3, "b": [1.5, 2.0], "c": "x", "d": "1.10", "e": ["2020-01-02", None]}
    json.dumps(plain(value))
    for bad in (b"\xff", object()):
        with pytest.raises(ValueError, match=r"is not UTF-8|holds object"):
            plain(bad)


def test_named_fields(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_text('{"content": "x", "key": 7, "id": "other", "seen": "1999", "created": "2000"}\n')
    source = Jsonl(str(path), text="content", id="key", created=("seen",), name="toy")
    assert read(source) == [Document("7", "x", str(path), {"id": "other", "created": "2000"}, "1999")]
    assert source.name == "toy"


def test_jsonl_agrees_with_documents(tmp_path):
    records = [{"text": f"text {i} é", "n": i} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records[::-1])) + "\n")
    expected = [(d.text, d.source, d.metadata) for d in documents(str(tmp_path))]
    for size in (10, 100, 10_000):
        assert [(d.text, d.source, d.metadata) for d in read(Jsonl(str(tmp_path)), size)] == expected


def test_a_folder_names_what_it_holds_instead(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(FileNotFoundError, match=r"jsonl=.* is a folder without a file to read \(it holds .pdf\); expected .jsonl"):
        Jsonl(str(tmp_path)).units()


def test_parquet_in_documents(tmp_path):
    _, expected = CASES["parquet"](tmp_path)
    found = list(documents(str(tmp_path)))
    assert [(d.id, d.text) for d in found] == [(d.id, d.text) for d in expected]
    with pytest.raises(ValueError, match=r"data.train: .*part-0.parquet, record 0 has no field 'body', only 'id', .*; set data.field"):
        list(documents(str(tmp_path), field="body", name="data.train"))
    path = tmp_path / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"data.train: .*part-0.parquet is not a whole Parquet file"):
        list(documents(str(tmp_path), name="data.train"))


def test_parquet_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"text": ["a", "b"], "image": [b"\xff", b"ok"], "score": pyarrow.array([decimal.Decimal("1.5"), None])}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    bad, good = read(Parquet(str(tmp_path)))
    assert isinstance(bad, Omitted)
    assert bad.damaged
    assert good.metadata == {"image": "ok", "score": None}
    assert [d.metadata for d in read(Parquet(str(tmp_path), columns=("text", "score")))] == [{"score": "1.5"}, {"score": None}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Toys(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(9), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"toy {i} ü", "number": i}

    builder = Toys(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_tfds(prepared):
    source = Tfds(prepared)
    found = read(source)
    assert [(d.id, d.text) for d in found] == [(d.id, d.text) for d in documents(f"tfds:{prepared}")]
    assert sorted((d.text, d.metadata["number"]) for d in found) == [(f"toy {i} ü", i) for i in range(9)]
    assert found[0].id == "toys/train:0"
    json.dumps(dict(found[0].metadata))
    assert len(source.units(1)) == 9
    assert read(source, 1) == found
    shards = [item for i in range(2) for _, item in stream(source, shard=(i, 2), size=1)]
    assert sorted(d.id for d in shards) == sorted(d.id for d in found)
    assert len(read(Tfds(f"{prepared}:test[:1]"))) == 1
    with pytest.raises(ValueError, match="no split 'dev' to read"):
        Tfds(f"{prepared}:dev").units()
    (unit, *_) = source.units()
    (gone,) = Tfds(f"{prepared}:dev").read(unit)
    assert gone.damaged
