"""Is this layout right? Trains a small copy of an experiment on one device and on its layout, and compares the numbers.

`python -m lmx.verify experiments.NAME [--layout.tensor 2 ...]` takes the knobs of the experiment. Devices are simulated on the CPU, so it
runs anywhere. The copy has fewer and narrower layers, but the same code path: kinds of layers, objective, precision, layout, microbatches
are the experiment's own. What differs by more than the bound is a bug, not noise.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lmx.core.config import command_line, exits_with_one_line
from lmx.core.tree import Tree, disagreement
from lmx.models.config import RWKV, EncoderDecoder, Model, Transformer
from lmx.models.rope import by_length
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout
from lmx.train.experiment import Experiment, check, named, stacks, unread
from lmx.train.objectives import Seq2Seq
from lmx.train.optimizers import SGD, Schedule
from lmx.train.program import Program, build
from lmx.train.state import TrainState

BOUND = 2e-5
"""Worst relative difference in fp32 (by `lmx.core.tree.disagreement`). In narrower precisions: `NARROW` times what rounding does on one device."""
BOUNDS = {"fp32": BOUND, "fp64": 1e-10}
"""The same by precision: in fp64 no bug can pass for rounding."""
NARROW = 3
"""Rounding in another order is at most twice as large in most layouts, and little more in all."""
STEPS = 2


@dataclass(frozen=True)
class Report:
    """How far a layout's numbers are from one device's.

    Attributes:
      bound: what is still rounding.
      worst: the largest difference of each quantity: `losses`, `grad_norms` (relative), and every gradient and parameter by its name.
    """

    bound: float
    worst: dict[str, float]

    @property
    def right(self) -> bool:
        """Whether every difference is within the bound."""
        return all(value <= self.bound for value in self.worst.values())  # a NaN is not


def verify(experiment: Experiment, steps: int = STEPS) -> Report:
    """Compares a small copy of the experiment on its layout with one device. Needs as many devices as the layout uses.

    The optimizer is plain descent with momentum: Adam would turn a gradient that is zero but for rounding into steps of full size.

    Raises:
      ValueError: what training would refuse too, but for its text.
    """
    check(unread(experiment))
    small = replace(shrink(experiment), precision=compared_in(experiment))
    alone = replace(small, layout=Layout(), microbatches=1)
    bound = BOUNDS.get(small.precision)
    exact, found = train(replace(alone, precision="fp32") if bound is None else alone, steps), train(small, steps)
    if bound is not None:
        return Report(bound, differences(found, exact))
    rounding = differences(train(alone, steps), exact)
    return Report(max(BOUND, NARROW * max(rounding.values())), differences(found, exact))  # tf32 is fp32 on a CPU


def compared_in(experiment: Experiment) -> str:
    """The precision of the comparison: the experiment's own, but fp32 for mixtures in narrower ones. There rounding changes which experts a
    token gets, those at the border others on every layout, so that how far gradients are apart is luck."""
    narrow, mixture = experiment.precision not in BOUNDS, any(stack.experts for stack in stacks(experiment.model).values())
    return "fp32" if narrow and mixture else experiment.precision


def shrink(experiment: Experiment) -> Experiment:
    """The smallest experiment that takes the same path: its sizes divide as the layout needs."""
    layout = experiment.layout
    between = 2 * layout.context * layout.tensor
    length = min(between * max(1, 32 // between), max(between, experiment.data.length))
    microbatches = experiment.microbatches if experiment.microbatches <= 2 * layout.pipeline else 2 * layout.pipeline
    rows = layout.shards * -(-max(2, layout.ordered) // layout.shards)
    model = _small(experiment.model, layout, length)
    if isinstance(model, EncoderDecoder):
        model = replace(model, encoder=_small(model.encoder, layout, length))
    return replace(
        experiment,
        model=model,
        data=replace(experiment.data, length=length),
        optimizer=SGD(learning_rate=0.1, momentum=0.9, clip=0.0, schedule=Schedule(kind="constant", warmup=0)),
        batch=rows * microbatches,
        microbatches=microbatches,
    )


def _small(model: Model, layout: Layout, length: int) -> Model:
    sizes = {
        "vocab": 16 * layout.tensor,
        "layers": len(model.pattern) * max(layout.pipeline * layout.rounds, 2),
        "embed": 16 * layout.fsdp,
        "mlp": 16 * layout.tensor,
        "context": length,
        "init_std": 0.1,
    }
    if isinstance(model, RWKV):
        heads = {} if model.version == 4 else {"head_dim": 8}
        return replace(model, channels=24 * layout.tensor, **heads, **sizes)
    window = None if model.window is None else min(model.window, length // 4)
    return replace(model, window=window, **sizes, **_heads(model, layout), **_turned(model, length))


HEAD_DIM = 8


def _turned(model: Transformer, length: int) -> dict[str, Any]:
    """As much of a head as the model's RoPE turns; of its scaling as many factors, and the bound that some texts are longer than."""
    turns, scaling = max(2, HEAD_DIM * model.rope_size // model.head_size // 2 * 2), model.rope_scaling
    if by_length(scaling):
        factors = {name: getattr(scaling, name)[: turns // 2] for name in ("short_factors", "long_factors")}
        scaling = replace(scaling, original_context=min(scaling.original_context, max(2, length // 4)), **factors)
    return {"rope_dims": None if model.rope_dims is None else turns, "rope_scaling": scaling}


def _heads(model: Transformer, layout: Layout) -> dict[str, int | None]:
    split = layout.tensor * (layout.context if layout.exchange == "alltoall" else 1)
    key_heads = split if model.key_heads % layout.tensor == 0 else model.key_heads
    share = max(model.heads // model.key_heads, math.lcm(split, key_heads) // key_heads)
    expert_mlp = None if model.expert_mlp is None else 8 * layout.tensor
    return {"heads": key_heads * share, "kv_heads": key_heads, "head_dim": HEAD_DIM, "expert_mlp": expert_mlp}


def train(experiment: Experiment, steps: int, start: TrainState | None = None, mesh: Mesh | None = None) -> dict[str, Any]:
    """Losses and gradient norms by step, the first step's gradients, and the parameters after the last, on random packed rows; from the
    experiment's own beginning, or from a state on the host, its layers in their order; on a mesh other than that of the devices at hand."""
    program = build(experiment, mesh)
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    sharding = batch_sharding(program.mesh, microbatches=True)
    rows = local_rows(sharding, shape)
    state, losses, norms, gradients = program.initial() if start is None else _moved(start, program), [], [], None
    for k in range(steps):
        batch = {name: a[rows] for name, a in packed(experiment, k).items()}
        state, metrics = program.step(state, place(batch, rows, shape, sharding))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if k == 0:  # the momentum after one step is the gradient
            gradients = jax.tree.map(np.array, program.natural(_momentum(state.optimizer)))
    params = jax.tree.map(np.array, program.natural(state.params))
    return {"losses": np.array(losses), "grad_norms": np.array(norms), "gradients": gradients, "params": params}


def _moved(state: TrainState, program: Program) -> TrainState:
    """A copy of a state of the host, where the program wants it: a step gives away what it is given."""
    state = state.replace(key=jax.random.wrap_key_data(np.array(jax.random.key_data(state.key))))
    return program.arranged(jax.device_put(state, jax.tree.map(lambda a: a.sharding, program.abstract)))


def packed(experiment: Experiment, step: int) -> dict[str, np.ndarray]:
    """A batch of random tokens: three texts and padding a row, tokens of any weight, and one row of nothing but padding; with an encoder, a
    source for each, longer on the whole.

    In every second batch only the first quarter of the next row is supervised: of those two rows, where sequences are split, whole devices
    have no weights at all.
    """
    rng, rows, length = np.random.default_rng(step), experiment.batch, experiment.data.length
    tokens = rng.integers(0, experiment.model.vocab, (rows, length + 1)).astype(np.int32)
    segments, positions = _texts(rng, rows, length)
    supervised = segments > 0
    if step % 2:
        supervised[1:2, max(1, length // 4) :] = False
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (supervised * rng.uniform(0.5, 1.5, (rows, length))).astype(np.float32),
        "segments": segments,
        "positions": positions,
        "example_id": (rows * step + np.arange(rows)).astype(np.int32),
    }
    if not isinstance(experiment.objective, Seq2Seq):
        return batch
    batch |= {f"decoder_{name}": batch[name] for name in ("tokens", "segments", "positions")}
    segments, positions = _texts(rng, rows, length + 8)
    tokens = rng.integers(0, experiment.model.vocab, (rows, length + 8)).astype(np.int32)
    return batch | {"tokens": tokens, "segments": segments, "positions": positions}


def _texts(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of three texts a row, and of none in the first."""
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(1, rows):
        start = 0
        for segment, end in enumerate(np.sort(rng.choice(np.arange(length // 8 + 1, length + 1), 3, replace=False)), 1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
    return segments, positions


def differences(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """The worst of each quantity."""
    relative = {part: float(np.abs(found[part] / exact[part] - 1).max()) for part in ("losses", "grad_norms")}
    trees = {part: disagreement(found[part], exact[part]) for part in ("gradients", "params")}
    return relative | {f"{part}/{name}": value for part, tree in trees.items() for name, value in tree.items()}


def _momentum(optimizer: Tree) -> Tree:
    """The one momentum in the state of plain descent."""
    leaves = jax.tree.leaves(optimizer, is_leaf=lambda part: isinstance(part, optax.TraceState))
    (found,) = (leaf.trace for leaf in leaves if isinstance(leaf, optax.TraceState))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The door: prints the table, saves it beside the run as `verify.json`, and leaves with 1 when a difference is beyond the bound."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with exits_with_one_line():
        jax.config.update("jax_platforms", "cpu")
        experiment, rest = named(argv, "python -m lmx.verify experiments.NAME [--layout.tensor 2 ...]")
    experiment, _ = command_line(experiment, rest, description=__doc__)
    jax.config.update("jax_num_cpu_devices", experiment.layout.devices)
    jax.config.update("jax_enable_x64", jax.config.jax_enable_x64 or experiment.precision == "fp64")
    with exits_with_one_line():
        report = verify(experiment)
    _print(experiment, report)
    experiment.path.mkdir(parents=True, exist_ok=True)
    (experiment.path / "verify.json").write_text(json.dumps(dataclasses.asdict(report) | {"layout": dataclasses.asdict(experiment.layout)}))
    if not report.right:
        sys.exit(1)


def _print(experiment: Experiment, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    degrees = ", ".join(f"{f.name} {getattr(experiment.layout, f.name)}" for f in dataclasses.fields(Layout))
    table = Table(
        title=f"{experiment.name}, small, in {compared_in(experiment)}, on one device and on {experiment.layout.devices} ({degrees})"
    )
    for name in ("quantity", "worst relative difference", "bound"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    for name, value in sorted(report.worst.items(), key=lambda item: -np.nan_to_num(item[1], nan=np.inf)):
        within = value <= report.bound
        table.add_row(name, f"{value:.1e}", f"{report.bound:.1e}", style=None if within else "bold red")
    console = Console()
    console.print(table)
    console.print("right: all of it is rounding" if report.right else "[bold red]wrong: what is red is no rounding[/]")


if __name__ == "__main__":
    main()
