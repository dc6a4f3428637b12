"""What would make an experiment fit, or run faster: single knobs that lower a plan, and a search over layouts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lmx.parallel import chips, cost
from lmx.parallel.layout import divisors
from lmx.train.experiment import Experiment
from lmx.train.planning import Plan, plan

SMALL = 10_000
"""Collectives of fewer bytes are not shown."""
SIMULATED = 2048


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
        name = [f"--layout.{knob} {value}" for knob, value in degrees.items()]
        name += [f"--microbatches {microbatches}"] if microbatches != experiment.microbatches else []
        knobs[" ".join(name)] = replace(experiment, layout=replace(layout, **degrees), microbatches=microbatches)

    if layout.fsdp > 1:
        for zero in range(layout.zero + 1, 4):
            turn(zero=zero)
    if layout.data > 1:
        turn(data=1, fsdp=layout.fsdp * layout.data, zero=3)
    for remat in cost.REMATS[cost.REMATS.index(layout.remat) + 1 :]:
        turn(remat=remat)
    for factor in (2, 4, 8):
        turn(factor * experiment.microbatches)
        for axis in ("data", "fsdp"):
            if getattr(layout, axis) % factor == 0:
                turn(**{"tensor": factor * layout.tensor, axis: getattr(layout, axis) // factor})
    turned = []
    for name, changed in knobs.items():
        try:
            after = plan(changed, chip=chip)
        except ValueError:
            continue  # the model or batch does not divide so
        if after.total < found.total:
            turned.append(Advice(name, after))
    return sorted(turned, key=lambda a: (not a.plan.fits, a.plan.time.step if a.plan.fits else a.plan.total))


def search(experiment: Experiment, devices: int, *, chip: str = "h100", best: int = 10) -> list[Plan]:
    """Plans of layouts of so many devices that fit, fastest first (all, smallest first, where none does)."""
    plans = []
    for degrees, microbatches in candidates(devices, experiment.batch, experiment.data.length, chips.chip(chip).per_host):
        try:
            plans.append(plan(replace(experiment, layout=replace(experiment.layout, **degrees), microbatches=microbatches), chip=chip))
        except ValueError:
            continue
    fitting = [p for p in plans if p.fits]
    if fitting:
        return sorted(fitting, key=lambda p: p.time.step)[:best]
    return sorted(plans, key=lambda p: p.total)[:best]


def candidates(devices: int, batch: int, length: int, per_host: int) -> Iterator[tuple[dict, int]]:
    """Layouts of so many devices that are worth a plan, as fields of `Layout`, and how many microbatches: tensor within a host, context for
    long sequences, ZeRO over whole hosts or all shards, the batch cut in powers of two."""
    long = [c for c in divisors(devices) if c <= 16 and length // c >= 2048] or [1]
    for tensor, context in itertools.product((t for t in divisors(devices) if t <= per_host), long):
        shards = devices // (tensor * context)
        if devices % (tensor * context) or batch % shards:
            continue
        for fsdp in divisors(shards):
            if fsdp not in (1, shards) and fsdp * tensor * context % per_host:
                continue
            cuts = [m for m in divisors(batch // shards) if m & (m - 1) == 0]
            for zero, remat, m in itertools.product((3, 1) if fsdp > 1 else (3,), cost.REMATS, cuts):
                yield {"data": shards // fsdp, "fsdp": fsdp, "zero": zero, "tensor": tensor, "context": context, "remat": remat}, m
