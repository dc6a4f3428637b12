"""An engine's timeline seen: which request read, wrote or waited when, and the pages in use meanwhile."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmx.infer.jobs import Job, Moment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"waits": "#dddddd", "reads": "#edae49", "writes": "#1f4e8c"}
"""What a request does."""
PUT_OUT = "#d1495b"


def spans(timeline: Sequence[Moment], job: Job) -> dict[str, list[tuple[float, float]]]:
    """When a request did what of `COLOURS`: start and length, in seconds since the first moment. It waits from its arrival on, and whenever a
    step leaves it out before its last."""
    origin, mine = timeline[0].start, [_doing(moment, job.number) for moment in timeline]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    last = max((i for i, doing in enumerate(mine) if doing), default=None)
    if last is None:
        return found
    at = max(job.arrived, origin)
    here = [(max(moment.start, at), doing or "waits") for moment, doing in zip(timeline[: last + 1], mine, strict=False) if moment.end > at]
    turns = [(at, "waits"), *here]
    turns = [(start, doing) for i, (start, doing) in enumerate(turns) if i == 0 or doing != turns[i - 1][1]]
    ends = [*(start for start, _ in turns[1:]), timeline[last].end]
    for (start, doing), end in zip(turns, ends, strict=True):
        if end > start:
            found[doing].append((start - origin, end - start))
    return found


def _doing(moment: Moment, number: int) -> str | None:
    if number in moment.decoded:
        return "writes"
    return "reads" if number in (one for one, _ in moment.read) else None


def draw_requests(timeline: Sequence[Moment], jobs: Sequence[Job], axes: "Axes") -> None:
    """A row a request, in the order of `jobs`."""
    origin = timeline[0].start
    for row, job in enumerate(jobs):
        for name, several in spans(timeline, job).items():
            edges = [(1e3 * begun, 1e3 * length) for begun, length in several]
            height = 0.28 if name == "waits" else 0.66
            axes.broken_barh(edges, (row - height / 2, height), facecolor=COLOURS[name], linewidth=0, label=name if row == 0 else None)
        out = [1e3 * (moment.start - origin) for moment in timeline if job.number in moment.preempted]
        axes.plot(out, np.full(len(out), row), "X", color=PUT_OUT, markersize=8, markeredgecolor="white", zorder=3)
        if found := _found(timeline, job):
            first = next(moment.start for moment in timeline if _doing(moment, job.number))
            note = f"{found} tokens found"
            axes.annotate(note, (1e3 * (first - origin), row - 0.36), fontsize=7.5, color="#555555", va="bottom", ha="left")
    axes.plot([], [], "X", color=PUT_OUT, markersize=8, markeredgecolor="white", linestyle="none", label="is put out for want of pages")
    axes.set_yticks(
        range(len(jobs)), [f"{row + 1}: {len(job.request.prompt)} + {job.request.max_new_tokens}" for row, job in enumerate(jobs)]
    )
    axes.set(ylabel="request: tokens to read + write", ylim=(len(jobs) - 0.4, -0.7))
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def _found(timeline: Sequence[Moment], job: Job) -> int:
    """Tokens of its prompt that a request found in pages when it began; 0 where it was put out before it wrote, or never began."""
    prompt, read = len(job.request.prompt), 0
    for moment in timeline:
        if job.number in moment.preempted:
            return 0
        if job.number in moment.decoded:  # a last token that is left alone is read as one that is written
            return prompt - read - (read in (0, prompt - 1))
        read += sum(tokens for one, tokens in moment.read if one == job.number)
    return prompt - read if read else 0


def draw_pages(timeline: Sequence[Moment], pool: int, axes: "Axes") -> None:
    """Pages in use, of as many as a pool has."""
    edges = [1e3 * (moment.start - timeline[0].start) for moment in timeline] + [1e3 * (timeline[-1].end - timeline[0].start)]
    axes.stairs([moment.pages for moment in timeline], edges, fill=True, color="#7fa6d6")
    axes.axhline(pool, color="#222222", linewidth=1.2, linestyle="--")
    axes.text(edges[-1], pool, f"the pool: {pool}", ha="right", va="bottom", fontsize=8.5)
    axes.set(xlabel="ms", ylabel="pages in use", ylim=(0, 1.22 * pool), xlim=(0, edges[-1]))
    axes.spines[["top", "right"]].set_visible(False)


def draw(timeline: Sequence[Moment], jobs: Sequence[Job], pool: int, figure: "Figure") -> None:
    """Requests above, pages below, over the same time.

    Args:
      pool: pages that there are (`engine.pages.count - 1`).
      figure: an empty one, which takes a size for so many requests.

    Raises:
      ValueError: a timeline without a moment, of an engine made without `trace=True`, say.
    """
    if not timeline:
        raise ValueError("the timeline is empty; make the engine with trace=True, and run it")
    figure.set_size_inches(11, 2.2 + 0.42 * len(jobs))
    figure.set_layout_engine("constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(0.42 * len(jobs) + 0.4, 1.5))
    draw_requests(timeline, jobs, above)
    draw_pages(timeline, pool, below)
