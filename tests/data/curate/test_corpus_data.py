"""A run reads a recipe's corpus: made when it is first asked for, opened after."""

import sys
from dataclasses import replace

import pytest

from corpora import expected, recipe, write_corpus
from lmx.data.curate import curate
from lmx.data.pipeline import batch_hash
from lmx.data.recipe import Data, check, make_batches, prepare


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A module `small_corpus` with a recipe, as experiments have them; its folder."""
    folder = tmp_path_factory.mktemp("module")
    raw = write_corpus(folder / "raw")
    lines = ["from pathlib import Path", "from corpora import recipe as make", f"recipe = make(Path({str(raw)!r}), tokenizer='bpe:400')"]
    (folder / "small_corpus.py").write_text("\n".join(lines) + "\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("small_corpus", None)


@pytest.fixture
def data(module) -> Data:
    return Data(
        train="recipe:small_corpus",
        validation="recipe:small_corpus:validation",
        tokenizer="corpus",
        length=32,
        cache=str(module / "cache"),
    )


def test_a_recipe_is_run_and_read(data, module):
    prepared = prepare(data)
    assert len(prepared.train) + len(prepared.validation) == len(expected(module / "raw"))
    assert prepared.tokenizer.vocab == prepared.train.vocab == 400
    text = prepared.tokenizer.decode(prepared.train.document(3).tolist())
    assert text in expected(module / "raw")
    made = {path: path.stat().st_mtime_ns for path in (module / "cache").rglob("*")}
    again = prepare(data)
    assert {path: path.stat().st_mtime_ns for path in (module / "cache").rglob("*")} == made  # only opened
    assert again.train.fingerprint == prepared.train.fingerprint


def test_a_folder_of_shards_is_the_same(data, module):
    prepared = prepare(data)
    folder = prepared.train.directory
    named = prepare(replace(data, train=str(folder), validation=str(folder.parent / "validation")))
    one, other = (make_batches(data, p.train, p.tokenizer, vocab=400, rows=4, seed=0) for p in (prepared, named))
    assert [batch_hash(one[k]) for k in range(9)] == [batch_hash(other[k]) for k in range(9)]
    by_path = prepare(replace(data, train=str(folder), tokenizer=str(folder.parent / "tokenizer.model"), validation=""))
    assert by_path.train.fingerprint == prepared.train.fingerprint


def test_another_tokenizer_is_refused(data):
    with pytest.raises(ValueError, match=r"was not made with data\.tokenizer='bytes'; use data\.tokenizer='corpus'"):
        prepare(replace(data, tokenizer="bytes"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "recipe:nowhere.at_all"}, "data.train='recipe:nowhere.at_all': no recipe there"),
        ({"train": "recipe:json"}, "no recipe there"),
        ({"validation": "recipe:small_corpus:test"}, "data.validation='recipe:small_corpus:test': the recipe makes no test"),
        (
            {"tokenizer": "bpe:500"},
            "data.tokenizer='bpe:500' cannot be trained on recipe:small_corpus, which is tokens already; use 'corpus'",
        ),
        ({"train": __file__.replace(".py", ".txt"), "validation": ""}, "does not exist"),
    ],
)
def test_errors_come_before_any_work(data, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(replace(data, **change))


def test_a_corpus_tokenizer_without_a_corpus(data, module):
    with pytest.raises(ValueError, match=r"data\.tokenizer='corpus' is that of a corpus's shards, and data\.train names none"):
        check(replace(data, train=str(module / "raw"), validation=""))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_given_tokenizer_goes_into_the_corpus(data, module, tmp_path, kind):
    trained = prepare(data).train.directory.parent / "tokenizer.model"
    given = tmp_path / "given"
    given.mkdir()
    (given / "spiece.model").write_bytes(trained.read_bytes())
    name = str(given / "spiece.model") if kind == "file" else str(given)
    curate(recipe(module / "raw", tokenizer=name), tmp_path / "corpus")
    (given / "spiece.model").unlink()
    prepared = prepare(replace(data, train=str(tmp_path / "corpus/train"), validation=""))
    assert prepared.tokenizer.vocab == 400
