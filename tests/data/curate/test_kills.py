"""Killed between any two file operations, a run goes on to the same bytes; and every document is accounted for."""

import json
import os
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpora import Lines, Long, Once, Upper, write_corpus
from lmx.data.canaries import Planted, draw_canaries
from lmx.data.clean.decontaminate import Decontaminate
from lmx.data.clean.exact import Exact
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.clean.paragraphs import Paragraphs
from lmx.data.clean.substrings import Substrings
from lmx.data.curate import Local, Recipe, curate
from lmx.data.curate.work import Clean
from lmx.data.documents import Document
from lmx.data.shards import open_shards
from lmx.data.sources import Jsonl, Unit

PARTS = 7  # of the file operations; one of them every time
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes longer than all the rest: to draw the report, and to wait for the disk (processes are killed here, not machines)."""
    monkeypatch.setattr("lmx.data.curate.run.write_report", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    pass


class Watch:
    """File operations below a folder, through Python's audit events. At the n-th, before it is done, the program dies: that and all later ones
    are refused, so that nothing can be cleaned up."""

    now: "Watch | None" = None

    def __init__(self, folder: Path, kill: int = sys.maxsize):
        self.folder, self.kill, self.seen = str(folder), kill, []

    def __enter__(self) -> "Watch":
        Watch.now = self
        return self

    def __exit__(self, *error) -> None:
        Watch.now = None

    def event(self, event: str, arguments: tuple) -> None:
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in FILE_EVENTS and not reads and str(arguments[0]).startswith(self.folder):
            self.seen.append((event, Path(str(arguments[0]))))
            if len(self.seen) > self.kill:
                raise Killed


@pytest.fixture(scope="module")
def audited():
    sys.addaudithook(lambda event, arguments: Watch.now.event(event, arguments) if Watch.now else None)  # there is no taking it away


def everything(folder: Path) -> dict[str, bytes]:
    """All that a run has left, but for the times in its tallies."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "tally" not in p.name}


@pytest.mark.parametrize("part", [pytest.param(0, id="some"), *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_killed_between_any_two_file_operations(tmp_path, audited, part):
    corpus = write_corpus(tmp_path / "raw", files=2, lines=9)
    plan = Recipe("small", (Lines(str(corpus)),), (Long(), Once(), Upper()), held_out=0.3)
    with Watch(tmp_path / "whole") as watch:
        curate(plan, tmp_path / "whole")
    # Nothing is ever written under the name that it is found by.
    assert [path for event, path in watch.seen if event == "open" and not path.name.startswith(".")] == []
    expected = everything(tmp_path / "whole")
    assert len(watch.seen) > 80
    for number in range(part, len(watch.seen), PARTS):
        folder = tmp_path / str(number)
        with Watch(folder, kill=number), pytest.raises(Killed):
            curate(plan, folder)
        curate(plan, folder)
        assert everything(folder) == expected, watch.seen[number]


class Unruly(Local):
    """Does the units in any order, some of them twice, and dies at a drawn replacement of a file."""

    def __init__(self, seed: int, kill: int):
        super().__init__()
        object.__setattr__(self, "draw", random.Random(seed))
        object.__setattr__(self, "kill", kill)

    def each(self, task, items, what):
        order = [*items, *self.draw.sample(list(items), len(items) // 3)]
        self.draw.shuffle(order)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", self.replace)
            super().each(task, order, what)

    def replace(self, part, path, rename=os.replace):
        object.__setattr__(self, "kill", self.kill - 1)
        if self.kill == 0:
            raise Killed
        rename(part, path)


WORD = st.sampled_from(
    ["to", "be", "or", "not", "Fortune", "slings", "\u00fcber", "\u6771\u4eac", "\U0001f600", "a\0b", "\u2028", "\r", "x" * 300]
)
TEXT = st.lists(WORD, max_size=12).map(" ".join) | st.lists(WORD, max_size=9).map("\n".join)
FILES = st.lists(
    st.lists(st.tuples(st.sampled_from(["one", "two", "\u00e9", ""]) | st.integers(0, 99).map(str), TEXT), max_size=12), max_size=4
)
STEPS = (
    Long(2),
    Once(),
    Upper(),
    Exact(),
    MinHash(ngram=2, bands=6, rows=2),
    Paragraphs(shortest=2),
    Substrings(length=4),
    Normalise(),
    Planted(draw_canaries("My code is {d}{d}{d}", [1, 0, 2], 0)),
    Decontaminate((("task", "1", "to be or not to"),), ngram=5, shortest=4),
)


def outcome(plan: Recipe, folder: Path, workers: Local) -> dict[str, bytes] | str:
    try:
        curate(plan, folder, workers=workers)
    except ValueError as error:
        return str(error).replace(str(folder), "")
    return everything(folder)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_recipe_on_any_documents(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("any")
    files = data.draw(FILES)
    for number, records in enumerate(files):
        lines = [json.dumps({"id": id, "text": text}, ensure_ascii=bool(number % 2)) + "\n" for id, text in records]
        (root / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8", newline="")
    (root / "again").mkdir()
    (root / "again" / "0.jsonl").write_text('{"id": "one", "text": "to be or not to be"}\n')
    sources = (Jsonl(str(root / "*.jsonl"), name="a"), Jsonl(str(root / "again"), name="b"))[0 if files else 1 :]
    steps = tuple(data.draw(st.lists(st.sampled_from(STEPS), unique=True, max_size=5)))
    plan = Recipe("any", sources, steps, unit=data.draw(st.integers(60, 900)), held_out=data.draw(st.sampled_from([0, 0.3])), examples=2)
    expected = outcome(plan, root / "plain", Local())
    unruly = Unruly(data.draw(st.integers(0, 99)), data.draw(st.integers(1, 60)))
    try:
        found = outcome(plan, root / "killed", unruly)
    except Killed:
        found = outcome(plan, root / "killed", unruly)
    assert found == expected

    # Independently of what was counted: each document is in one place.
    last = sum(hasattr(step, "resolve") for step in steps)
    ids = [id for records in files for id, _ in records] + ["one"]
    dropped, kept = (
        [line for path in (root / "plain/work").rglob(pattern) for line in path.read_bytes().split(b"\n")[:-1]]
        for pattern in ("*.dropped.jsonl", f"{last}/*.kept.jsonl")
    )
    assert Counter(json.loads(line)["id"] for line in dropped + kept) == Counter(ids)
    if isinstance(expected, dict):
        stores = [open_shards(path.parent, hashes=True) for path in (root / "plain").glob("*/manifest.json")]
        assert Counter(about["id"] for store in stores for about in store.about) == Counter(json.loads(line)["id"] for line in kept)


def test_memory_does_not_grow_with_a_unit(tmp_path):
    """A dump that cannot be cut is one unit, of any number of documents."""
    peaks = []
    for count in (1500, 15_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"line {n} of slings and arrows\n" for n in range(count)))
        plan = Recipe("one", (Streamed(str(path)),), (Upper(), MinHash(), Upper("again")))
        for number in (0, 1):
            (tmp_path / str(count) / "work" / str(number)).mkdir(parents=True)
        tracemalloc.start()
        Clean(plan, tmp_path / str(count), ((0, Unit("all", (str(path),))),), 0)(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks


@dataclass(frozen=True)
class Streamed:
    """A document a line, one in memory at a time."""

    path: str
    name: str = "streamed"

    def read(self, unit: Unit) -> Iterator[Document]:
        with open(self.path) as file:
            for number, line in enumerate(file):
                yield Document(str(number), line, self.path)
