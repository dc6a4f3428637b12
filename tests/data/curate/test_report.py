"""The report: all that it promises, for any text safely; and who loses, counted by the texts as they were read."""

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from corpora import Lines, Long, Once, contents, counts
from lmx.data.clean.bias import count_terms, which_lose
from lmx.data.clean.exact import Exact
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.curate import Recipe, curate
from lmx.data.curate.clusters import clusters
from lmx.data.curate.door import show_forecast
from lmx.data.curate.dryrun import dry_run
from lmx.data.curate.tally import Group, Tally, from_json
from lmx.data.documents import Document
from lmx.data.sources import Texts
from lmx.data.sources.source import Unit


@dataclass(frozen=True)
class Blank(Lines):
    """A document without text."""

    def read(self, unit: Unit) -> Iterator[Document]:
        yield Document(unit.name, "", unit.paths[0])


@dataclass(frozen=True)
class Marked:
    """Drops what is marked, and makes other texts all the same but for their number."""

    name: str = "marked"

    def __call__(self, document: Document) -> Verdict:
        mark, number = document.text.split()[-2:]
        return Drop("mark", mark) if mark == "zzz" else Change(f"nothing of it is left but a number, {number} </pre><script>", {"all": 1})


def named(folder: Path) -> tuple[Path, list[str]]:
    """A corpus in which those that name a woman are marked three times in four, others once in four."""
    folder.mkdir()
    texts = [
        f"The old {'woman' if i % 2 else 'man'} went home {'zzz' if i // 2 % 4 < (3 if i % 2 else 1) else 'yyy'} {i}" for i in range(400)
    ]
    for part in range(4):
        (folder / f"{part}.txt").write_text("\n".join(texts[part::4]) + "\n")
    return folder, texts


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    raw, texts = named(folder / "raw")
    plan = Recipe("<b>lost", (Lines(str(raw)), Lines(str(raw), name="again & again")), (Marked(), Exact()))
    curate(plan, folder / "corpus")
    return plan, folder / "corpus", texts


def test_who_loses(lost, capsys):
    plan, folder, texts = lost
    tally = from_json(counts(folder))
    kept = [text for text in texts if "zzz" not in text]
    before, after = count_terms(texts), count_terms(kept)
    assert tally.terms("read", "lines") == replace(before, mentions={})
    assert tally.terms("kept", "lines") == replace(after, mentions={})
    assert tally.terms("read").documents == 800
    assert tally.terms("kept", "again & again").documents == 0  # all are duplicates of the first source's
    losses = which_lose(before, after)
    assert [term.term for term in losses.losing] == ["gender/woman"]
    page = (folder / "report.html").read_text()
    assert re.search(
        r"lines</td><td>gender/woman</td><td class=n>200</td><td class=n>50</td><td class=n>25.0%</td><td>19.5% to 31.4%", page
    )

    forecast = dry_run(replace(plan, sources=plan.sources[:1]), documents=10**6, units=10**6)
    assert str(forecast.terms) == str(which_lose(replace(before, mentions={}), replace(after, mentions={})))
    show_forecast(plan, dry_run(plan), workers=1)
    out = capsys.readouterr().out
    assert re.search(r"gender/woman +400 +50 +12\.5%\*", out)
    assert "lines: gender/woman loses, 25.0% kept (19.5% to 31.4%)" in out


def test_terms_change_no_shard(lost, tmp_path):
    plan, folder, _ = lost
    curate(replace(plan, identity_terms=False), tmp_path / "corpus")
    shards = {name: digest for name, digest in contents(folder).items() if "manifest" not in name}
    assert {name: digest for name, digest in contents(tmp_path / "corpus").items() if "manifest" not in name} == shards
    assert from_json(counts(tmp_path / "corpus")).terms("read").having == {}
    assert "Who loses" not in (tmp_path / "corpus/report.html").read_text()


class Page(HTMLParser):
    """Elements of a page, and what they refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.links, self.text = Counter(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.links += [value for name, value in attributes if name in ("src", "href", "onclick", "onerror")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_safe(lost):
    _, folder, _ = lost
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == page.tags["b"] == 0
    assert all(base64.b64decode(link.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG") for link in page.links)
    assert "</pre><script>" in page.text  # as text
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for part in (
        "dropped by marked: mark (again & again)",
        "kept by exact (lines)",
        "changed by marked: all (lines)",
        manifest["fingerprint"],
        manifest["splits"]["train"]["content"],
        "exact: 200 clusters",
        "tokens per word",
        *manifest["sources"],
        *manifest["versions"],
    ):
        assert part in page.text, part


def test_clusters_are_those_that_were_planted(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    sizes = {f"{word} is here": n for word, n in (("one", 1), ("two", 2), ("three", 3), ("five", 5), ("another five", 5))}
    texts = [text for _ in range(5) for text, n in sizes.items() if _ < n]
    for part in range(3):
        (raw / f"{part}.txt").write_text("\n".join(texts[part::3]) + "\n")
    plan = Recipe("planted", (Lines(str(raw)),), (Long(), Once(), MinHash()))
    curate(plan, tmp_path / "corpus")
    found = clusters(plan, tmp_path / "corpus", "once")
    assert found.sizes == {2: 1, 3: 1, 5: 2}
    for size, kept, dropped in found.largest(10, members=9):
        assert sizes[kept.document.text] == size == len(dropped) + 1
        assert {record.document.text for record in dropped} == {kept.document.text}
        assert len({record.document.id for record in (kept, *dropped)}) == size
    assert clusters(plan, tmp_path / "corpus", "minhash") is None
    assert "14 bands of 8 rows" in (tmp_path / "corpus/report.html").read_text()


def test_empty_and_long_texts(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "0.txt").write_text("\n" + "a word " * 20_000 + "\nshort\n")
    curate(Recipe("lengths", (Texts(str(raw)), Blank(str(raw), name="blank"))), tmp_path / "corpus")
    assert from_json(counts(tmp_path / "corpus")).groups == {
        Group(what, "length", source, size): 1 for what in ("read", "kept") for source, size in (("texts", str(1 << 18)), ("blank", "1"))
    }


def test_examples_are_ten_for_each_source_and_language(lost):
    _, folder, _ = lost
    shown = from_json(counts(folder)).shown
    assert {(event.what, event.source) for event in shown} >= {(w, s) for w in ("passed", "dropped") for s in ("lines", "again & again")}
    assert {len(examples) for event, examples in shown.items() if event.step == "marked"} == {10}


def test_rare_domains_become_one(monkeypatch):
    monkeypatch.setattr("lmx.data.curate.tally.DOMAINS", 10)
    whole = Tally(0)
    for part in range(6):
        tally = Tally(0)
        tally.groups.update({Group("read", "domain", "web", f"{part}-{i}"): 1 for i in range(20)})
        tally.groups.update({Group("read", "domain", "web", name): 5 for name in ("a", "b")} | {Group("kept", "domain", "web", "a"): 4})
        whole += tally
    assert len(whole.groups) < 50
    assert whole.groups.total() == 6 * (20 + 14)
    assert whole.groups[Group("read", "domain", "web", "a")] == 30
    assert whole.groups[Group("kept", "domain", "web", "a")] == 24
    assert whole.groups[Group("read", "domain", "web", "(others)")] > 40
