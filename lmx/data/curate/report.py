"""What a recipe did, as one HTML page: counts by step and rule, source and language, before and after, and documents to read."""

import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lmx.data.clean.bias import Kept, which_lose
from lmx.data.clean.minhash import MinHash, draw_s_curve
from lmx.data.curate import figures
from lmx.data.curate.clusters import clusters
from lmx.data.curate.recipe import Recipe, is_corpus_step
from lmx.data.curate.records import read_records
from lmx.data.curate.tally import Event, Tally
from lmx.data.curate.work import Place
from lmx.data.documents import Document
from lmx.data.fertility import COLUMNS, fertility
from lmx.data.tokenizers import Tokenizer

LONG = 200  # rows of a table that may have any number
MEASURED = (4, 50)  # shards of a source that a tokenizer is measured on, evenly spread, and documents of each
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
td { overflow-wrap: anywhere } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .6em } summary { cursor: pointer }
details { margin: .4em 0 } h2 { margin-top: 2em } img { max-width: 100% } .about { color: #666 }
"""


def write_report(
    recipe: Recipe, folder: Path, tally: Tally, splits: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, about: Mapping[str, Any]
) -> Path:
    """Write `report.html` in a run's folder; `splits` are the manifests of its shards, `about` is its own. Returns its path."""
    parts = [
        f"<h1>{html.escape(recipe.name)}</h1>",
        _totals(tally, splits),
        "<h2>Steps</h2>",
        figures.inline(figures.save(figures.flow(recipe, tally)), "text left after each step"),
        _steps(recipe, tally),
        _rules(recipe, tally),
        "<h2>Sources</h2>",
        _sources(recipe, tally, splits),
        _before_and_after(recipe, tally),
        _terms(recipe, tally),
        _tokens(folder, splits, tokenizer),
        _clusters(recipe, folder),
        _damage(tally),
        "<h2>Documents to read</h2>",
        "<p>Of each rule, source and language those whose ids hash lowest: a sample that does not depend on who ran it. Long texts are cut.</p>",
        *_examples(recipe, tally),
        _time(tally),
        _about(about),
    ]
    path = folder / "report.html"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(recipe.name)}</title><style>{STYLE}</style>" + "\n".join(parts)
    path.write_bytes(page.encode(errors="backslashreplace"))  # file names may be no text
    return path


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        number = isinstance(value, int) or text.rstrip("%").replace(".", "", 1).isdigit()
        return f"<{tag}{' class=n' if number else ''}>{html.escape(text)}</{tag}>"

    rows = list(rows)
    body = "".join(f"<tr>{''.join(cell(value, 'td') for value in row)}</tr>" for row in rows[:LONG])
    more = f"<p class=about>and {len(rows) - LONG:,} more</p>" if len(rows) > LONG else ""
    return f"<table><tr>{''.join(cell(name, 'th') for name in head)}</tr>{body}</table>{more}"


def _details(title: str, *content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{''.join(content)}</details>"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def _sum(tally: Tally, *, by: Sequence[str], what: str, **where: str) -> dict[tuple[str, ...], tuple[int, int]]:
    """Documents and bytes of events, grouped by fields of them."""
    sums: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for event, documents, size in tally.rows(what=what):
        if all(getattr(event, name) == value for name, value in where.items()):
            entry = sums[tuple(getattr(event, name) for name in by)]
            entry[0] += documents
            entry[1] += size
    return {key: (documents, size) for key, (documents, size) in sums.items()}


def _totals(tally: Tally, splits: Mapping[str, Mapping[str, Any]]) -> str:
    read, kept = (_sum(tally, by=(), what=what).get((), (0, 0)) for what in ("read", "kept"))
    rows = [["read", read[0], read[1], "", ""]]
    rows += [["kept", kept[0], kept[1], _percent(kept[0], read[0]), _percent(kept[1], read[1])]]
    table = _table(["", "documents", "bytes", "of the documents", "of the bytes"], rows)
    made = [[name, part["documents"], part["tokens"], f"{part['bytes'] / max(part['tokens'], 1):.2f}"] for name, part in splits.items()]
    return table + _table(["shards", "documents", "tokens", "bytes per token"], made)


def _steps(recipe: Recipe, tally: Tally) -> str:
    rows = []
    for step in recipe.steps:
        dropped = _sum(tally, by=("reason",), what="dropped", step=step.name)
        passed = _sum(tally, by=(), what="passed", step=step.name).get((), (0, 0))
        came = passed[0] + sum(n for n, _ in dropped.values())
        rows.append([step.name, "came", came, passed[1] + sum(size for _, size in dropped.values()), ""])
        for (reason,), (documents, size) in sorted(dropped.items(), key=lambda item: -item[1][0]):
            rows.append(["", f"dropped: {reason}", documents, size, _percent(documents, came)])
        for (reason,), (times, size) in _sum(tally, by=("reason",), what="changed", step=step.name).items():
            rows.append(["", f"changed: {reason}", times, size, ""])
    omitted = _sum(tally, by=("source", "reason"), what="omitted") | _sum(tally, by=("source", "reason"), what="damaged")
    left_out = [[source, reason, documents] for (source, reason), (documents, _) in sorted(omitted.items())]
    note = "<p class=about>Of what changed, the number of changes and by how many bytes their documents became shorter.</p>"
    table = note + _table(["step", "what", "documents or times", "bytes", "of those that came"], rows)
    return table + (_table(["source", "left out by its reader", "records"], left_out) if left_out else "")


def _rules(recipe: Recipe, tally: Tally) -> str:
    """What each rule dropped and kept, by source and language."""
    order = {step.name: number for number, step in enumerate(recipe.steps)}
    came = Counter()
    for event, documents, _ in tally.rows():
        if event.what in ("passed", "dropped"):
            came[event.step, event.source, event.language] += documents
    rows = [
        [e.step, e.reason, e.source, e.language, documents, size, _percent(documents, came[e.step, e.source, e.language])]
        for e, documents, size in sorted(tally.rows(what="dropped"), key=lambda row: (order[row[0].step], row[0]))
    ]
    head = ["step", "rule", "source", "language", "documents dropped", "bytes", "of those that came"]
    return _details("by source and language", _table(head, rows)) if rows else ""


def _sources(recipe: Recipe, tally: Tally, splits: Mapping[str, Mapping[str, Any]]) -> str:
    read, kept = (_sum(tally, by=("source",), what=what) for what in ("read", "kept"))
    tokens: Counter[str] = Counter()
    for part in splits.values():
        for shard in part["shards"]:
            tokens[shard["corpus"]] += shard["tokens"]
    rows = []
    for source in recipe.sources:
        a, b = read.get((source.name,), (0, 0)), kept.get((source.name,), (0, 0))
        rows.append([source.name, a[0], b[0], _percent(b[0], a[0]), a[1], b[1], _percent(b[1], a[1]), tokens[source.name]])
    return _table(["source", "documents read", "kept", "", "bytes read", "kept", "", "tokens"], rows)


def _before_and_after(recipe: Recipe, tally: Tally) -> str:
    """Languages, domains and lengths of what was read and what is kept, by source."""
    found = {kind: {source.name: defaultdict(lambda: [0, 0]) for source in recipe.sources} for kind in ("language", "domain", "length")}
    for event, documents, _ in tally.rows():  # what is read is at last dropped or kept, and then its language is known, if it ever is
        if event.what in ("dropped", "kept"):
            counts = found["language"][event.source][event.language or "not told"]
            counts[0] += documents
            counts[1] += documents * (event.what == "kept")
    for group, documents in sorted(tally.groups.items()):
        if group.kind in found:
            found[group.kind][group.source][group.value][group.what == "kept"] += documents
    parts = []
    for kind, title in (("language", "Languages"), ("domain", "Domains")):
        panels = {s: {name: (a, b) for name, (a, b) in names.items()} for s, names in found[kind].items() if set(names) - {"not told"}}
        if panels:
            parts += [f"<h3>{title}</h3>", figures.inline(figures.save(figures.before_after(panels, kind)), f"documents by {kind}")]
            rows = [[s, name, a, b, _percent(b, a)] for s, names in panels.items() for name, (a, b) in _by_size(names)]
            parts.append(_details("in numbers", _table(["source", kind, "documents read", "kept", ""], rows)))
    bins = {
        s: {int(size): tuple(pair) for size, pair in sorted(names.items(), key=lambda i: int(i[0]))} for s, names in found["length"].items()
    }
    bins = {source: sizes for source, sizes in bins.items() if sizes}
    return "".join([*parts, "<h3>Lengths</h3>", figures.inline(figures.save(figures.lengths(bins)), "documents by length")])


def _by_size(names: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    return sorted(names.items(), key=lambda item: (-item[1][0], item[0]))


def _terms(recipe: Recipe, tally: Tally) -> str:
    """Which identity and dialect terms lose most."""
    losses = which_lose(tally.terms("read"), tally.terms("kept"))
    if not losses.terms:
        return ""

    def row(source: str, term: Kept) -> list[Any]:
        p = f"{term.p:.2g}" if term.p < 1 else "1"
        return [source, term.term, term.before, term.after, f"{term.rate:.1%}", f"{term.low:.1%} to {term.high:.1%}", p, "yes" * term.loses]

    head = ["source", "term", "documents read", "kept", "", "95% interval", "p, corrected", "loses significantly"]
    rows = [row("all", term) for term in losses.terms[: max(10, len(losses.losing))]]
    for source in recipe.sources if len(recipe.sources) > 1 else ():
        rows += [row(source.name, term) for term in which_lose(tally.terms("read", source.name), tally.terms("kept", source.name)).losing]
    return (
        "<h2>Who loses</h2><p>The documents that name an identity or speak a dialect, as they were read, against all others: the terms that lose "
        f"most, over all and in a source, of {len(losses.terms)} (Fisher's exact test, corrected for their number after Holm). Of all "
        f"documents {_percent(losses.after, losses.before)} are kept.</p>{_table(head, rows)}"
    )


def _tokens(folder: Path, splits: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """How the tokenizer treats each source: bytes per token of all, the rest on some."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    units: dict[str, list[int]] = defaultdict(list)
    for part in splits.values():
        for shard in part["shards"]:
            sums[shard["corpus"]].update({name: shard[name] for name in ("documents", "tokens", "bytes")})
            units[shard["corpus"]].append(shard["number"])
    last = max(int(path.name) for path in (folder / "work").glob("[0-9]*"))
    rows = fertility(_some(folder, last, units), tokenizer)
    table = [[s, n["documents"], n["tokens"], f"{n['bytes'] / max(n['tokens'], 1):.2f}"] for s, n in sorted(sums.items())]
    measured = [[row.group, row.documents, *(form.format(value(row)) for form, value in COLUMNS.values())] for row in rows]
    return (
        f"<h2>Tokens</h2>{_table(['source', 'documents', 'tokens', 'bytes per token'], table)}"
        f"<p class=about>Measured on some documents of each source:</p>{_table(['source', 'documents', *COLUMNS], measured)}"
    )


def _some(folder: Path, last: int, units: Mapping[str, Sequence[int]]) -> Iterator[Document]:
    for source, numbers in sorted(units.items()):
        several = sorted(set(numbers))
        for number in several[:: -(-len(several) // MEASURED[0])]:
            for record in islice(read_records(Place(folder).of(last, number, "kept.jsonl")), MEASURED[1]):
                yield replace(record.document, source=source)


def _clusters(recipe: Recipe, folder: Path) -> str:
    parts = []
    for step in filter(is_corpus_step, recipe.steps):
        found = clusters(recipe, folder, step.name)
        if isinstance(step, MinHash):
            curve = figures.inline(lambda file, step=step: draw_s_curve(step, file), "probability to be found, by similarity")
            parts.append(f"<h3>{html.escape(step.name)}</h3><p>Pairs are found by {step.bands} bands of {step.rows} rows:</p>{curve}")
        if found is None:
            continue
        parts.append(f"<h3>{html.escape(step.name)}: {found.sizes.total():,} clusters</h3>")
        parts.append(_table(["documents in a cluster", "clusters"], sorted(found.sizes.items())))
        for size, kept, dropped in found.largest(10):
            texts = (
                f"<p class=about>{html.escape(f'{what} {r.document.id}')}</p>{_text(r.document.text[:600])}"
                for what, r in [("stays:", kept), *(("goes:", record) for record in dropped)]
            )
            parts.append(_details(f"{size:,} documents: {kept.document.id}", *texts))
    return "<h2>Duplicates</h2>" + "".join(parts) if parts else ""


def _damage(tally: Tally) -> str:
    if not tally.damage:
        return ""
    return "<h2>Damaged places</h2>" + _table(["where", "what is wrong"], tally.damage)


def _examples(recipe: Recipe, tally: Tally) -> Iterable[str]:
    order = {step.name: number for number, step in enumerate(recipe.steps)}
    words = {"dropped": "dropped by", "changed": "changed by", "passed": "kept by"}
    for event in sorted(tally.shown, key=lambda event: (order.get(event.step, -1), event)):
        shown = sorted(tally.shown[event], key=lambda item: -item[0])
        where = ", ".join(filter(None, (event.source, event.language)))
        title = f"{words[event.what]} {event.step}{': ' + event.reason if event.reason else ''} ({where})"
        yield _details(title, *(_example(event, example) for _, example in shown))


def _example(event: Event, example: Mapping[str, Any]) -> str:
    about = " · ".join(str(part) for part in (example["id"], example.get("value")) if part not in (None, ""))
    after = f"<p class=about>becomes</p>{_text(example['after'])}" if event.what == "changed" else ""
    return f"<p class=about>{html.escape(about)}</p>{_text(example['text'])}{after}"


def _text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _time(tally: Tally) -> str:
    whole = tally.seconds.total()
    rows = [[step, f"{seconds:.1f}", _percent(seconds, whole)] for step, seconds in tally.seconds.most_common()]
    return "<h2>Time</h2>" + _table(["step", "CPU seconds", "of all"], rows)


def _about(about: Mapping[str, Any]) -> str:
    """What it was made with: enough to make it again, and to see that it is the same."""
    rows = [["recipe", about["fingerprint"]], *([split, part["content"]] for split, part in about["splits"].items())]
    rows += [["tokenizer", f"{about['tokenizer']['name']} {about['tokenizer']['fingerprint']}"]]
    return "".join(
        (
            "<h2>Made of</h2>",
            _table(["", "SHA-256"], rows),
            _details("recipe", _text(json.dumps(about["recipe"], indent=2, ensure_ascii=False))),
            _details("versions", _table(["package", "version"], about["versions"].items())),
            _details("files read", _table(["file", "SHA-256"], about["sources"].items())),
        )
    )
