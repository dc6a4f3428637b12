"""`recipe:MODULE` as what a run reads."""

import sys

import numpy as np
import pytest

from corpora import expected, write_corpus
from lmx.data.recipe import Data, check, prepare
from lmx.data.shards import open_shards

MODULE = """
from pathlib import Path
from corpora import recipe as made
recipe = made(Path({corpus!r}), tokenizer={tokenizer!r}, held_out={held_out})
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    corpus = write_corpus(folder / "raw", files=2)
    for name, tokenizer, held_out in (("small_corpus", "bpe:300", 0.2), ("whole_corpus", "bytes", 0.0)):
        (folder / f"{name}.py").write_text(MODULE.format(corpus=str(corpus), tokenizer=tokenizer, held_out=held_out))
    (folder / "odd_corpus.py").write_text("recipe = 'none'\n")
    sys.path.append(str(folder))
    yield corpus
    sys.path.remove(str(folder))


def test_a_corpus_is_made_once_and_read(modules, tmp_path):
    data = Data("recipe:small_corpus", "recipe:small_corpus:validation", tokenizer="corpus", length=32, cache=str(tmp_path))
    check(data)
    check(Data("recipe:whole_corpus", tokenizer="bytes"))
    assert not list(tmp_path.iterdir())  # nothing is made to check
    prepared = prepare(data)
    assert prepared.tokenizer.vocab == 300
    stores = (prepared.train, prepared.validation)
    texts = [prepared.tokenizer.decode(store.document(n).tolist()) for store in stores for n in range(len(store))]
    assert sorted(texts) == sorted(expected(modules))
    (folder,) = (tmp_path / "corpora").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = prepare(data)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again.train.fingerprint == prepared.train.fingerprint
    # The folder of its shards is the same text.
    by_folder = prepare(Data(str(folder / "train"), tokenizer="corpus", length=32, cache=str(tmp_path)))
    assert by_folder.train.fingerprint == prepared.train.fingerprint == open_shards(folder / "train").fingerprint
    np.testing.assert_array_equal(by_folder.train.tokens[:], prepared.train.tokens[:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "recipe:"}, "no recipe there"),
        ({"train": "recipe:nowhere.at.all"}, "no recipe there"),
        ({"train": "recipe:json"}, "no recipe there"),
        ({"train": "recipe:.relative"}, "no recipe there"),
        ({"train": "recipe:odd_corpus"}, "odd_corpus.recipe is 'none', not a Recipe"),
        ({"train": "recipe:small_corpus:test"}, "the recipe makes no test"),
        ({"train": "recipe:whole_corpus:validation"}, "the recipe makes no validation"),
        ({"train": "recipe:small_corpus", "tokenizer": "bytes"}, "was not made with data.tokenizer='bytes'; use data.tokenizer='corpus'"),
        ({"train": "recipe:small_corpus", "tokenizer": "bpe:500"}, "cannot be trained on recipe:small_corpus, which is tokens already"),
    ],
)
def test_errors(modules, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        check(Data(**{"tokenizer": "corpus", "cache": str(tmp_path), **fields}))
    assert not list(tmp_path.iterdir())
