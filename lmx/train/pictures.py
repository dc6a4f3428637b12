"""A plan seen: memory of a device by layout, and who holds what on the mesh."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmx.parallel.layout import AXES, Layout
from lmx.parallel.pipeline import order
from lmx.train.advice import KEPT, LOWERED_BY, gb
from lmx.train.experiment import Experiment
from lmx.train.planning import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameters": "#1f4e8c",
    "optimizer": "#7fa6d6",
    "gradients": "#d1495b",
    "kept activations": "#edae49",
    "pipeline": "#66a182",
    "head and loss": "#8d6a9f",
    "at work": "#9a9a9a",
    "the rest": "#d0d0d0",
}
"""Parts of a device's memory, in the order in which they are stacked."""
SHOWN, ACROSS = 64, 8
"""Devices of a mesh that are drawn at most, and how many of them side by side."""


def part(row: str) -> str:
    """The part of the picture that a row of a plan's memory belongs to."""
    if row in COLOURS:
        return row
    if row.startswith("gradient") or row == "update":
        return "gradients"
    if row in ("stage inputs", "on their way", "layers of a stage"):
        return "pipeline"
    if row == "layer inputs" or {*KEPT} <= {*LOWERED_BY.get(row, ())}:
        return "kept activations"
    return "at work" if row in ("attention mask", "working set of a layer", "fetched from the host") else "the rest"


def parts(plan: Plan) -> dict[str, int]:
    """Bytes of a plan's memory by part of the picture; they sum to its total."""
    found = dict.fromkeys(COLOURS, 0)
    for row, size in plan.memory.items():
        found[part(row)] += size
    return found


def draw_memory(plans: Sequence[Plan], axes: "Axes") -> None:
    """A bar a plan, stacked by part, with the chip's memory as a line."""
    from matplotlib.transforms import ScaledTranslation

    rows = np.arange(len(plans))  # not the labels: two plans may look alike in them
    memory, fullest = plans[0].chip.memory / 1e9, max(plan.total for plan in plans) / 1e9
    beyond = fullest < 0.35 * memory  # too far right to show
    most = fullest if beyond else max(fullest, memory)
    left = np.zeros(len(plans))
    for name, colour in COLOURS.items():
        sizes = np.array([parts(plan)[name] for plan in plans]) / 1e9
        if sizes.max() < 0.002 * most:
            left += sizes
            continue
        axes.barh(rows, sizes, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.62, label=name)
        ink = "white" if name in ("parameters", "gradients", "head and loss", "at work") else "#222222"
        for y, (start, size) in enumerate(zip(left, sizes, strict=True)):
            if size > 0.045 * most:
                axes.text(
                    start + size / 2, y, f"{size:.1f}" if most < 200 else f"{size:.0f}", ha="center", va="center", color=ink, fontsize=8
                )
        left += sizes
    for y, plan in enumerate(plans):
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(left[y] + 0.01 * most, y, gb(plan.total), va="center", fontsize=8.5, fontweight="bold", bbox=behind, zorder=3)
    if not beyond:
        axes.axvline(memory, color="#222222", linewidth=1.4, linestyle="--")
    where, side = (1.13 * most, "right") if beyond else (memory, "left")
    axes.text(where, -0.62, f" {gb(plans[0].chip.memory)} of memory{' →' if beyond else ''}", fontsize=8.5, va="center", ha=side)
    axes.set(xlabel="GB on each device, at the fullest moment of a step", xlim=(0, 1.13 * most))
    axes.set_yticks(rows, [label(plan.experiment) for plan in plans])
    axes.set_ylim(len(plans) - 0.45, -0.8)
    axes.set_title(f"Memory by layout: {plans[0].experiment.name} on {plans[0].chip.kind}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    below = axes.transAxes + ScaledTranslation(0, -0.55, axes.figure.dpi_scale_trans)
    axes.legend(ncols=8, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, frameon=False, fontsize=8.5, columnspacing=1.2)


def label(experiment: Experiment) -> str:
    """A layout in a few words, on two lines or three."""
    layout = experiment.layout
    degrees = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1) or "one device"
    split = f"ZeRO-{layout.zero}, " if layout.fsdp > 1 else ""
    waiting = f"\nin the host: {', '.join(layout.offload)}" if layout.offload else ""
    return f"{degrees}\n{split}remat {layout.remat}, microbatches {experiment.microbatches}{waiting}"


@dataclass(frozen=True)
class Holding:
    """What one device holds.

    Attributes:
      place: its index along each axis of the mesh.
      layers: of its pipeline stages, first and last of each run.
      part: which part of the weights it multiplies with; devices of one part are replicas of each other there, or share it out by ZeRO.
    """

    place: dict[str, int]
    layers: tuple[tuple[int, int], ...]
    part: int


def holdings(layout: Layout, layers: int, *, most: int = SHOWN) -> list[Holding]:
    """What the first devices of a layout hold, in the mesh's order."""
    degrees = [getattr(layout, axis) for axis in AXES]
    per_stage = layers // (layout.pipeline * layout.rounds)
    stages = order(layout, layout.pipeline * layout.rounds)
    found = []
    for device in range(min(layout.devices, most)):
        place = dict(zip(AXES, (int(i) for i in np.unravel_index(device, degrees)), strict=True))
        first = place["pipeline"] * layout.rounds
        runs = [(stage * per_stage, (stage + 1) * per_stage - 1) for stage in stages[first : first + layout.rounds]]
        number = (place["pipeline"] * layout.expert + place["expert"]) * layout.tensor + place["tensor"]
        found.append(Holding(place, tuple(runs), number))
    return found


def draw_mesh(plan: Plan, axes: "Axes") -> None:
    """A square a device, a row for each eight neighbours: one colour for the devices of a stage, one shade for each part of its weights."""
    layout = plan.experiment.layout
    found = holdings(layout, plan.experiment.model.layers)
    rows = -(-len(found) // ACROSS)
    for device, held in enumerate(found):
        row, column = divmod(device, ACROSS)
        colour = _colour(held, layout)
        axes.add_patch(_square(column, row, colour))
        lines = [f"device {device}", *_says(held, layout)]
        axes.text(column + 0.5, row + 0.5, "\n".join(lines), ha="center", va="center", fontsize=6.4, linespacing=1.25, color="#222222")
    axes.set_xlim(0, min(ACROSS, len(found)))
    axes.set_ylim(rows, 0)
    axes.set_axis_off()
    shown = f", the first {len(found)} shown" if len(found) < layout.devices else ""
    title = (
        f"Who holds what: {layout.devices:,} devices{shown} ({label(plan.experiment).splitlines()[0]}); one colour, one part of the weights"
    )
    axes.set_title(title, loc="left", fontsize=11)


def _says(held: Holding, layout: Layout) -> list[str]:
    """What a square says of its device."""
    runs = ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in held.layers[:2])
    lines = [f"layers {runs}{' …' if len(held.layers) > 2 else ''}"] if layout.pipeline > 1 else []
    words = {"tensor": "tensor part", "expert": "experts, part", "context": "sequence part", "fsdp": "rows, shard", "data": "replica"}
    words["fsdp"] = "ZeRO shard" if layout.zero else "rows, part"
    lines += [f"{words[axis]} {held.place[axis] + 1}/{getattr(layout, axis)}" for axis in words if getattr(layout, axis) > 1]
    return lines[:4] or ["everything"]


def _colour(held: Holding, layout: Layout) -> tuple[float, float, float]:
    """A hue for a stage, a lightness for a part within it."""
    parts_of_stage = layout.expert * layout.tensor
    within = held.part % parts_of_stage / max(1, parts_of_stage - 1)
    hue = 0.58 + held.place["pipeline"] / layout.pipeline
    return colorsys.hls_to_rgb(hue % 1, 0.9 - 0.26 * within, 0.55)


def _square(column: int, row: int, colour: tuple[float, float, float]):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((column + 0.05, row + 0.06), 0.9, 0.88, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, linewidth=0)


def draw(plans: Sequence[Plan], path: str | Path) -> Path:
    """Draws plans side by side, and the mesh of the first, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(plans[0].experiment.layout.devices, SHOWN)
    heights = (1.7 + 0.52 * len(plans), 0.5 + 0.82 * -(-shown // ACROSS))
    figure = Figure(figsize=(11, sum(heights)), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    draw_memory(plans, above)
    draw_mesh(plans[0], below)
    FigureCanvasAgg(figure).print_png(path)
    return Path(path)
