"""The pictures of a recipe's report, each a matplotlib figure."""

import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmx.data.curate.recipe import Recipe
from lmx.data.curate.tally import Tally

PANELS = 6  # sources that get a panel of their own
BARS = 20
BEFORE, AFTER = "#c9ccd1", "#2f6f9f"


def inline(draw: Callable[[Any], None], alt: str) -> str:
    """An image element that holds what `draw` writes, as PNG, into the file it is given."""
    buffer = io.BytesIO()
    draw(buffer)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def flow(recipe: Recipe, tally: Tally) -> Any:
    """Bars of what is left after each step, by source."""
    stages: list[tuple[str, Counter[str]]] = [("read", Counter()), *((step.name, Counter()) for step in recipe.steps)]
    at = dict(stages[1:])
    for event, _, size in tally.rows():
        if event.what == "read":
            stages[0][1][event.source] += size
        elif event.what == "passed":
            at[event.step][event.source] += size
    figure = _figure(9, 1 + 0.4 * len(stages))
    axes = figure.subplots()
    left = [0.0] * len(stages)
    for source in recipe.sources:
        sizes = [found[source.name] / 1e6 for _, found in stages]
        axes.barh([name for name, _ in stages], sizes, left=left, label=source.name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("megabytes of text left after each step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def before_after(panels: Mapping[str, Mapping[str, tuple[int, int]]], what: str) -> Any:
    """Bars of documents by name, read and kept, a panel a source; of each the most frequent."""
    shown = {source: _first(names) for source, names in list(panels.items())[:PANELS]}
    heights = [len(names) + 1 for names in shown.values()]
    figure = _figure(9, 0.9 + 0.26 * sum(heights) + 0.5 * len(heights))
    every = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (source, names) in zip(every, shown.items(), strict=True):
        axes.barh([_short(name) for name in names], [read for read, _ in names.values()], color=BEFORE, label="read")
        bars = axes.barh([_short(name) for name in names], [kept for _, kept in names.values()], 0.5, color=AFTER, label="kept")
        axes.bar_label(bars, [f"{kept / read:.0%}" if read else "" for read, kept in names.values()], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(source, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    every[-1].set_xlabel(f"documents by {what}")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def lengths(panels: Mapping[str, Mapping[int, tuple[int, int]]]) -> Any:
    """Histograms of documents by their bytes in powers of two, read and kept, a panel a source."""
    shown = list(panels.items())[:PANELS]
    figure = _figure(9, 0.8 + 1.9 * len(shown))
    every = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (source, bins) in zip(every, shown, strict=True):
        edges = [end.bit_length() - 1 for end in bins]
        for which, (name, color, width) in enumerate((("read", BEFORE, 0.9), ("kept", AFTER, 0.5))):
            axes.bar([edge - 0.5 for edge in edges], [pair[which] for pair in bins.values()], width, color=color, label=name)
        axes.set_title(source, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    first, last = (f(end.bit_length() - 1 for _, bins in shown for end in bins) for f in (min, max))
    ticks = range(max(first - 1, 0), last + 1)  # what is empty stands before the first
    every[-1].set_xticks(ticks, [_bytes(1 << n) for n in ticks])
    every[-1].set_xlabel("bytes of a document, as it was read and as it is kept")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any) -> Callable[[Any], None]:
    return lambda file: figure.savefig(file, format="png", dpi=110)


def _first(names: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The most frequent, and the others together."""
    order: Sequence[str] = sorted(names, key=lambda name: (-names[name][0], name))
    shown = {name: names[name] for name in order[:BARS]}
    if rest := [names[name] for name in order[BARS:]]:
        shown[f"{len(rest):,} more"] = (sum(read for read, _ in rest), sum(kept for _, kept in rest))
    return shown


def _short(name: str) -> str:
    name = name.replace("$", r"\$")  # else mathematics
    return name if len(name) <= 40 else f"{name[:39]}…"


def _bytes(size: int) -> str:
    for unit in ("", "k", "M"):
        if size < 1024:
            return f"{size}{unit}"
        size //= 1024
    return f"{size}G"
