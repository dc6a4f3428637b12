"""Checkpoints of Hugging Face's layout: what is in one, what differs between two, and a run's as one.

`python -m lmx.interop import PATH RUN`, `export RUN PATH`, `inspect PATH`, `compare A B`. What is inspected and compared may be a checkpoint, a
run or an adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lmx.core.config import exits_with_one_line, flatten, from_json, subcommand
from lmx.core.params import is_spec
from lmx.core.tree import named_leaves
from lmx.interop.checkpoint import Names, found_tensors, read_config
from lmx.interop.compare import compare, open_checkpoint
from lmx.interop.peft import CONFIG
from lmx.interop.runs import export_run, import_run, imported, is_run, read_run
from lmx.models.families import functions
from lmx.parallel.layout import AXES, Layout, make_mesh
from lmx.parallel.rules import rules, shardings
from lmx.train.experiment import Experiment
from lmx.train.logging import read_record

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
USAGE = "python -m lmx.interop import PATH RUN | export RUN PATH [--family llama] | inspect PATH [--layout.tensor 2 ...] | compare A B"


@dataclass(frozen=True)
class Inspect:
    """Prints a checkpoint's settings, its parameters under both names, and its bytes on a device of a layout."""

    path: Positional[Path]
    """A folder with config.json and safetensors; a run; an adapter."""
    layout: Layout = Layout()
    """The mesh on which it is to lie."""


@dataclass(frozen=True)
class Compare:
    """Says in words what differs between two checkpoints."""

    a: Positional[Path]
    """One."""
    b: Positional[Path]
    """Another."""


@dataclass(frozen=True)
class Import:
    """Writes a checkpoint as a run before its first step."""

    path: Positional[Path]
    """A folder with config.json and safetensors."""
    run: Positional[Path]
    """The run's folder, which is made."""
    layout: Layout = Layout()
    """The devices that hold it meanwhile, each its part."""


@dataclass(frozen=True)
class Export:
    """Writes a run's newest parameters as a folder that transformers loads."""

    run: Positional[Path]
    """The run's folder."""
    path: Positional[Path]
    """What is written."""
    family: str | None = None
    """As which family: llama, gpt2, ...; that which the run was imported from when left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """The door. A wrong command or an unreadable folder is one line on stderr and exit code 2."""
    with exits_with_one_line():
        match subcommand(Inspect | Compare | Import | Export, argv, prog="python -m lmx.interop", description=__doc__, usage=USAGE):
            case Inspect(path, layout):
                inspect(path, layout)
            case Compare(a, b):
                print(compare(a, b))
            case Import(path, run, layout):
                import_run(path, run, mesh=make_mesh(layout), layout=layout)
                print(f"{run}: a run of {path} before its first step")
            case Export(run, path, family):
                print(f"{path}: a {export_run(run, path, family).family} that transformers loads")


def inspect(path: Path, layout: Layout) -> None:
    """Prints what `Inspect` says; of an adapter its settings and its tensors."""
    if (path / CONFIG).exists():
        return inspect_adapter(path)
    model, names, there = None, None, {}
    if is_run(path):  # whose parameters are fp32
        config = from_json(Experiment, read_record(path)["config"]).model
        names = Names(read_run(path)) if imported(path) else None
    else:
        model = read_config(path)
        config, names, there = model.config, Names(model), found_tensors(model, path)
    degrees = tuple(getattr(layout, axis) for axis in AXES)
    mesh = AbstractMesh(degrees, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    specs = functions(config).specs(config)
    where = named_leaves(shardings(specs, mesh, rules(layout, split=layout.zero >= 3)))
    console = Console()
    settings = Table(title=f"{path}: a {model.family if model else 'run'}")
    for name in ("setting", "value"):
        settings.add_column(name)
    plain = flatten(type(config)())
    for name, value in flatten(config).items():
        if value != plain.get(name):
            settings.add_row(name, str(value))
    console.print(settings)
    table = Table(title="parameters (layers of a group stacked)")
    for name in ("lmx", "checkpoint", "shape", "axes", "type", "a device"):
        table.add_column(name, justify="right" if name == "a device" else "left", overflow="fold")
    total = here = 0
    for name, spec in named_leaves(specs, is_leaf=is_spec).items():
        shown, kind = "-", np.dtype(np.float32)
        if names is not None:
            place = names.place(name)
            shown = place.name.format("*", expert="*") + (f" (part {place.part + 1})" if place.fused else "")
            kind = there[place.name.format(names.layers(name)[0], expert=0)].dtype if there else kind
        each = kind.itemsize
        shard = where[name].shard_shape(spec.shape)
        count, own = math.prod(spec.shape), math.prod(shard)
        total, here = total + count, here + own * each
        axes = ", ".join(axis or "-" for axis in spec.axes)
        table.add_row(name, shown, "x".join(map(str, spec.shape)), axes, str(kind), _bytes(own * each))
    console.print(table)
    console.print(f"{total:,} parameters; {_bytes(here)} on each of {layout.devices} device{'s' * (layout.devices != 1)}")


def inspect_adapter(path: Path) -> None:
    """Prints an adapter's settings, but for those that are empty, and its tensors."""
    opened, console = open_checkpoint(path), Console()
    settings = Table(title=f"{path}: a {opened.config.get('peft_type')} adapter")
    for name in ("setting", "value"):
        settings.add_column(name)
    for name, value in sorted(opened.config.items()):
        if value not in (None, False, [], {}):
            settings.add_row(name, ", ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value))
    table = Table(title="tensors")
    for name in ("name", "shape", "type"):
        table.add_column(name, overflow="fold")
    for name, tensor in sorted(opened.tensors.items()):
        table.add_row(name, "x".join(map(str, tensor.shape)), str(tensor.dtype))
    console.print(settings)
    console.print(table)
    arrays = opened.tensors.values()
    console.print(f"{sum(a.size for a in arrays):,} parameters; {_bytes(sum(a.nbytes for a in arrays))}")


def _bytes(size: float) -> str:
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:,.3g} {unit}"


if __name__ == "__main__":
    main()
