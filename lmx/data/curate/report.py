"""What a recipe did, as one HTML page: counts by step and rule, by source and language, clusters of duplicates, and documents to read."""

import base64
import html
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.data.curate.recipe import Recipe, is_corpus_step, passes
from lmx.data.curate.tally import Event, Tally

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } pre { white-space: pre-wrap; background: #f6f6f4; padding: .6em }
summary { cursor: pointer } details { margin: .4em 0 } h2 { margin-top: 2em } img { max-width: 100% } .about { color: #666 }
"""


def write_report(recipe: Recipe, folder: Path, tally: Tally, splits: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `report.html` in a run's folder; `splits` are the manifests of its shards. Returns its path."""
    parts = [
        f"<h1>{html.escape(recipe.name)}</h1>",
        _totals(tally, splits),
        "<h2>Steps</h2>",
        _steps(recipe, tally),
        _figure(_flow(recipe, tally)),
        "<h2>Sources and languages</h2>",
        _sources(recipe, tally, splits),
        _languages(tally),
        _clusters(recipe, folder),
        _damage(tally),
        "<h2>Documents to read</h2>",
        "<p>Of each rule, those whose ids hash lowest: a sample that does not depend on who ran it. Long texts are cut.</p>",
        *_examples(recipe, tally),
        "<h2>Time</h2>",
        _table(["step", "CPU seconds"], [[step, f"{seconds:.1f}"] for step, seconds in tally.seconds.most_common()]),
    ]
    path = folder / "report.html"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(recipe.name)}</title><style>{STYLE}</style>" + "\n".join(parts)
    path.write_text(page, encoding="utf-8")
    return path


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        number = isinstance(value, int) or text.rstrip("%").replace(".", "", 1).isdigit()
        return f"<{tag}{' class=n' if number else ''}>{html.escape(text)}</{tag}>"

    body = "".join(f"<tr>{''.join(cell(value, 'td') for value in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell(name, 'th') for name in head)}</tr>{body}</table>"


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
    table = _table(["step", "what", "documents or times", "bytes", "of those that came"], rows)
    return table + (_table(["source", "left out by its reader", "records"], left_out) if left_out else "")


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


def _languages(tally: Tally) -> str:
    kept = _sum(tally, by=("language",), what="kept")
    if set(kept) <= {("",)}:
        return ""
    rows = [[language or "not told", documents, size] for (language,), (documents, size) in sorted(kept.items(), key=lambda i: -i[1][1])]
    return _table(["language", "documents kept", "bytes"], rows)


def _flow(recipe: Recipe, tally: Tally) -> Any:
    """Bars of what is left after each step, by source, as a figure."""
    from matplotlib.figure import Figure

    read = _sum(tally, by=("source",), what="read")
    stages = [("read", read)] + [(step.name, _sum(tally, by=("source",), what="passed", step=step.name)) for step in recipe.steps]
    figure = Figure(figsize=(9, 1 + 0.4 * len(stages)), layout="constrained")
    axes = figure.subplots()
    left = [0] * len(stages)
    for source in recipe.sources:
        sizes = [sums.get((source.name,), (0, 0))[1] / 1e6 for _, sums in stages]
        axes.barh([name for name, _ in stages], sizes, left=left, label=source.name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("megabytes of text left after each step")
    axes.legend(frameon=False)
    return figure


def _figure(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="text left after each step" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def clusters(recipe: Recipe, folder: Path, step: str) -> Counter[str]:
    """How many documents a corpus step dropped for the sake of each that stays, by its id."""
    sizes: Counter[str] = Counter()
    for number, (before, _, _) in enumerate(passes(recipe)):
        if before is not None and before.name == step:
            for path in sorted((folder / "work" / str(number)).glob("*.dropped.jsonl")):
                for line in path.read_bytes().splitlines():
                    gone = json.loads(line)
                    if gone["step"] == step and isinstance(gone["value"], str):
                        sizes[gone["value"]] += 1
    return sizes


def _clusters(recipe: Recipe, folder: Path) -> str:
    parts = []
    for step in filter(is_corpus_step, recipe.steps):
        if not (sizes := clusters(recipe, folder, step.name)):
            continue
        counts = Counter(size + 1 for size in sizes.values())
        parts.append(f"<h3>{html.escape(step.name)}: {len(sizes):,} clusters</h3>")
        parts.append(_table(["documents in a cluster", "clusters"], sorted(counts.items())[:20]))
        largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:10]
        parts.append(_table(["the one that stays", "dropped for it"], [[id, size] for id, size in largest]))
    return "<h2>Duplicates</h2>" + "".join(parts) if parts else ""


def _damage(tally: Tally) -> str:
    if not tally.damage:
        return ""
    return "<h2>Damaged places</h2>" + _table(["where", "what is wrong"], tally.damage[:200])


def _examples(recipe: Recipe, tally: Tally) -> Iterable[str]:
    order = {step.name: number for number, step in enumerate(recipe.steps)}
    words = {"dropped": "dropped by", "changed": "changed by", "passed": "kept by"}
    events = sorted(tally.shown, key=lambda event: (order.get(event.step, -1), event.what, event.reason, event.source))
    for event in events:
        shown = sorted(tally.shown[event], key=lambda item: -item[0])
        title = f"{words[event.what]} {event.step}{': ' + event.reason if event.reason else ''} ({event.source})"
        yield f"<details><summary>{html.escape(title)}</summary>{''.join(_example(event, example) for _, example in shown)}</details>"


def _example(event: Event, example: Mapping[str, Any]) -> str:
    value = example.get("value")
    about = " · ".join(str(part) for part in (example["id"], example["language"], value) if part not in (None, ""))
    after = f"<p class=about>becomes</p><pre>{html.escape(example['after'])}</pre>" if event.what == "changed" else ""
    return f"<p class=about>{html.escape(about)}</p><pre>{html.escape(example['text'])}</pre>{after}"
