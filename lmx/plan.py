"""What will a step cost? Bytes, communication, FLOPs and time of each device, before anything runs.

`python -m lmx.plan experiments.NAME [--devices 64] [--chip h100] [--compile] [--search] [--picture plan.png] [...]` takes the knobs of the
experiment. Nothing is allocated, so it runs on a laptop for thousands of devices. `--devices` widens (or narrows) `layout.fsdp` to as many;
`--compile` adds what the compiler makes of it, for the real chip where the extra `cuda` is installed (no GPU is needed) and else for
simulated CPU devices; `--search` ranks layouts of as many devices; `--picture` draws memory by layout, and who holds what.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from lmx.core.config import ConfigError, command_line, exits_with_one_line
from lmx.parallel import absent, chips, hlo, roofline
from lmx.parallel.layout import AXES, Layout
from lmx.train.advice import Advice, advice, gb, search
from lmx.train.experiment import Experiment, columns, named
from lmx.train.pictures import draw
from lmx.train.planning import Plan, compared, plan, settled

SMALL = 10_000
"""Collectives of fewer bytes are not shown."""
SIMULATED = 2048


@dataclass(frozen=True)
class Options:
    """What the door takes beside the experiment's knobs."""

    devices: int = 0
    chip: str = "h100"
    compile: bool = False
    search: bool = False
    picture: str = ""


def options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The door's own flags, and the rest.

    Raises:
      ConfigError: a flag without its value, or one that is no number.
    """
    chosen, rest, tokens = Options(), [], iter(argv)
    for token in tokens:
        name, joined, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in ("devices", "chip", "compile", "search", "picture"):
            rest.append(token)
        elif name in ("compile", "search"):
            chosen = replace(chosen, **{name: True})
        else:
            value = value if joined else next(tokens, "")
            if name == "devices" and (not value.isdigit() or int(value) < 1):
                raise ConfigError(f"--devices {value}: give the number of devices, 64 say")
            if name == "picture" and not value.endswith(".png"):
                raise ConfigError(f"--picture {value}: give a file to draw to, plan.png say")
            chosen = replace(chosen, **{name: int(value) if name == "devices" else value})
    chips.chip(chosen.chip)
    return chosen, rest


def widened(experiment: Experiment, devices: int) -> Experiment:
    """The experiment on as many devices: `layout.fsdp` takes what the other axes leave.

    Raises:
      ConfigError: they do not divide.
    """
    layout = experiment.layout
    if devices in (0, layout.devices):
        return experiment
    others = layout.devices // layout.fsdp
    if devices % others:
        degrees = " x ".join(f"{a} {getattr(layout, a)}" for a in AXES if getattr(layout, a) > 1 and a != "fsdp")
        raise ConfigError(f"--devices {devices} is not divisible by {others} ({degrees}); change one of them")
    return replace(experiment, layout=replace(layout, fsdp=devices // others))


def main(argv: Sequence[str] | None = None) -> None:
    """The door: prints the plan. Leaves with 1 where it does not fit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with exits_with_one_line():
        experiment, rest = named(argv, "python -m lmx.plan experiments.NAME [--devices 64] [--chip h100] ...")
        chosen, rest = options(rest)
    experiment, _ = command_line(experiment, rest, description=__doc__)
    with exits_with_one_line():
        if not chosen.search:
            experiment = widened(experiment, chosen.devices)
        _start(chosen, experiment.layout.devices)
        if chosen.search:
            devices = chosen.devices or experiment.layout.devices
            ranked = search(settled(replace(experiment, layout=Layout())), devices, chip=chosen.chip)
            _print_search(ranked)
            if chosen.picture:
                draw(ranked, chosen.picture)
            return
        found = plan(experiment, chip=chosen.chip, compiled=chosen.compile, cpu=chosen.compile and not absent.prepared())
    _print(found)
    turns = advice(found, chosen.chip) if chosen.picture or not found.fits else []
    if chosen.picture:
        draw([found, *(one.plan for one in turns[:5])], chosen.picture)
    if not found.fits:
        _print_advice(turns)
        sys.exit(1)


def _start(chosen: Options, devices: int) -> None:
    """Chooses what JAX is to run on, before it starts."""
    if chosen.compile and absent.installed() and chosen.chip in absent.TARGETS:
        absent.prepare()
        return
    jax.config.update("jax_platforms", "cpu")
    if chosen.compile:
        if devices > SIMULATED:
            raise ConfigError(f"XLA:CPU compiles for {SIMULATED} simulated devices at most, not {devices}; {absent.HINT}")
        jax.config.update("jax_num_cpu_devices", devices)


def _print(found: Plan) -> None:
    layout, made, t = found.experiment.layout, found.compiled, found.time
    degrees = ", ".join(f"{a} {getattr(layout, a)}" for a in AXES if getattr(layout, a) > 1) or "one device"
    title = f"{found.experiment.name} on {layout.devices} x {found.chip.kind}: {degrees}, zero {layout.zero}, remat {layout.remat}"
    rows = [[name, gb(size)] for name, size in found.memory.items()]
    rows.append(["total", f"{gb(found.total)} of {gb(found.chip.memory)}{'' if found.fits else ': it does not fit'}"])
    titles = ["each device holds", "planned"]
    if made is not None:
        titles.append(f"compiled ({made.target}, {made.seconds:.0f} s)")
        state = len([name for name in ("parameters", "optimizer", "batch and the rest") if name in found.memory])
        rows = [[*row, ""] for row in rows]
        rows[state - 1][2], rows[-2][2] = f"{gb(made.arguments)} so far", f"{gb(made.temporary)} of temporaries"
        rows[-1][2] = gb(made.total)
    rows += [[f"in its host's memory: {name}", gb(size), ""][: len(titles)] for name, size in found.host.items()]
    _table(title, titles, rows)
    sent = [one for one in found.traffic if one.volume >= SMALL]
    rows = [[f"{one.kind}: {one.what}", " x ".join(one.axes), gb(one.size), f"{one.times:,}", gb(one.volume)] for one in sent]
    _table("Communication", ["each step sends", "over", "one", "times", "in all"], rows)
    if made is not None:
        both = [(kind, axes, *sizes) for (kind, axes), sizes in compared(found, made).items() if max(sizes) >= SMALL]
        of = {key: hlo.covered(c for c in made.collectives if (c.kind, c.axes or ("?",)) == key) for key in (row[:2] for row in both)}
        rows = [[kind, " x ".join(axes), gb(planned), gb(size), f"{of[kind, axes]:.0%}"] for kind, axes, planned, size in both]
        _table("Communication, planned and compiled", ["collective", "over", "planned", "compiled", "beside products"], rows)
    idle = f"; a pipeline idles {t.bubble:.0%}" if t.bubble else ""
    print(
        f"{found.flops[0] / 1e12:,.1f} TFLOP a device, {found.flops[1] / found.flops[0] - 1:.0%} besides (recomputed, or experts' empty rows). "
        f"At the chip's peaks: products {t.compute:.3g} s, memory {t.memory:.3g} s; at {roofline.EFFICIENCY:.0%} of the links': communication "
        f"{t.exposed:.3g} s waited for, {t.hidden:.3g} s beside products{idle}.\nPredicted, unmeasured: {t.step:.3g} s a step, MFU "
        f"{found.mfu:.0%}, {found.experiment.batch * sum(columns(found.experiment)) / t.step:,.0f} tokens/s."
    )


def _print_advice(several: list[Advice]) -> None:
    rows = [[one.knob, gb(one.plan.total), f"{one.plan.time.step:.3g} s", "yes" if one.plan.fits else "no"] for one in several[:8]]
    if rows:
        _table("It does not fit. What would help", ["turn", "total", "predicted step", "fits"], rows)
    else:
        print("It does not fit, and no single knob lowers it; try --search with more --devices.")


def _print_search(plans: list[Plan]) -> None:
    rows = []
    for one in plans:
        layout = one.experiment.layout
        degrees = " ".join(f"--layout.{a} {getattr(layout, a)}" for a in AXES if getattr(layout, a) > 1)
        knobs = f"{degrees} --layout.zero {layout.zero} --layout.remat {layout.remat} --microbatches {one.experiment.microbatches}"
        rows.append([knobs.strip(), gb(one.total), f"{one.time.step:.3g} s", f"{one.mfu:.0%}", "yes" if one.fits else "no"])
    if not rows:
        raise ConfigError("no layout of so many devices divides the model and the batch; change batch, or --devices")
    title = f"Layouts of {plans[0].experiment.layout.devices} x {plans[0].chip.kind}, fastest first"
    _table(title, ["layout", "total", "predicted step", "MFU", "fits"], rows)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(title, style="bold", soft_wrap=True, highlight=False)
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i > 0 and name != "over" else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
