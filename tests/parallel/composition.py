"""A covering set of layouts: every two settings of different knobs that may go together do so in at least one run."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import runs
from lmx.parallel.layout import Layout
from lmx.train.experiment import Experiment
from lmx.train.objectives import CausalLM

DEVICES = 8
KNOBS: dict[str, tuple[str, ...]] = {
    "data": ("data 1", "data 2"),
    "fsdp": ("fsdp 1", "fsdp 2", "fsdp 4"),
    "zero": ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
    "tensor": ("tensor 1", "tensor 2", "tensor 2 + sequence"),
    "context": ("context 1", "ring 2", "all-to-all 2"),
    "pipeline": ("no pipeline", "GPipe 2", "1F1B 2", "interleaved 2 x 2"),
    "remat": ("remat none", "remat dots", "remat full"),
    "microbatches": ("microbatches 2", "microbatches 4"),
    "precision": ("fp32", "bf16"),
    "pattern": ("global", "local + global"),
    "experts": ("dense", "dropless experts 2", "experts with capacity 2"),
}
REFUSED = {("ring 2", "experts with capacity 2"), ("all-to-all 2", "experts with capacity 2")}
"""What goes together in no case: capacity counts an expert's slots along a whole sequence, which `context` splits."""
PAIRS = [(a, b) for a, b in itertools.combinations(KNOBS, 2)]
ROUNDS = 2
"""How often every pair is covered."""
DEPTH = 4
"""Patterns in the stack: as many as the most stages, so that few models are trained on one device."""

Case = dict[str, str]


def experiment(case: Case) -> Experiment:
    """The run of a case."""

    def degree(knob: str) -> int:
        words = case[knob].split()
        return next((int(w) for w in words if w.isdigit()), 1)

    pipeline, context = case["pipeline"], case["context"]
    rounds = 2 if "interleaved" in pipeline else 1
    period = 2 if case["pattern"] != "global" else 1
    layout = Layout(
        data=degree("data"),
        fsdp=degree("fsdp"),
        zero=int(case["zero"][-1]),
        tensor=degree("tensor"),
        sequence="sequence" in case["tensor"],
        context=degree("context"),
        exchange="alltoall" if "all-to-all" in context else "ring",
        pipeline=degree("pipeline"),
        schedule="gpipe" if "GPipe" in pipeline else "1f1b",
        rounds=rounds,
        expert=degree("experts"),
        remat=case["remat"].split()[1],
    )
    model = replace(runs.MODEL, layers=DEPTH * period)
    if period == 2:
        model = replace(model, pattern=("local", "global"), window=6, norm="rmsnorm", bias=False)
    objective = CausalLM()
    if case["experts"] != "dense":
        capacity = 1.0 if "capacity" in case["experts"] else None
        model = replace(model, experts=4, expert_mlp=8, shared_experts=int(capacity is None), expert_capacity=capacity, gated=False)
        objective = CausalLM(balance_loss=0.2, router_z_loss=0.05, z_loss=1e-3)
    return runs.experiment(
        layout=layout, model=model, objective=objective, microbatches=degree("microbatches"), precision=case["precision"]
    )


def fits(case: Case) -> bool:
    if any(a in case.values() and b in case.values() for a, b in REFUSED):
        return False
    run = experiment(case)
    return run.layout.devices <= DEVICES and run.batch // run.microbatches % run.layout.shards == 0


def cover(seed: int = 0) -> list[Case]:
    """Cases in which every pair of settings that fits on the devices appears `ROUNDS` times (greedily, the same on every machine)."""
    rng = random.Random(seed)
    wanted = {(a, x, b, y): ROUNDS for a, b in PAIRS for x in KNOBS[a] for y in KNOBS[b] if (x, y) not in REFUSED}
    cases: list[Case] = []
    while any(wanted.values()) or len(cases) < 60:
        best, most = None, -1
        a, x, b, y = max(wanted, key=wanted.get)
        for _ in range(400):
            case = {knob: rng.choice(settings) for knob, settings in KNOBS.items()} | {a: x, b: y}
            if not fits(case):
                continue
            gain = sum(wanted[p, case[p], q, case[q]] > 0 for p, q in PAIRS)
            if gain > most and case not in cases:
                best, most = case, gain
        if best is None:
            raise AssertionError(f"{x} and {y} never fit on {DEVICES} devices")
        cases.append(best)
        for p, q in PAIRS:
            key = p, best[p], q, best[q]
            wanted[key] = max(0, wanted[key] - 1)
    return cases


def sample(cases: list[Case], count: int) -> list[Case]:
    """So many of the cases, in which every setting of every knob but precision appears (greedily)."""
    chosen: list[Case] = []
    for _ in range(count):
        often = Counter(item for case in chosen for item in case.items())
        rest = [case for case in cases if case not in chosen]
        chosen.append(max(rest, key=lambda case: sum(0.1 ** often[item] for item in case.items() if item[0] != "precision")))
    return chosen


def name(case: Case) -> str:
    """What of a case is not the first setting of its knob."""
    return ", ".join(case[knob] for knob in KNOBS if case[knob] != KNOBS[knob][0]) or "plain"


def table(cases: list[Case]) -> str:
    """How many of the cases have two settings together, as Markdown."""
    settings = [(knob, s) for knob in KNOBS for s in KNOBS[knob][1:]]
    lines = ["| | " + " | ".join(s for _, s in settings) + " |", "| --- |" + " --- |" * len(settings)]
    for i, (knob, s) in enumerate(settings):
        cells = []
        for j, (other, t) in enumerate(settings):
            together = sum(c[knob] == s and c[other] == t for c in cases)
            cells.append("" if j > i or (i != j and knob == other) else str(together))
        lines.append(f"| {s} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
