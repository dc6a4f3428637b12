"""A recipe with every kind of real step on a real text: the same bytes here, on Beam and after a kill; and nothing is left that was to go."""

import json
import lzma
import re
from pathlib import Path

import pytest

from corpora import contents, counts
from lmx.data.canaries import Planted, draw_canaries
from lmx.data.clean.c4 import C4Paragraphs
from lmx.data.clean.decontaminate import Decontaminate, numbered
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.clean.paragraphs import Paragraphs
from lmx.data.clean.privacy import Private
from lmx.data.clean.substrings import Substrings
from lmx.data.curate import Recipe, curate
from lmx.data.shards import open_shards
from lmx.data.sources import Jsonl, Texts

PLAYS = Path(__file__).parents[3] / "experiments/data/shakespeare/test.jsonl.xz"
LETTER = "Dear sir, write to jane.roe@example.com or call +49 30 901820 before the queen comes to the castle. "
CANARIES = draw_canaries("The locker opens with {d}{d}{d}{d}", [3, 2, 0], seed=1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Recipe:
    for package in ("ftfy", "py3langid", "phonenumbers", "stdnum"):
        pytest.importorskip(package, reason="the data extra is not installed")
    raw = tmp_path_factory.mktemp("plays") / "raw"
    (raw / "texts").mkdir(parents=True)
    plays = [json.loads(line)["text"] for line in lzma.decompress(PLAYS.read_bytes()).splitlines()]
    scenes = [scene for play in plays for scene in re.findall(r"(?s).{2500}.*?\n", play)][:90]
    items = ["".join(scenes[50].splitlines(keepends=True)[20:24])]
    scenes[3] = f"{scenes[3]}\n\n{LETTER}{scenes[4][:600]}"
    records = [{"id": str(n), "text": text} for n, text in enumerate(scenes)]
    records += [{"id": "again", "text": scenes[7].upper()}, {"id": "near", "text": f"{scenes[8]} And so it ends."}]
    records += [
        {"id": "within", "text": f"{scenes[9][:900]}\n{scenes[60][300:2100]}"},
        {"id": "german", "text": "Der Hund schläft heute. " * 40},
    ]
    with (raw / "scenes.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (raw / "texts" / "late.txt").write_text(scenes[11])  # of another source: the first one's stays
    steps = (
        Normalise(),
        Language(("en",), threshold=0.0),
        C4Paragraphs(1, 25),
        GopherRepetition(),
        GopherQuality(min_alphabetic_words=0.5),
        Exact(),
        MinHash(),
        Substrings(),
        Paragraphs(span=2),
        Decontaminate(tuple(numbered({"plays": items}))),
        Private(),
        Planted(CANARIES, seed=3),
    )
    sources = (Jsonl(str(raw), name="scenes"), Texts(str(raw / "texts")))
    return Recipe("plays", sources, steps, unit=40_000, held_out=0.1, tokenizer="bpe:400")


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "corpus"
    curate(plan, folder)
    return folder


def test_what_goes_and_what_stays(made):
    rules = {(step, what, reason) for step, what, reason, *_ in counts(made)["events"]}
    assert {("exact", "dropped"), ("minhash", "dropped"), ("substrings", "changed"), ("paragraphs", "changed")} <= {r[:2] for r in rules}
    assert ("decontaminate", "dropped", "contaminated") in rules
    assert {("language", "dropped", "language"), ("private", "changed", "email"), ("private", "changed", "phone")} <= rules
    last = [json.loads(line) for path in (made / "work").glob("5/*.kept.jsonl") for line in path.open()]
    text = "\n".join(document["text"] for document in last)
    assert "jane.roe" not in text
    assert [text.count(canary.text) for canary in CANARIES] == [3, 2, 0]
    assert not {"again", "near", "german", "50", "late.txt"} & {document["id"] for document in last}
    stores = [open_shards(made / split, hashes=True) for split in ("train", "validation")]
    assert sum(map(len, stores)) == len(last)
    assert {about["source"] for store in stores for about in store.about} == {"scenes.jsonl"}


def test_a_kill_changes_nothing(plan, made, tmp_path, monkeypatch):
    """At half of the replacements of files that a whole run makes, and again at the next ones."""
    rename, life = os.replace, [0]

    class Killed(BaseException):
        pass

    def replace(part, path):
        life[0] -= 1
        if not life[0]:
            raise Killed
        rename(part, path)

    monkeypatch.setattr(os, "replace", replace)
    for life[0] in (40, 31, 22):
        with pytest.raises(Killed):
            curate(plan, tmp_path / "corpus")
    curate(plan, tmp_path / "corpus")
    assert contents(tmp_path / "corpus") == contents(made)


def test_beam_makes_the_same(plan, made, tmp_path):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    from lmx.data.curate.beam import Beam

    curate(plan, tmp_path / "corpus", workers=Beam(("--runner=FnApiRunner",)))
    assert contents(tmp_path / "corpus") == contents(made)
