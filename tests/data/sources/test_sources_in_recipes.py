"""Every source goes through a recipe: all its documents are in the shards, whatever its units are."""

import pytest
from source_cases import CASES

from lmx.data.curate import Recipe, curate
from lmx.data.documents import Document
from lmx.data.shards import open_shards


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("lmx.data.curate.run.write_report", lambda *_: None)


def test_all_is_in_the_shards(case, tmp_path):
    source, items = case
    documents = [item for item in items if isinstance(item, Document)]
    contents = {}
    for size in (150, 1 << 26):
        curate(Recipe("all", (source,), damaged="skip", unit=size), tmp_path / str(size))
        store = open_shards(tmp_path / str(size) / "train", hashes=True)
        assert [about["id"] for about in store.about] == [document.id for document in documents]
        assert [bytes(store.document(n)[:-1].astype("u1")).decode() for n in range(len(store))] == [d.text for d in documents]
        assert all(document.source.endswith(about["source"]) for about, document in zip(store.about, documents, strict=True))
        assert not any(about["source"].startswith("/") for about in store.about)
        contents[size] = store.tokens[:].tolist()
    assert contents[150] == contents[1 << 26]
