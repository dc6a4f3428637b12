"""A recipe makes the same bytes whoever runs it and however often it is killed, and what it did is counted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from corpora import WORDS, Killer, Lines, Upper, contents, counts, expected, recipe, write_corpus
from lmx.data.clean.exact import Exact
from lmx.data.clean.minhash import MinHash
from lmx.data.curate import Local, Recipe, curate
from lmx.data.curate.recipe import described
from lmx.data.documents import Document
from lmx.data.shards import open_shards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "raw")


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "corpus"
    curate(recipe(corpus), folder)
    return folder


def texts(folder: Path) -> list[str]:
    store = open_shards(folder, hashes=True)
    return [bytes(store.document(i)[:-1].astype("u1")).decode() for i in range(len(store))]


def test_what_is_kept(corpus, made):
    train, held_out = texts(made / "train"), texts(made / "validation")
    everything = expected(corpus)
    assert sorted(train + held_out) == sorted(everything)
    assert train == [text for text in everything if text in set(train)]  # in the corpus's order
    assert 0.1 < len(held_out) / len(everything) < 0.3


def test_every_document_is_accounted_for(corpus, made):
    lines = [line for path in corpus.glob("*.txt") for line in path.read_text().splitlines()]
    short = sum(line[0] != "#" and len(line.split()) < 3 for line in lines)
    by = Counter()
    for step, what, reason, _, _, documents, _ in counts(made)["events"]:
        by[step, what, reason] += documents
    assert by["source", "read", ""] == sum(line[0] != "#" for line in lines)
    assert by["source", "omitted", "comment"] == 6
    assert by["long", "dropped", "words"] == short
    assert by["long", "passed", ""] == by["once", "passed", ""] + by["once", "dropped", "duplicate"]
    assert by["once", "passed", ""] == by["upper", "changed", "letters"] == by["corpus", "kept", ""] == len(expected(corpus))
    shown = {(step, what, reason): examples for step, what, reason, _, _, examples in counts(made)["shown"]}
    assert len(shown["long", "dropped", "words"]) == 10
    assert all(example["value"] == len(example["text"].split()) < 3 for _, example in shown["long", "dropped", "words"])
    assert all(example["after"] == example["text"].capitalize() for _, example in shown["upper", "changed", "letters"])


def test_a_duplicate_names_the_document_that_stays(corpus, made):
    dropped = [json.loads(line) for path in sorted((made / "work/1").glob("*.dropped.jsonl")) for line in path.read_text().splitlines()]
    by_id = {f"{path.name}:{i}": line for path in corpus.glob("*.txt") for i, line in enumerate(path.read_text().splitlines())}
    assert dropped
    assert all(by_id[one["id"]] == by_id[one["value"]] and one["id"] != one["value"] for one in dropped)


def test_shards_say_where_documents_came_from(corpus, made):
    store = open_shards(made / "train")
    for number in range(0, len(store), 17):
        about = store.about[number]
        name, _, line = about["id"].partition(":")
        assert about["source"] == str(corpus / name)
        assert (corpus / name).read_text().splitlines()[int(line)].capitalize().encode() == bytes(store.document(number)[:-1].astype("u1"))
        assert [(d["step"], d["counts"]) for d in about["decisions"]] == [("upper", {"letters": 1})]
        assert about["metadata"] == {"language": "en"}
        assert about["corpus"] == "lines"


@pytest.mark.parametrize("workers", [3, 8])
def test_any_number_of_workers(corpus, made, tmp_path, workers):
    curate(recipe(corpus), tmp_path / "corpus", workers=Local(workers))
    assert contents(tmp_path / "corpus") == contents(made)
    assert {**counts(tmp_path / "corpus"), "seconds": None} == {**counts(made), "seconds": None}


@pytest.fixture(scope="module")
def deadly(corpus, tmp_path_factory):
    """A recipe with a step that kills once, and what it makes when nothing is killed."""
    folder = tmp_path_factory.mktemp("deadly")
    plan = recipe(corpus)
    plan = dataclasses.replace(plan, steps=(*plan.steps, Killer(str(folder / "marker"), "3.txt:5")))
    (folder / "marker").touch()
    curate(plan, folder / "whole")
    return plan, folder


def test_a_killed_worker_changes_nothing(deadly, tmp_path):
    plan, folder = deadly
    (folder / "marker").unlink()
    curate(plan, tmp_path / "corpus", workers=Local(2))
    assert (folder / "marker").exists()  # it was killed
    assert contents(tmp_path / "corpus") == contents(folder / "whole")


RUN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from corpora import Killer, recipe
from lmx.data.curate import curate
import dataclasses
if __name__ == "__main__":
    plan = recipe(Path({corpus!r}))
    plan = dataclasses.replace(plan, steps=(*plan.steps, Killer({marker!r}, "3.txt:5")))
    from {module} import {workers}
    curate(plan, {folder!r}, workers={workers}())
"""


def program(tmp_path, corpus, folder, module, workers):
    fields = {"tests": str(Path(__file__).parent), "corpus": str(corpus), "marker": str(folder / "marker")}
    path = tmp_path / "run.py"
    path.write_text(RUN.format(folder=str(tmp_path / "corpus"), module=module, workers=workers, **fields))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)])}
    return subprocess.Popen([sys.executable, str(path)], start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on(corpus, deadly, tmp_path):
    plan, folder = deadly
    (folder / "marker").unlink()
    assert program(tmp_path, corpus, folder, "lmx.data.curate", "Local").wait(60) == -signal.SIGKILL
    done = sorted((tmp_path / "corpus/work/0").glob("*.tally.json"))
    before = [path.stat().st_mtime_ns for path in done]
    assert len(done) == 6  # the pass before is whole
    curate(plan, tmp_path / "corpus")
    assert [path.stat().st_mtime_ns for path in done] == before  # and was not done again
    assert contents(tmp_path / "corpus") == contents(folder / "whole")


def test_beam(corpus, made, tmp_path):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    from lmx.data.curate.beam import Beam

    curate(recipe(corpus), tmp_path / "corpus", workers=Beam(("--runner=FnApiRunner",)))
    assert contents(tmp_path / "corpus") == contents(made)


def test_beam_groups_keys_as_one_machine_does(tmp_path):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    from lmx.data.curate.beam import Beam

    corpus = write_corpus(tmp_path / "raw", files=4)
    plan = Recipe("small", (Lines(str(corpus)),), (Exact(), MinHash(ngram=3, bands=20, rows=3)))
    curate(plan, tmp_path / "here")
    curate(plan, tmp_path / "beam", workers=Beam(("--runner=FnApiRunner",)))
    assert contents(tmp_path / "beam") == contents(tmp_path / "here")
    dropped = {(step, what) for step, what, *_ in counts(tmp_path / "here")["events"]}
    assert {("exact", "dropped"), ("minhash", "dropped")} <= dropped


@pytest.mark.slow
def test_beam_with_a_killed_worker(corpus, deadly, tmp_path):
    """Beam's local runner waits for a dead worker for ever, so the run is ended and begun again; clusters start another worker."""
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    _, folder = deadly
    (folder / "marker").unlink()
    first = program(tmp_path, corpus, folder, "lmx.data.curate.beam", "Beam")
    try:
        until = time.monotonic() + 120
        while not (folder / "marker").exists() and first.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert (folder / "marker").exists()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    second = program(tmp_path, corpus, folder, "lmx.data.curate.beam", "Beam")
    _, errors = second.communicate(timeout=180)
    assert second.returncode == 0, errors[-2000:]
    assert contents(tmp_path / "corpus") == contents(folder / "whole")


def test_a_complete_corpus_is_only_opened(made, corpus):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    curate(recipe(corpus), made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_trained_tokenizer(corpus, tmp_path):
    curate(recipe(corpus, tokenizer="bpe:300"), tmp_path / "a")
    curate(recipe(corpus, tokenizer="bpe:300"), tmp_path / "b", workers=Local(2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert open_shards(tmp_path / "a/train").vocab == 300


def test_another_recipe_is_refused_by_what_differs(corpus, made):
    plan = recipe(corpus)
    steps = (dataclasses.replace(plan.steps[0], words=4), *plan.steps[1:])
    with pytest.raises(ValueError, match=r"another recipe \(recipe.steps.0.words: 3 there, 4 here\); use another folder"):
        curate(dataclasses.replace(plan, steps=steps), made)


def test_changed_files_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "raw", files=2)
    curate(recipe(corpus), tmp_path / "corpus")
    (corpus / "1.txt").write_text(" ".join(WORDS))
    with pytest.raises(ValueError, match=r"1.txt has changed since this corpus was begun"):
        curate(recipe(corpus), tmp_path / "corpus")


def test_damage_is_refused_or_listed(tmp_path):
    corpus = write_corpus(tmp_path / "raw", files=2, damaged=True)
    with pytest.raises(ValueError, match=r"0.txt, line 48: marked; mend the file, or .* damaged='skip'"):
        curate(recipe(corpus), tmp_path / "a")
    curate(recipe(corpus, damaged="skip"), tmp_path / "b")
    assert [Path(where).name for where, _ in counts(tmp_path / "b")["damage"]] == ["0.txt, line 48", "1.txt, line 48"]


@dataclass(frozen=True)
class Fails:
    name: str = "fails"

    def __call__(self, document: Document) -> None:
        raise KeyError("oops")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name='a/b' is to name a folder"),
        ({"sources": ()}, "reads nothing"),
        ({"steps": (Upper(), Upper())}, "two steps are called 'upper'"),
        ({"held_out": 1.5}, "held_out=1.5 is not a share"),
        ({"damaged": "maybe"}, "damaged='maybe' is not refuse or skip"),
        ({"sources": (Lines("nowhere"),)}, "its sources hold no files"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model"),
    ],
)
def test_errors(corpus, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        curate(dataclasses.replace(recipe(corpus), **change), tmp_path / "corpus")


def test_a_step_that_fails_is_named(corpus, tmp_path):
    with pytest.raises(RuntimeError, match=r"step fails failed on document '0.txt:0' of .*0.txt: KeyError\('oops'\)"):
        curate(Recipe("small", (Lines(str(corpus)),), (Fails(),)), tmp_path / "corpus")


def test_none_held_out(corpus, tmp_path):
    """A share that draws no document costs the validation set, not the run."""
    manifest = curate(recipe(corpus, held_out=1e-9), tmp_path / "corpus")
    assert list(manifest["splits"]) == ["train"]
    assert sorted(texts(tmp_path / "corpus/train")) == sorted(expected(corpus))
    assert curate(recipe(corpus, held_out=1e-9), tmp_path / "corpus") == manifest


def test_nothing_kept(corpus, tmp_path):
    plan = recipe(corpus, held_out=0.0)
    steps = (dataclasses.replace(plan.steps[0], words=99),)
    with pytest.raises(ValueError, match="no document was kept"):
        curate(dataclasses.replace(plan, steps=steps), tmp_path / "corpus")


def test_what_cannot_be_written_down_is_refused():
    with pytest.raises(ValueError, match="cannot be written down"):
        described((lambda text: text,))


@dataclass(frozen=True)
class Keyed:
    key: str = field(repr=False)


def test_secrets_are_not_written_down():
    a, b = (json.dumps(described(Keyed(key))) for key in ("opensesame", "sesame"))
    assert "sesame" not in a
    assert a != b
