"""Each recipe of `experiments/data`, over a tiny dump in the format that it is for: what is clean stays, and what is not goes by the right rule."""

import gzip
import importlib
import json
import random
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from source_cases import BODY, book, ndjson, zstd
from test_code import MIT
from test_stackexchange import answer, posts, question
from test_warc import response
from test_wikipedia import HEAD, page

from lmx.data.curate.door import main
from lmx.data.shards import open_shards

WORDS = {
    "the": "the a this that every some another her his our",
    "old": "old green heavy narrow broken quiet wooden yellow hungry famous gentle empty",
    "man": "baker teacher lantern basket ladder river market window bridge garden letter violin kettle carpet mirror saddle bucket candle",
    "had": "bought found carried painted described repaired borrowed remembered measured counted cleaned admired followed",
    "of": "of with near behind under beside above before without",
    "and": "and because while although when before until",
}
SENTENCE = "the old man had the man of the old man and the man had the old man"
ITEM = "Forty two green tortoises share nine wooden boats and each boat needs exactly three captains on Sunday morning."


def prose(seed: int) -> list[str]:
    """Paragraphs of English, different for each seed."""
    draw = random.Random(seed)

    def sentence() -> str:
        words = [draw.choice(WORDS[kind].split()) for kind in SENTENCE.split()]
        return " ".join(words).capitalize() + "."

    return [" ".join(sentence() for _ in range(3)) for _ in range(4)]


CLEAN = [prose(seed) for seed in range(8)]
MADE = {  # a document, and the step and rule that is to drop it
    "twice": (CLEAN[2], ("exact", "duplicate")),
    "near": ([*CLEAN[3], "And there was an end."], ("minhash", "near_duplicate")),
    "benchmark": ([*prose(20), ITEM], ("decontaminate", "contaminated")),
}
OTHER = [
    "Der alte Mann und seine Frau wohnten in einem kleinen Haus am Rande des Waldes, und jeden Morgen gingen sie zum Fluss, um Wasser zu holen.",
    "Eines Tages aber kam ein Fremder, der ihnen von einer Stadt erzählte, in der niemand arbeiten musste.",
]
ADDRESS = [*prose(21), "Write to jane.doe@example.com about the lantern, and do not wait for her too long."]


def benchmarks() -> None:
    Path("benchmarks/gsm8k").mkdir(parents=True)
    Path("benchmarks/mmlu/test").mkdir(parents=True)
    Path("benchmarks/gsm8k/test.jsonl").write_bytes(ndjson({"question": ITEM, "answer": "27"}))
    Path("benchmarks/NQ-open.dev.jsonl").write_bytes(ndjson({"question": "who has the tortoises", "answer": ["nobody"]}))
    human = {"task_id": "H/0", "prompt": "def a(): ", "canonical_solution": "return 1"}
    Path("benchmarks/HumanEval.jsonl.gz").write_bytes(gzip.compress(ndjson(human)))
    Path("benchmarks/mmlu/test/toys_test.csv").write_text('"What, then,\nis a ball?",A food,A toy,A bird,A king,B\n')


def web(path: Path, texts: list[list[str]]) -> None:
    bodies = ["<html><body><article>" + "".join(f"<p>{escape(p)}</p>" for p in text) + "</article></body></html>" for text in texts]
    pages = [response(body.encode(), WARC_Target_URI=f"http://{n}.example/") for n, body in enumerate(bodies)]
    (path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, pages)))


def wikipedia(path: Path, texts: list[list[str]]) -> None:
    pages = "".join(page(number, "\n\n".join(text)) for number, text in enumerate(texts, 1))
    (path / "a.xml").write_text(HEAD + pages + "</mediawiki>\n")


def books(path: Path, texts: list[list[str]]) -> None:
    for number, text in enumerate(texts):
        data = book(number, "UTF-8").decode().replace("\r\n", "\n").replace(BODY, "\n\n".join(text) + "\n")
        (path / f"{number}-0.txt").write_text(data)


def reddit(path: Path, texts: list[list[str]]) -> None:
    records = [
        {"id": f"c{n}", "body": "\n\n".join(text), "score": 5, "subreddit": "toys", "created_utc": 1} for n, text in enumerate(texts)
    ]
    (path / "RC_2005-12.zst").write_bytes(zstd(ndjson(*records)))


def stackexchange(path: Path, texts: list[list[str]]) -> None:
    rows = []
    for number, text in enumerate(texts):
        body = "".join(f"<p>{escape(part)}</p>" for part in text[1:])
        rows += [
            question(2 * number + 1, title=f"Toy {number}?", body=f"<p>{escape(text[0])}</p>"),
            answer(2 * number + 2, 2 * number + 1, body),
        ]
    (path / "Posts.xml").write_text(posts(*rows))


BUILDERS = {"web": web, "wikipedia": wikipedia, "books": books, "reddit": reddit, "stackexchange": stackexchange}
DUMPS = {"web": "commoncrawl", "books": "gutenberg"}


def run(name: str, argv: list[str]) -> tuple[set[tuple[str, str]], list[str], dict]:
    """What a recipe dropped, by step and rule, the texts it kept, and its tally."""
    recipe = replace(importlib.import_module(f"experiments.data.{name}").recipe, tokenizer="bytes", held_out=0.0)
    main(recipe, argv)
    store = open_shards(Path("corpora") / name / "train")
    tally = json.loads((Path("corpora") / name / "tally.json").read_bytes())
    texts = [bytes(store.document(i)[:-1].astype("u1")).decode() for i in range(len(store))]
    return {(event[0], event[2]) for event in tally["events"] if event[1] == "dropped"}, texts, tally


@pytest.mark.parametrize("name", BUILDERS)
def test_prose(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmarks()
    Path("dump").mkdir()
    BUILDERS[name](Path("dump"), [*CLEAN, OTHER, ADDRESS, *(text for text, _ in MADE.values())])
    dropped, texts, _ = run(name, ["--path", "dump"])
    cuts = name in ("wikipedia", "books")
    rules = {rule for _, rule in MADE.values()} - ({MADE["benchmark"][1]} if cuts else set())
    if name == "stackexchange":  # the title tells them apart
        rules = (rules - {MADE["twice"][1]}) | {("minhash", "near_duplicate")}
    assert rules | {("language", "language")} <= dropped
    for number, text in enumerate(CLEAN):
        assert sum(all(part in kept for part in text) for kept in texts) == 1, number
    assert not [text for text in texts if ITEM in text or "Fremder" in text]
    assert len(texts) == len(CLEAN) + 1 + cuts
    private = [text for text in texts if "about the lantern" in text]
    assert all(("<EMAIL>" in text) == (not cuts) for text in private)


def test_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmarks()
    for repository, license in (("free", MIT), ("closed", "All rights reserved.\n")):
        Path(f"dump/{repository}").mkdir(parents=True)
        Path(f"dump/{repository}/LICENSE").write_text(license)
        Path(f"dump/{repository}/a.py").write_text(f"def {repository}(x):\n    return x + 1\n")
    Path("dump/free/b.py").write_text("def free(x):\n    return x + 1\n")
    Path("dump/free/c.py").write_text("def Free(x):\n    return x - 1\n")
    Path("dump/free/d.py").write_text('password = "hGf8Kq27xLpZ3vT9wB"\nprint(len("jane.doe@example.com"))\n')
    dropped, texts, tally = run("code", ["--path", "dump"])
    assert dropped == {("exact", "duplicate")}
    assert sorted(text.split()[1] for text in texts) == ["=", "Free(x):", "free(x):"]
    assert any("<SECRET>" in text and "jane.doe@example.com" in text for text in texts)
    assert ["source", "omitted", "license"] in [event[:3] for event in tally["events"]]
    assert ["kept", "domain", "code", "Python", 3] in tally["groups"]


def test_pretraining(tmp_path, monkeypatch):
    """A text that several sources have stays in the first of them; the report has each source's domains."""
    monkeypatch.chdir(tmp_path)
    benchmarks()
    for number, (name, build) in enumerate(BUILDERS.items()):
        path = Path("dumps") / DUMPS.get(name, name)
        path.mkdir(parents=True)
        build(path, [prose(100 + number), CLEAN[0], CLEAN[1]])
    dropped, texts, tally = run("pretraining", [])
    assert ("exact", "duplicate") in dropped
    assert len(texts) == 7
    assert {tuple(group[1:4]) for group in tally["groups"]} >= {
        ("domain", "web", "0.example"),
        ("domain", "reddit", "r/toys"),
        ("domain", "wikipedia", "de.wikipedia.org"),
    }
    page = Path("corpora/pretraining/report.html").read_text()
    assert page.count("<img") == 5
    assert "de.wikipedia.org" in page


def test_missing_benchmarks_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("dump").mkdir()
    BUILDERS["web"](Path("dump"), CLEAN)
    for argv in ([], ["--dry-run", "true"]):
        with pytest.raises(SystemExit):
            run("web", ["--path", "dump", *argv])
        assert "benchmark gsm8k='benchmarks/gsm8k/test.jsonl' does not exist" in capsys.readouterr().err
