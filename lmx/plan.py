"""What will a step cost? Bytes, communication, FLOPs and time of each device, before anything runs.

`python -m lmx.plan experiments.NAME [--devices 64] [--chip h100] [--compile] [--search] [--layout.tensor 2 ...]` takes the knobs of the
experiment. Nothing is allocated, so it runs on a laptop for thousands of devices. `--devices` widens (or narrows) `layout.fsdp` to as many;
`--compile` adds what the compiler makes of it, for the real chip where the extra `cuda` is installed (no GPU is needed) and else for
simulated CPU devices; `--search` ranks layouts of as many devices.
"""

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from lmx.core.config import ConfigError, command_line, exits_with_one_line
from lmx.core.precision import POLICIES
from lmx.core.tree import Tree
from lmx.data.recipe import Data
from lmx.kernels.attention import LONG
from lmx.models import transformer
from lmx.models.config import Transformer, is_local
from lmx.parallel import absent, chips, cost, hlo
from lmx.parallel.chips import Chip
from lmx.parallel.cost import Time, Traffic, Work
from lmx.parallel.feed import batch_sharding
from lmx.parallel.layout import AXES, Layout, make_mesh
from lmx.train import optimizers
from lmx.train.experiment import Experiment, check, named
from lmx.train.program import build
from lmx.train.state import initial_state, state_shardings

SMALL = 10_000
"""Collectives of fewer bytes are not shown."""
SIMULATED = 2048


@dataclass(frozen=True)
class Plan:
    """A step's cost on one device.

    Attributes:
      memory: bytes by row, at the step's fullest moment.
      traffic: collectives of a step, larger ones first.
      flops: of a step on one device as MFU counts them, and with what is recomputed.
      time: the roofline.
      compiled: the compiler's own figures, where asked for.
    """

    experiment: Experiment
    chip: Chip
    memory: dict[str, int]
    traffic: tuple[Traffic, ...]
    flops: tuple[float, float]
    time: Time
    compiled: hlo.Compiled | None = None

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= chips.USABLE * self.chip.memory

    @property
    def mfu(self) -> float:
        """The share of the chips' peak that the predicted step reaches (PaLM, appendix B)."""
        return self.flops[0] / self.time.step / self.chip.flops[_compute_type(self.experiment)]


@dataclass(frozen=True)
class Advice:
    """A knob to turn, and what it gives."""

    knob: str
    plan: Plan


def plan(experiment: Experiment, *, chip: str = "h100", compiled: bool = False, cpu: bool = False) -> Plan:
    """Plans an experiment on its layout, whatever devices are here.

    Args:
      chip: a short name of `lmx.parallel.chips.CHIPS`.
      compiled: whether to compile it too: for the chip after `lmx.parallel.absent.prepare`, else for simulated CPU devices.
      cpu: whether bytes and collectives are to be those of XLA:CPU, to be held against the latter.

    Raises:
      ValueError: one line that says what is wrong with the experiment, or what cannot be planned yet.
    """
    experiment = settled(experiment)
    kind = chips.chip(chip)
    found, specs = work(experiment), transformer.specs(experiment.model)
    whole = state_bytes(experiment.model, experiment.optimizer, experiment.steps, experiment.precision, _of_state(experiment.layout))
    rest = whole["rest"] + _batch_bytes(experiment)
    memory = cost.memory(found, specs, parameters=whole["parameters"], optimizer=whole["optimizer"], rest=rest, cpu=cpu)
    traffic = cost.traffic(found, specs, cpu=cpu)
    tokens = experiment.batch * experiment.data.length
    model = transformer.flops_per_token(experiment.model, experiment.data.length) * tokens / experiment.layout.devices
    flops = (model, model + _recomputed(experiment) / experiment.layout.devices)
    moved = cost.moved(found, memory["parameters"], memory["optimizer"])
    timed = cost.seconds(found, traffic, flops[1], kind, moved)
    made = compile_step(experiment, chip if absent.prepared() else None) if compiled else None
    return Plan(experiment, kind, memory, tuple(traffic), flops, timed, made)


def settled(experiment: Experiment) -> Experiment:
    """The experiment with a vocabulary, checked in all but its text and the devices at hand.

    Raises:
      ValueError: something does not fit together, or cannot be planned.
    """
    layout, model = experiment.layout, experiment.model
    for knob, unplanned in (("pipeline", layout.pipeline > 1), ("expert", layout.expert > 1), ("ordered", layout.ordered > 0)):
        if unplanned:
            raise ConfigError(
                f"layout.{knob}={getattr(layout, knob)} cannot be planned yet; plan with it at {1 if knob != 'ordered' else 0}"
            )
    if model.experts:
        raise ConfigError(f"model.experts={model.experts}: mixtures of experts cannot be planned yet")
    if model.dropout:
        raise ConfigError(f"model.dropout={model.dropout}: what dropout keeps cannot be planned yet; plan with it at 0")
    if not model.vocab:
        kind, _, size = experiment.data.tokenizer.partition(":")
        if kind not in ("bpe", "unigram") or not size.isdigit():
            raise ConfigError("model.vocab=0 takes the tokenizer's vocabulary, which a plan does not read; set model.vocab")
        model = replace(model, vocab=-(-int(size) // 8) * 8)
    experiment = replace(experiment, model=model)
    anywhere = _Anywhere(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})
    check(replace(experiment, layout=anywhere, data=Data(train="tfds:unread", length=experiment.data.length)))
    return experiment


@dataclass(frozen=True)
class _Anywhere(Layout):
    """A layout to be checked where its devices are not."""

    devices: int = 0


def work(experiment: Experiment) -> Work:
    """What the cost of an experiment's step depends on."""
    model, layout, precision = experiment.model, experiment.layout, POLICIES[experiment.precision]
    ring = layout.context > 1 and layout.exchange == "ring"
    return Work(
        layout=layout,
        rows=experiment.batch // experiment.microbatches,
        microbatches=experiment.microbatches,
        length=experiment.data.length,
        layers=model.layers,
        embed=model.embed,
        heads=model.heads,
        kv_heads=model.key_heads,
        head_dim=model.head_size,
        mlp=model.hidden,
        vocab=model.vocab,
        gated=model.gated,
        norms=4 if model.norm_placement == "sandwich" else 1 if model.parallel else 2,
        reads=1 if model.parallel else 2,
        qk_norm=model.qk_norm,
        tied=model.tied,
        positions=model.context if model.positions == "learned" else 0,
        masks=len({is_local(kind) for kind in model.pattern}),
        dense=not ring and experiment.data.length <= LONG and model.attention_softcap is None,
        compute=jnp.dtype(precision.compute).itemsize,
        master=jnp.dtype(precision.params).itemsize,
    )


def _of_state(layout: Layout) -> Layout:
    """The part of a layout that says where the state is."""
    return Layout(fsdp=layout.fsdp, zero=layout.zero, tensor=layout.tensor)


@lru_cache(4096)
def state_bytes(model: Transformer, recipe: optimizers.Optimizer, steps: int, precision: str, layout: Layout) -> MappingProxyType:
    """Bytes on one device of parameters, optimizer state and the rest of the state, which lie there all along: exact."""
    mesh = AbstractMesh(tuple(getattr(layout, a) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    specs, policy = transformer.specs(model), POLICIES[precision]
    transform, _ = optimizers.build(recipe, steps, specs)
    where = state_shardings(specs, transform, policy, mesh, layout)
    shapes = _shapes(model, recipe, steps, precision)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
    return MappingProxyType(
        {
            "parameters": cost.held(state.params),
            "optimizer": cost.held(state.optimizer),
            "rest": cost.held((state.step, state.key, state.loss_scale)),
        }
    )


@lru_cache(64)
def _shapes(model: Transformer, recipe: optimizers.Optimizer, steps: int, precision: str) -> Tree:
    specs = transformer.specs(model)
    transform, _ = optimizers.build(recipe, steps, specs)
    return jax.eval_shape(partial(initial_state, 0, specs, transform, POLICIES[precision]))


def batch_structs(experiment: Experiment, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's shapes, as a step takes it."""
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    kinds = {"tokens": "int32", "targets": "int32", "weights": "float32", "segments": "int32", "positions": "int32"}
    tokens = {n: jax.ShapeDtypeStruct((*shape, experiment.data.length), kind, sharding=sharding) for n, kind in kinds.items()}
    return tokens | {"example_id": jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)}


def _batch_bytes(experiment: Experiment) -> int:
    """Of a batch on one device, as far as the step reads it: not the example ids, which only tell dropout, nor unused positions."""
    rows = experiment.batch // experiment.layout.shards
    arrays = 5 if experiment.model.positions != "none" else 4
    return 4 * rows * arrays * experiment.data.length


def _recomputed(experiment: Experiment) -> float:
    """FLOPs that rematerialisation adds to a step, over all devices: products of layers again, and attention's scores."""
    model, length = experiment.model, experiment.data.length
    tokens = experiment.batch * length
    scores = 4.0 * model.layers * model.heads * model.head_size * length * tokens
    outer = 2.0 * model.vocab * model.embed
    if experiment.layout.remat == "none":
        return 0.0
    if experiment.layout.remat == "dots":
        return scores
    return transformer.flops_per_token(model, length) / 3 * tokens - outer * tokens


def compile_step(experiment: Experiment, chip: str | None = None) -> hlo.Compiled:
    """Compiles the step for absent GPUs of a kind, or for the simulated CPU devices that are here.

    Args:
      chip: a short name of `lmx.parallel.absent.TARGETS`, after `lmx.parallel.absent.prepare`; None for CPU devices.

    Raises:
      ValueError: there are too few simulated devices, or nothing is known of the chip.
    """
    devices = jax.devices("cpu") if chip is None else absent.devices(experiment.layout.devices, chip)
    if len(devices) < experiment.layout.devices:
        raise ConfigError(
            f"the layout has {experiment.layout.devices} devices and {len(devices)} are simulated; raise JAX_NUM_CPU_DEVICES, or {absent.HINT}"
        )
    start = time.perf_counter()
    mesh = make_mesh(experiment.layout, devices)
    program = build(experiment, mesh if chip is None else mesh.abstract_mesh)
    batch = batch_structs(experiment, batch_sharding(program.mesh, microbatches=True))
    if chip is None:
        with jax.set_mesh(mesh):
            made = program.step.jitted.lower(program.abstract, batch).compile()
    else:
        made = absent.compiled(program.step.jitted, mesh, program.abstract, batch)
    target = "simulated CPU devices" if chip is None else chips.chip(chip).kind
    return hlo.read(made, mesh, target, time.perf_counter() - start)


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
    for degrees, microbatches in cost.candidates(devices, experiment.batch, experiment.data.length, chips.chip(chip).per_host):
        try:
            plans.append(plan(replace(experiment, layout=replace(experiment.layout, **degrees), microbatches=microbatches), chip=chip))
        except ValueError:
            continue
    fitting = [p for p in plans if p.fits]
    if fitting:
        return sorted(fitting, key=lambda p: p.time.step)[:best]
    return sorted(plans, key=lambda p: p.total)[:best]


def _compute_type(experiment: Experiment) -> str:
    return POLICIES[experiment.precision].compute


@dataclass(frozen=True)
class Options:
    """What the door takes beside the experiment's knobs."""

    devices: int = 0
    chip: str = "h100"
    compile: bool = False
    search: bool = False


def options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The door's own flags, and the rest.

    Raises:
      ConfigError: a flag without its value, or one that is no number.
    """
    chosen, rest, tokens = Options(), [], iter(argv)
    for token in tokens:
        name, joined, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in ("devices", "chip", "compile", "search"):
            rest.append(token)
        elif name in ("compile", "search"):
            chosen = replace(chosen, **{name: True})
        else:
            value = value if joined else next(tokens, "")
            if name == "devices" and (not value.isdigit() or int(value) < 1):
                raise ConfigError(f"--devices {value}: give the number of devices, 64 say")
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
            _print_search(
                search(settled(replace(experiment, layout=Layout())), chosen.devices or experiment.layout.devices, chip=chosen.chip)
            )
            return
        found = plan(experiment, chip=chosen.chip, compiled=chosen.compile, cpu=chosen.compile and not absent.prepared())
    _print(found)
    if not found.fits:
        _print_advice(advice(found, chosen.chip))
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
    columns = ["each device holds", "planned"]
    if made is not None:
        columns.append(f"compiled ({made.target}, {made.seconds:.0f} s)")
        state = len([name for name in ("parameters", "optimizer", "batch and the rest") if name in found.memory])
        rows = [[*row, ""] for row in rows]
        rows[state - 1][2], rows[-2][2] = f"{gb(made.arguments)} so far", f"{gb(made.temporary)} of temporaries"
        rows[-1][2] = gb(made.total)
    _table(title, columns, rows)
    sent = [one for one in found.traffic if one.volume >= SMALL]
    rows = [[f"{one.kind}: {one.what}", " x ".join(one.axes), gb(one.size), f"{one.times:,}", gb(one.volume)] for one in sent]
    _table("Communication", ["each step sends", "over", "one", "times", "in all"], rows)
    if made is not None:
        both = [(kind, axes, *sizes) for (kind, axes), sizes in compared(found, made).items() if max(sizes) >= SMALL]
        rows = [[kind, " x ".join(axes), gb(planned), gb(compiled)] for kind, axes, planned, compiled in both]
        _table("Communication, planned and compiled", ["collective", "over", "planned", "compiled"], rows)
    print(
        f"{found.flops[0] / 1e12:,.1f} TFLOP a device ({found.flops[1] / found.flops[0] - 1:.0%} recomputed besides). At the chip's peaks: "
        f"products {t.compute:.3g} s, memory {t.memory:.3g} s; at {cost.EFFICIENCY:.0%} of the links': communication {t.exposed:.3g} s waited "
        f"for, {t.hidden:.3g} s beside products.\nPredicted, unmeasured: {t.step:.3g} s a step, MFU {found.mfu:.0%}, "
        f"{found.experiment.batch * found.experiment.data.length / t.step:,.0f} tokens/s."
    )


def compared(found: Plan, made: hlo.Compiled) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Bytes of a step's collectives by kind and axes: planned, and found in the compiled text."""
    volumes: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for place, several in ((0, found.traffic), (1, made.collectives)):
        for one in several:
            volumes[one.kind, one.axes or ("?",)][place] += one.volume
    return {key: (a, b) for key, (a, b) in sorted(volumes.items(), key=lambda item: -max(item[1]))}


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


def gb(size: float) -> str:
    """Bytes for people: 1.23 GB, 45.6 MB, 789 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} B"


if __name__ == "__main__":
    main()
