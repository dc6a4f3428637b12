"""Shards are read where they lie, and hold what a plain store of the same documents holds."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lmx.data.curate.records import Record
from lmx.data.documents import Document
from lmx.data.pipeline import Batches, batch_hash
from lmx.data.shards import BLOCK, is_shards, open_shards, write_manifest, write_shard
from lmx.data.store import build_store
from lmx.data.tokenizers import ByteTokenizer

LENGTHS = [[5, BLOCK - 7, 1, 3 * BLOCK + 11], [], [0, 40], [BLOCK - 1, BLOCK, 9]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same documents as shards (one of them empty) and as a store."""
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    documents = [
        [Document(f"{s}-{n}", "".join(map(chr, draw.integers(97, 123, size))), "here", {"n": n}) for n, size in enumerate(sizes)]
        for s, sizes in enumerate(LENGTHS)
    ]
    for number, shard in enumerate(documents):
        write_shard((Record(d, ({"step": "x"},)) for d in shard), ByteTokenizer(), folder / "shards", number, corpus="test")
    write_manifest(folder / "shards", range(len(documents)), ByteTokenizer(), {"recipe": "none"})
    store = build_store([d for shard in documents for d in shard], ByteTokenizer(), folder / "store")
    return open_shards(folder / "shards", hashes=True), store, [d for shard in documents for d in shard]


def test_tokens(both):
    shards, store, documents = both
    assert len(shards) == len(store) == len(documents)
    np.testing.assert_array_equal(shards.offsets, store.offsets)
    np.testing.assert_array_equal(shards.document_bytes, store.document_bytes)
    np.testing.assert_array_equal(shards.tokens[:], store.tokens)
    draw = np.random.default_rng(1)
    for shape in ((0,), (1,), (300,), (2, 50)):
        at = draw.integers(0, len(store.tokens), shape)
        np.testing.assert_array_equal(shards.tokens[at], store.tokens[at])
    for number in range(len(documents)):
        np.testing.assert_array_equal(shards.document(number), store.document(number))
    for start, stop in [
        (0, 0),
        (7, 3),
        (BLOCK, BLOCK),
        (BLOCK - 1, BLOCK + 1),
        (-5, None),
        *draw.integers(0, len(store.tokens), (40, 2)).tolist(),
    ]:
        np.testing.assert_array_equal(shards.tokens[start:stop], store.tokens[start:stop])
        np.testing.assert_array_equal(shards.tokens[start:stop:-3], store.tokens[start:stop:-3])
    with pytest.raises(IndexError):
        shards.tokens[[len(store.tokens)]]
    with pytest.raises(IndexError):
        shards.tokens[[-1]]


def test_documents(both):
    shards, _, documents = both
    for number, document in enumerate(documents):
        about = shards.about[number]
        assert (about["id"], about["bytes"], about["metadata"]) == (document.id, len(document.text), {"n": int(document.id[2:])})
        assert (about["decisions"], about["corpus"], shards.document_id(number)) == ([{"step": "x"}], "test", document.id)
    with pytest.raises(IndexError):
        shards.about[len(documents)]


@pytest.mark.parametrize("packing", ["concatenate", "first_fit", "stream"])
def test_batches_are_those_of_a_store(both, packing):
    shards, store, _ = both
    same = {"rows": 3, "length": 500, "seed": 1, "packing": packing}
    a, b = Batches(shards, **same), Batches(store, **same)
    assert [batch_hash(a[k]) for k in range(12)] == [batch_hash(b[k]) for k in range(12)]


def test_threads_and_processes_share_them(both):
    shards, store, _ = both
    draw = np.random.default_rng(2)
    places = [draw.integers(0, len(store.tokens), 200) for _ in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for at, tokens in zip(places, pool.map(lambda at: shards.tokens[at], places), strict=True):
            np.testing.assert_array_equal(tokens, store.tokens[at])
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy.tokens[places[0]], store.tokens[places[0]])
    assert copy.about[3]["id"] == shards.about[3]["id"]


def test_damage_is_named(both, tmp_path):
    assert not is_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        open_shards(tmp_path)
    source = both[0].directory
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = tmp_path / "tokens-000003.array_record"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens-000003\.array_record is not what was written"):
        open_shards(tmp_path, hashes=True)
    victim.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"tokens-000003\.array_record is not what was written"):
        open_shards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        open_shards(tmp_path)
