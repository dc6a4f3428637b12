"""What holds of every source: exact documents, the same for units of any size, pickled, shared out and resumed."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_cases import CASES
from source_checks import read

from lmx.data.sources import Omitted, stream


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


def test_exact_documents(case):
    source, expected = case
    assert read(source) == expected
    documents = [item for item in expected if not isinstance(item, Omitted)]
    assert len({document.id for document in documents}) == len(documents)
    for document in documents:
        json.dumps(dict(document.metadata))


@pytest.mark.parametrize("size", [1, 7, 50, 150, 400, 1000, 5000])
def test_units_of_any_size_give_the_same(case, size):
    source, expected = case
    units = source.units(size)
    assert len({unit.name for unit in units}) == len(units)
    assert read(pickle.loads(pickle.dumps(source)), size) == expected


def test_what_can_be_cut_is_cut(tmp_path):
    counts = {}
    for name in ("jsonl", "parquet", "array_record", "bookcorpus", "reddit"):
        (tmp_path / name).mkdir()
        source, _ = CASES[name](tmp_path / name)
        counts[name] = [len(source.units(size)) for size in (1 << 20, 100)]
    assert counts["parquet"] == [1, 4]
    assert all(many > 2 and one == 1 for one, many in counts.values()), counts


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 5), st.data())
def test_shards_and_resumption(case, size, shards, data):
    source, expected = case
    read = [list(stream(source, shard=(i, shards), size=size)) for i in range(shards)]
    order = {unit.name: number for number, unit in enumerate(source.units(size))}
    joined = sorted((item for shard in read for item in shard), key=lambda item: (order[item[0][0]], item[0][1]))
    assert [item for _, item in joined] == expected
    shard = data.draw(st.integers(0, shards - 1))
    if read[shard]:
        last = data.draw(st.integers(0, len(read[shard]) - 1))
        position = json.loads(json.dumps(read[shard][last][0]))
        assert list(stream(source, shard=(shard, shards), start=position, size=size)) == read[shard][last + 1 :]


def test_stream_refuses_what_is_not_there(case):
    source, _ = case
    with pytest.raises(ValueError, match=r"shard=\(2, 2\), expected \(i, n\)"):
        stream(source, shard=(2, 2))
    with pytest.raises(ValueError, match=r"start=\('x', 3\) is no position of shard 0 of 1 of .*: it has no unit 'x'"):
        stream(source, start=("x", 3))
    with pytest.raises(ValueError, match=r"size=0 bytes of a unit, expected at least 1"):
        source.units(0)


def test_nothing_there(case, tmp_path):
    source, _ = case
    for path in ("absent", ""):
        with pytest.raises((FileNotFoundError, ValueError), match=rf"^{source.name}"):
            type(source)(str(tmp_path / path)).units()


def test_a_file_that_went_is_damage(case):
    source, _ = case
    units = source.units()
    gone = type(units[0])(units[0].name, tuple(path + ".gone" for path in units[0].paths))
    found = list(source.read(gone))
    assert found
    assert all(isinstance(item, Omitted) and item.damaged and item.where.endswith(".gone") for item in found)
