"""What would make an experiment fit, or run faster: single knobs that lower a plan, and a search over layouts."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from lmx.parallel import chips, cost
from lmx.parallel.layout import Offload, divisors
from lmx.train.experiment import Experiment
from lmx.train.planning import Plan, plan

STATE = ("zero", "tensor")
KEPT = ("remat", "microbatches", "tensor", "context")
MADE = ("microbatches", "tensor", "context")
OFFLOADS = get_args(Offload)
LOWERED_BY: dict[str, tuple[str, ...]] = {
    "parameters": (*STATE, "params"),
    "optimizer": (*STATE, "optimizer"),
    "batch and the rest": ("fsdp",),
    "gradients": STATE,
    "gradients of earlier microbatches": STATE,
    "gradients so far": STATE,
    "gradients of a stage": STATE,
    "gradients of head and embedding": STATE,
    "gradient of logits": MADE,
    "gradient of the head, whole": ("tensor",),
    "update": STATE,
    "layers of a stage": STATE,
    "stage inputs": MADE,
    "on their way": MADE,
    "fetched from the host": ("tensor",),
    "embeddings": MADE,
    "layer inputs": (*MADE, "activations"),
    "products": (*KEPT, "activations"),
    "sites": (*KEPT, "activations"),
    "inputs of norms": KEPT,
    "inputs of projections": KEPT,
    "queries, keys, values": KEPT,
    "feed-forward": KEPT,
    "router": KEPT,
    "tokens of experts": KEPT,
    "attention weights": KEPT,
    "attention sums": KEPT,
    "dropout masks": KEPT,
    "states of chunks": KEPT,
    "networks of low rank": KEPT,
    "attention mask": MADE,
    "source": MADE,
    "head and loss": ("tensor",),
    "working set of a layer": MADE,
}
"""The knobs that lower each row of a plan's memory, the cheapest first."""


@dataclass(frozen=True)
class Advice:
    """A knob to turn, and what it gives."""

    knob: str
    plan: Plan


def advice(found: Plan, chip: str) -> list[Advice]:
    """Single knobs that would lower a plan's memory, those that make it fit first, and of these the fastest step first."""
    experiment, layout = found.experiment, found.experiment.layout
    knobs: dict[str, Experiment] = {}

    def turn(microbatches: int = experiment.microbatches, **degrees) -> None:
        name = [f"--layout.{knob} {_words(value)}" for knob, value in degrees.items() if value != ()]
        name += [f"--microbatches {microbatches}"] if microbatches != experiment.microbatches else []
        knobs[" ".join(name)] = replace(experiment, layout=replace(layout, **degrees), microbatches=microbatches)

    if layout.fsdp > 1:
        for zero in range(layout.zero + 1, 4):
            turn(zero=zero)
    if layout.data > 1:
        turn(data=1, fsdp=layout.fsdp * layout.data, zero=3)
    for remat in cost.LESS[layout.remat]:
        turn(remat=remat, sites=())
    for part in OFFLOADS:
        if part not in layout.offload:
            turn(offload=(*layout.offload, part))
    for factor in (2, 4, 8):
        turn(factor * experiment.microbatches)
        for axis in ("data", "fsdp"):
            if getattr(layout, axis) % factor == 0:
                for inner in ("tensor", "pipeline", *(("expert",) if experiment.model.experts else ())):
                    turn(**{inner: factor * getattr(layout, inner), axis: getattr(layout, axis) // factor})
    turned = []
    for name, changed in knobs.items():
        try:
            after = plan(changed, chip=chip)
        except ValueError:
            continue  # the model or batch does not divide so
        if after.total < found.total:
            turned.append(Advice(name, after))
    return sorted(turned, key=lambda a: (not a.plan.fits, a.plan.time.step if a.plan.fits else a.plan.total))


def shortage(experiment: Experiment, *, cpu: bool = False, rows: int = 4) -> str:
    """What to say when a device's memory was not enough: the plan's largest rows, and the knobs that lower each."""
    lines = [f"{experiment.name}: a device has not memory enough for a step (XLA: RESOURCE_EXHAUSTED)."]
    try:
        found = plan(experiment, cpu=cpu)
    except ValueError as error:
        return f"{lines[0]} There is no plan of it ({error}); raise microbatches, or set layout.remat to full"
    lines[0] += f" As planned, each holds {gb(found.total)}, most of it here:"
    for name, size in sorted(found.memory.items(), key=lambda row: -row[1])[:rows]:
        turns = [turn for knob in LOWERED_BY[name] if (turn := _turn(knob, experiment))]
        lines.append(f"  {gb(size):>10}  {name}: {', or '.join(turns)}")
    lines.append("What was saved is kept. `python -m lmx.plan` with the same flags says what would fit.")
    return "\n".join(lines)


def _turn(knob: str, experiment: Experiment) -> str | None:
    """A knob, one turn further; None where it is at its end."""
    layout = experiment.layout
    if knob == "microbatches":
        return f"--microbatches {2 * experiment.microbatches}"
    if knob == "remat":
        less = cost.LESS[layout.remat]
        return f"--layout.remat {' or '.join(less)}" if less else None
    if knob in OFFLOADS:
        return None if knob in layout.offload else f"--layout.offload {_words((*layout.offload, knob))}"
    if knob == "zero" and layout.fsdp > 1 and layout.zero < 3:
        return f"--layout.zero {layout.zero + 1}{'' if layout.zero == 2 else ' to 3'}"
    axis = "fsdp" if knob == "zero" else knob
    return f"--layout.{axis} {2 * getattr(layout, axis)}"


def _words(value) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def gb(size: float) -> str:
    """Bytes for people: 1.23 GB, 45.6 MB, 789 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} B"


def search(experiment: Experiment, devices: int, *, chip: str = "h100", best: int = 10) -> list[Plan]:
    """Plans of layouts of so many devices that fit, fastest first (all, smallest first, where none does)."""
    plans, fit = [], None
    for degrees, microbatches in candidates(experiment, devices, chips.chip(chip).per_host):
        if degrees == fit and degrees["pipeline"] == 1:
            continue  # more microbatches would only take longer
        try:
            found = plan(replace(experiment, layout=replace(experiment.layout, **degrees), microbatches=microbatches), chip=chip)
        except ValueError:
            continue
        plans.append(found)
        fit = degrees if found.fits else None
    fitting = [p for p in plans if p.fits]
    if fitting:
        return sorted(fitting, key=lambda p: p.time.step)[:best]
    return sorted(plans, key=lambda p: p.total)[:best]


def candidates(experiment: Experiment, devices: int, per_host: int) -> Iterator[tuple[dict, int]]:
    """Layouts of so many devices that are worth a plan, as fields of `Layout`, and how many microbatches.

    Tensor within a host, context for long sequences, experts over what divides them, pipelines of up to 16 stages (and of two rounds) with
    microbatches enough for them, ZeRO over whole hosts or all shards, the batch cut in powers of two.
    """
    model, batch, length = experiment.model, experiment.batch, experiment.data.length
    repeats = 1 if model.shared_layers else model.layers // len(model.pattern)
    tensors = [n for n in divisors(math.gcd(devices, per_host)) if model.heads % n == 0]
    contexts = [n for n in divisors(devices) if n <= 16 and length // n >= 2048] or [1]
    experts = [n for n in divisors(devices) if n == 1 or (model.experts and model.experts % n == 0)]
    pipelines = [(n, v) for n in divisors(devices) for v in (1, 2) if n <= 16 and repeats % (n * v) == 0 and (n > 1 or v == 1)]
    for tensor, context, expert, (pipeline, rounds) in itertools.product(tensors, contexts, experts, pipelines):
        shards, rest = divmod(devices, tensor * context * expert * pipeline)
        if rest or not shards or batch % (shards * expert):
            continue
        inner = {"tensor": tensor, "context": context, "expert": expert, "pipeline": pipeline, "rounds": rounds}
        cuts = [m for m in divisors(batch // (shards * expert)) if m & (m - 1) == 0 and (pipeline == 1 or 2 <= m // pipeline <= 8)]
        for fsdp in divisors(shards):
            if fsdp not in (1, shards) and fsdp * tensor * context * expert % per_host:
                continue
            for zero, remat, m in itertools.product((3, 1) if fsdp > 1 else (3,), cost.REMATS, cuts):
                yield inner | {"data": shards // fsdp, "fsdp": fsdp, "zero": zero, "remat": remat}, m
