"""How long a step takes at best, and as predicted: from its FLOPs, bytes and collectives, and what is known of the chip."""

import math
from dataclasses import dataclass, replace

from lmx.parallel.chips import Chip
from lmx.parallel.cost import activations
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.traffic import Traffic
from lmx.parallel.work import Work


def moved(work: Work, parameters: int, optimizer: int) -> int:
    """Bytes through a device's memory in a step, at least: the state read and written once, weights read three times a microbatch, and
    what layers give written and read."""
    layers = sum(activations(replace(work, layout=replace(work.layout, remat="none"))).values())
    weights = 3 * parameters * work.compute // work.master // work.layout.rounds
    return 2 * (parameters + optimizer) + work.microbatches * work.layout.rounds * (weights + 2 * layers)


def fetched(work: Work, host: dict[str, int]) -> int:
    """Bytes that a device reads from its host's memory in a step, or writes there, whichever are more: the state once to be moved,
    parameters besides in each forward and backward pass, activations once a backward pass."""
    passes = (work.forwards + 1) * work.ticks
    return (passes + 1) * host["parameters"] + host["optimizer"] + work.ticks * host["activations"]


@dataclass(frozen=True)
class Time:
    """Seconds of a step, each part as if it ran alone at the chip's peaks, and their sum as predicted.

    Attributes:
      compute: products, what is recomputed included.
      memory: bytes that must pass through the chip's memory: weights, activations, state.
      exposed: communication that products wait for (tensor, context, experts, stages, updated parameters).
      hidden: communication that can run beside products (ZeRO's gathers and reductions).
      host: what is read from the host's memory.
      bubble: the share of the step in which a pipeline's devices idle.
      step: predicted.
    """

    compute: float
    memory: float
    exposed: float
    hidden: float
    host: float
    bubble: float
    step: float


EFFICIENCY = 0.7
"""The share of its peak at which a chip runs large products, and of a link's at which collectives run; a guess until measured."""


def seconds(work: Work, collectives: list[Traffic], flops: float, chip: Chip, moved: int, fetched: int = 0) -> Time:
    """The roofline: `flops` of a device, `moved` bytes through its memory, `fetched` from its host's."""
    exposed = hidden = 0.0
    for one in collectives:
        spent = wire(one, work.layout) / link(one.axes, work.layout, chip) / EFFICIENCY
        if (set(one.axes) & {"tensor", "context", "expert", "pipeline"} and not one.what.startswith("gradient")) or one.times == 1:
            exposed += spent
        else:
            hidden += spent
    compute, memory_ = flops / chip.flops[work.multiplies], moved / chip.bandwidth
    bubble = 0.0 if work.flow is None else work.flow.bubble
    host = fetched / chip.host_link / EFFICIENCY
    step = max(max(compute / EFFICIENCY, memory_) / (1 - bubble), hidden, host) + exposed
    return Time(compute, memory_, exposed, hidden, host, bubble, step)


def wire(one: Traffic, layout: Layout) -> float:
    """Bytes that a device sends for a collective in a step, by the ring algorithm."""
    n = math.prod(getattr(layout, axis) for axis in one.axes)
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(one.kind, (n - 1) / n)
    return one.volume * factor


def link(axes: tuple[str, ...], layout: Layout, chip: Chip) -> float:
    """Bytes a second of the slowest link between devices of these axes: within a host where they and all inner axes fit into one."""
    first = min(AXES.index(axis) for axis in axes)
    return chip.near if math.prod(getattr(layout, a) for a in AXES[first:]) <= chip.per_host else chip.far
