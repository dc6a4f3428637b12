"""A recipe makes the same bytes whoever runs it and however often it is killed, and what it did is counted."""

import dataclasses
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import WORDS, Killer, Lines, Long, Upper, contents, counts, expected, recipe, write_corpus
from lmx.data.clean.c4 import C4BadWords
from lmx.data.clean.exact import Exact
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.toxicity import ToxicWords
from lmx.data.curate import Local, Recipe, curate, run
from lmx.data.curate.beam import Beam
from lmx.data.curate.recipe import described
from lmx.data.curate.records import Record
from lmx.data.documents import Document
from lmx.data.learned import train_sentencepiece
from lmx.data.shards import open_shards
from lmx.data.sources import Texts


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
        assert about["source"] == name  # below the folder that all files of its source lie in
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
    curate(recipe(corpus), tmp_path / "corpus", workers=Beam(("--runner=FnApiRunner",)))
    assert contents(tmp_path / "corpus") == contents(made)


def test_beam_groups_keys_as_one_machine_does(tmp_path):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    corpus = write_corpus(tmp_path / "raw", files=4)
    plan = Recipe("small", (Lines(str(corpus)),), (Exact(), MinHash(ngram=3, bands=20, rows=3)))
    curate(plan, tmp_path / "here")
    curate(plan, tmp_path / "beam", workers=Beam(("--runner=FnApiRunner",)))
    assert contents(tmp_path / "beam") == contents(tmp_path / "here")
    dropped = {(step, what) for step, what, *_ in counts(tmp_path / "here")["events"]}
    assert {("exact", "dropped"), ("minhash", "dropped")} <= dropped


@pytest.mark.parametrize(
    "options", [("--runner=FnApiRunner",), pytest.param(Beam.__dataclass_fields__["options"].default, marks=pytest.mark.slow)]
)
def test_a_task_that_fails_on_beam_says_what_one_here_does(tmp_path, monkeypatch, options):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)]))
    corpus = write_corpus(tmp_path / "raw", files=1, damaged=True)
    with pytest.raises(ValueError, match=r"^\S*0.txt, line 48: marked; mend the file, or let the recipe skip it with damaged='skip'$"):
        curate(recipe(corpus), tmp_path / "corpus", workers=Beam(options))


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


def test_a_touched_file_is_not_a_changed_one(tmp_path):
    corpus = write_corpus(tmp_path / "raw", files=2)
    manifest = curate(recipe(corpus), tmp_path / "corpus")
    os.utime(corpus / "1.txt", (0, 0))
    assert curate(recipe(corpus), tmp_path / "corpus") == manifest
    text = (corpus / "1.txt").read_text()
    (corpus / "1.txt").write_text(text[::-1])  # as many bytes
    with pytest.raises(ValueError, match=r"1.txt has changed since"):
        curate(recipe(corpus), tmp_path / "corpus")


def test_other_code_does_not_go_on_with_half_a_corpus(corpus, tmp_path, monkeypatch):
    manifest = curate(recipe(corpus), tmp_path / "whole")

    class Cut(Local):
        def resolve(self, step, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(recipe(corpus), tmp_path / "half", workers=Cut())
    monkeypatch.setattr(run, "code", lambda recipe: "another")
    with pytest.raises(ValueError, match=r"the code of its steps or of lmx.data has changed since this corpus was begun"):
        curate(recipe(corpus), tmp_path / "half")
    assert curate(recipe(corpus), tmp_path / "whole") == manifest  # what is complete is only read


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
        ({"name": ".."}, "is to name a folder"),
        ({"sources": ()}, "reads nothing"),
        ({"steps": (Upper("lines"),)}, "two sources or steps are called 'lines'"),
        ({"steps": (Upper("corpus"),)}, "a step is called 'corpus'"),
        ({"steps": (Long(99), Upper())}, r"no document was kept of 282; long \(words\) dropped 282; see python -m lmx.data inspect"),
        ({"held_out": 1e-9}, "held_out=1e-09 leaves none of [0-9]+ documents for validation"),
        ({"held_out": 1 - 1e-9}, "leaves none of [0-9]+ documents for train"),
        ({"steps": (Upper(), Upper())}, "two sources or steps are called 'upper'"),
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


def test_shards_do_not_depend_on_where_files_lie(corpus, made, tmp_path, monkeypatch):
    """The split does not either; and they are named by their path below the source, from wherever they are read."""
    shutil.copytree(corpus, tmp_path / "deep" / "er" / "raw")
    monkeypatch.chdir(tmp_path / "deep")
    curate(recipe(Path("er/raw")), tmp_path / "corpus")
    for split in ("train", "validation"):
        assert open_shards(tmp_path / "corpus" / split).fingerprint == open_shards(made / split).fingerprint


def test_what_changes_while_it_is_read_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "raw", files=2)

    class Late(Local):
        def resolve(self, step, folder):
            (corpus / "0.txt").write_text("another text\n")
            return super().resolve(step, folder)

    with pytest.raises(ValueError, match=r"0.txt has changed since this corpus was begun"):
        curate(recipe(corpus), tmp_path / "corpus", workers=Late())
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_a_list_that_changes_is_refused(corpus, tmp_path):
    listed = tmp_path / "words.txt"
    listed.write_text("slings\n")
    steps = (C4BadWords(str(listed)), ToxicWords((str(listed),)))
    plan = Recipe("listed", (Lines(str(corpus)),), steps)
    manifest = curate(plan, tmp_path / "corpus")
    assert str(listed) in manifest["sources"]
    listed.write_text("slings\narrows\n")
    with pytest.raises(ValueError, match=r"words.txt has changed since"):
        curate(plan, tmp_path / "corpus")


def test_a_tokenizer_that_changes_is_refused(corpus, tmp_path):
    for vocab in (300, 310):
        train_sentencepiece([path.read_text() for path in sorted(corpus.iterdir())], tmp_path / f"{vocab}.model", vocab=vocab)
    mine = tmp_path / "300.model"
    curate(recipe(corpus, tokenizer=str(mine)), tmp_path / "corpus")
    shutil.copyfile(tmp_path / "310.model", mine)
    with pytest.raises(ValueError, match=r"tokenizer='.*300.model' has changed since"):
        curate(recipe(corpus, tokenizer=str(mine)), tmp_path / "corpus")


def test_what_was_lost_between_passes_is_noticed(corpus, tmp_path):
    class Careless(Local):
        def resolve(self, step, folder):
            (folder.parent / "000002.kept.jsonl").write_bytes(b"")
            return super().resolve(step, folder)

    with pytest.raises(RuntimeError, match=r"files between passes have been lost or changed: remove the folder"):
        curate(recipe(corpus), tmp_path / "corpus", workers=Careless())


def test_two_programs_take_turns_in_a_folder(corpus, made, tmp_path):
    """As the processes of a training run, which all want its corpus: one makes it, the others wait and find it."""
    (tmp_path / "marker").touch()
    programs = [program(tmp_path, corpus, tmp_path, "lmx.data.curate", "Local") for _ in range(2)]
    for one in programs:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors[-2000:]
    assert contents(tmp_path / "corpus").keys() == contents(made).keys()


def test_names_and_metadata_that_are_no_text(tmp_path):
    """File names can be any bytes; where one is the name of a document that is damage, said in a line that can be printed."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.txt").write_text("a good text")
    Path(os.fsdecode(os.fsencode(folder) + b"/b\xff.txt")).write_text("a text of a file with an odd name")
    plan = Recipe("odd", (Texts(str(folder)),))
    with pytest.raises(ValueError, match=r"b\\udcff.txt: half a surrogate pair in its text, id or path"):
        curate(plan, tmp_path / "refused")
    curate(dataclasses.replace(plan, damaged="skip"), tmp_path / "corpus")
    assert len(open_shards(tmp_path / "corpus/train")) == 1
    assert r"b\udcff.txt" in (tmp_path / "corpus/report.html").read_text()
    with pytest.raises(ValueError, match=r"document 'a' of b has metadata that cannot be written as JSON"):
        Record(Document("a", "text", "b", {"when": time})).to_line()


def test_what_cannot_be_written_down_is_refused():
    with pytest.raises(ValueError, match="cannot be written down"):
        described((lambda text: text,))


@dataclass(frozen=True)
class Keyed:
    key: Any = field(repr=False)


@dataclass(frozen=True)
class Model:
    size: int

    def score(self, text: str) -> float:
        return self.size


def test_methods_and_hidden_sets_are_told_apart():
    assert described(Model(1).score) != described(Model(2).score)
    assert described(Keyed(frozenset("abc"))) != described(Keyed(frozenset("abcd")))
    assert set(described(Keyed(frozenset("cba"))).values()) == {"test_curate.Keyed", "sha256:d33b202c020cbde1"}  # in any process


def test_the_program_that_is_run_is_a_module(monkeypatch):
    monkeypatch.setattr(Model, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.machinery.ModuleSpec("experiments.data.mine", None))
    assert described(Model(1))["class"] == "experiments.data.mine.Model"


def test_secrets_are_not_written_down():
    a, b = (json.dumps(described(Keyed(key))) for key in ("opensesame", "sesame"))
    assert "sesame" not in a
    assert a != b


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text('\\"\n\t\x00\x1f\x7f\u2028a'))
def test_records_are_lines_of_json_as_the_library_writes_them(text):
    record = Record(Document(text[:5], text, "source", {"title": text}, "2024"), ({"step": "x", "counts": {text: 1}},))
    fields = {"id": text[:5], "source": "source", "created": "2024", "metadata": {"title": text}}
    fields |= {"decisions": [{"step": "x", "counts": {text: 1}}], "text": text}
    assert record.to_line() == json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
