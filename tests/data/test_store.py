"""The token store: what goes in comes out, it is whole or an error, and it is found again by its contents."""

import json

import numpy as np
import pytest

from lmx.data import ByteTokenizer, Document, build_store, cached_store, open_store

TEXTS = ["Hamlet \u00fc\n", "", "a", "to be " * 300]


class Wide(ByteTokenizer):
    """Bytes with ids that need 32 bits and no end of text."""

    vocab, eos_id = 1 << 17, None
    fingerprint = "wide"

    def encode_batch(self, texts):
        return [[byte + 100_000 for byte in text.encode()] for text in texts]


def corpus(texts=TEXTS):
    return [Document(f"doc {i} \u00e9", text, "test") for i, text in enumerate(texts)]


@pytest.fixture
def store(tmp_path):
    return build_store(corpus(), ByteTokenizer(), tmp_path / "store")


def test_documents_come_back(store):
    tokenizer = ByteTokenizer()
    assert len(store) == 4
    assert store.tokens.dtype == np.uint16
    for i, text in enumerate(TEXTS):
        assert store.document(i).tolist() == [*tokenizer.encode(text), 256]
        assert store.document_id(i) == f"doc {i} \u00e9"
        assert store.document_bytes[i] == len(text.encode())
    assert store.lengths.tolist() == [len(text.encode()) + 1 for text in TEXTS]
    assert store.index["tokens"] == store.lengths.sum()
    with pytest.raises(IndexError, match="document 4 of a store of 4"):
        store.document(4)


def test_wide_tokens_without_an_end(tmp_path):
    store = build_store(corpus(), Wide(), tmp_path / "store")
    assert store.tokens.dtype == np.uint32
    assert store.document(2).tolist() == [ord("a") + 100_000]
    assert store.lengths.tolist() == [len(text.encode()) for text in TEXTS]


def test_bytes_per_token(store, tmp_path):
    assert store.bytes_per_token == 1
    without_end = build_store(corpus(["abc", "d"]), Wide(), tmp_path / "wide")
    assert without_end.targets == 2
    assert without_end.bytes_per_token == 2
    with pytest.raises(ValueError, match="has no token to predict"):
        _ = build_store(corpus(["d"]), Wide(), tmp_path / "single").bytes_per_token


def test_batches_of_the_tokenizer_do_not_show(store, tmp_path, monkeypatch):
    monkeypatch.setattr("lmx.data.store.BATCH_BYTES", 5)
    monkeypatch.setattr("lmx.data.store.BATCH_DOCUMENTS", 2)
    again = build_store(iter(corpus()), ByteTokenizer(), tmp_path / "again")
    assert again.index == store.index


def test_build_reads_documents_as_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("lmx.data.store.BATCH_DOCUMENTS", 3)
    held, seen = [], []

    class Counting(ByteTokenizer):
        def encode_batch(self, texts):
            seen.append(len(held))
            return super().encode_batch(texts)

    build_store((held.append(d) or d for d in corpus(["x"] * 10)), Counting(), tmp_path / "store")
    assert seen == [3, 6, 9, 10]


def test_content_hash(store, tmp_path):
    same = build_store(corpus(), ByteTokenizer(), tmp_path / "same")
    other = build_store(corpus(["x", *TEXTS[1:]]), ByteTokenizer(), tmp_path / "other")
    moved = build_store(corpus(["Hamlet", " \u00fc\n", "a", TEXTS[3]]), ByteTokenizer(), tmp_path / "moved")
    assert same.fingerprint == store.fingerprint
    assert len({store.fingerprint, other.fingerprint, moved.fingerprint}) == 3


def test_nothing_is_left_of_a_build_that_fails(tmp_path):
    def broken():
        yield from corpus()
        raise ValueError("line 3 is broken")

    with pytest.raises(ValueError, match="line 3 is broken"):
        build_store(broken(), ByteTokenizer(), tmp_path / "store")
    with pytest.raises(ValueError, match="the corpus is empty"):
        build_store([], ByteTokenizer(), tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_store_is_not_built_over_another(store):
    with pytest.raises(FileExistsError, match="exists; open it with open_store"):
        build_store(corpus(), ByteTokenizer(), store.directory)


def test_two_builders_at_once(tmp_path):
    directory = tmp_path / "store"

    def overtaken():
        yield from corpus()
        build_store(corpus(), ByteTokenizer(), directory)

    assert len(build_store(overtaken(), ByteTokenizer(), directory)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["tokens", "offsets", "document_bytes", "ids", "id_offsets"])
def test_damage_is_an_error(store, name):
    path = store.directory / f"{name}.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{name}\.bin has {len(data) - 1} bytes, expected {len(data)}: the store is damaged; remove"):
        open_store(store.directory)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name}\.bin does not have the contents it was written with: remove"):
        open_store(store.directory)
    path.unlink()
    with pytest.raises(ValueError, match="has 0 bytes, expected"):
        open_store(store.directory)
    path.write_bytes(data)
    assert len(open_store(store.directory)) == 4


def test_damaged_index(store, tmp_path):
    path = store.directory / "index.json"
    index = json.loads(path.read_text())
    for wrong, message in (
        ("{", r"index\.json is damaged"),
        ("[]", r"index\.json is damaged"),
        (json.dumps({k: v for k, v in index.items() if k != "dtype"}), r"index\.json is damaged"),
        (json.dumps({**index, "format": 99}), "is a token store of format 99, expected 1; remove"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message) as error:
            open_store(store.directory)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="is no token store"):
        open_store(tmp_path / "nowhere")


def test_cache(tmp_path):
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    source.write_text('{"text": "hello", "other": "hi"}\n')

    class Counting(ByteTokenizer):
        calls = 0

        def encode_batch(self, texts):
            Counting.calls += 1
            return super().encode_batch(texts)

    first = cached_store(str(source), Counting(), cache=cache)
    again = cached_store(str(source), Counting(), cache=cache)
    assert Counting.calls == 1
    assert first.directory == again.directory
    found = {first.directory, cached_store(str(source), Counting(), cache=cache, field="other").directory}
    other_tokenizer = Counting()
    other_tokenizer.fingerprint = "another"
    found.add(cached_store(str(source), other_tokenizer, cache=cache).directory)
    source.write_text('{"text": "changed", "other": "hi"}\n')
    changed = cached_store(str(source), Counting(), cache=cache)
    assert changed.document(0).tolist()[:-1] == list(b"changed")
    assert len(found | {changed.directory}) == 4
    (changed.directory / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="the store is damaged; remove the folder"):
        cached_store(str(source), Counting(), cache=cache)
