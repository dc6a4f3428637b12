"""Checkpoints of Hugging Face's layout: what is in one, what differs between two, and a run's as one.

`python -m lmx.interop inspect PATH`, `compare A B`, `export RUN PATH --family llama`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lmx.core.config import ConfigError, exits_with_one_line, flatten, from_json, subcommand
from lmx.core.params import is_spec
from lmx.core.tree import named_leaves, size
from lmx.interop.checkpoint import Model, Names, found_tensors, read_config, save
from lmx.interop.compare import compare
from lmx.interop.families import FAMILIES
from lmx.models.families import functions
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.rules import rules, shardings
from lmx.train.checkpoints import load_params
from lmx.train.experiment import Experiment
from lmx.train.logging import read_record

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
USAGE = "python -m lmx.interop inspect PATH [--layout.tensor 2 ...] | compare A B | export RUN PATH --family llama"


@dataclass(frozen=True)
class Inspect:
    """Prints a checkpoint's settings, its parameters under both names, and its bytes on a device of a layout."""

    path: Positional[Path]
    """A folder with config.json and safetensors."""
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
class Export:
    """Writes a run's newest parameters as a folder that transformers loads."""

    run: Positional[Path]
    """The run's folder."""
    path: Positional[Path]
    """What is written."""
    family: str
    """As which family: llama, gpt2, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """The door. A wrong command or an unreadable folder is one line on stderr and exit code 2."""
    with exits_with_one_line():
        match subcommand(Inspect | Compare | Export, argv, prog="python -m lmx.interop", description=__doc__, usage=USAGE):
            case Inspect(path, layout):
                inspect(path, layout)
            case Compare(a, b):
                print(compare(a, b))
            case Export(run, path, family):
                export(run, path, family)


def inspect(path: Path, layout: Layout) -> None:
    """Prints what `Inspect` says."""
    model = read_config(path)
    names, there = Names(model), found_tensors(model, path)
    degrees = tuple(getattr(layout, axis) for axis in AXES)
    mesh = AbstractMesh(degrees, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    specs = functions(model.config).specs(model.config)
    where = named_leaves(shardings(specs, mesh, rules(layout, split=layout.zero >= 3)))
    console = Console()
    settings = Table(title=f"{path}: a {model.family}")
    for name in ("setting", "value"):
        settings.add_column(name)
    plain = flatten(type(model.config)())
    for name, value in flatten(model.config).items():
        if value != plain.get(name):
            settings.add_row(name, str(value))
    console.print(settings)
    table = Table(title="parameters (layers of a group stacked)")
    for name in ("lmx", "checkpoint", "shape", "axes", "type", "a device"):
        table.add_column(name, justify="right" if name == "a device" else "left", overflow="fold")
    total = here = 0
    for name, spec in named_leaves(specs, is_leaf=is_spec).items():
        place = names.place(name)
        tensor = there[place.name.format(names.layers(name)[0], expert=0)]
        each = tensor.dtype.itemsize
        shard = where[name].shard_shape(spec.shape)
        count, own = math.prod(spec.shape), math.prod(shard)
        total, here = total + count, here + own * each
        shown = place.name.format("*", expert="*") + (f" (part {place.part + 1})" if place.fused else "")
        table.add_row(
            name, shown, "x".join(map(str, spec.shape)), ", ".join(axis or "-" for axis in spec.axes), str(tensor.dtype), _bytes(own * each)
        )
    console.print(table)
    console.print(f"{total:,} parameters; {_bytes(here)} on each of {layout.devices} device{'s' * (layout.devices != 1)}")


def export(run: Path, path: Path, family: str) -> None:
    """Does what `Export` says. Raises ValueError where the family cannot say what the model is."""
    if family not in FAMILIES:
        raise ConfigError(f"--family {family} is not one of {', '.join(sorted(FAMILIES))}")
    experiment = from_json(Experiment, read_record(run)["config"])
    model = Model(experiment.model, family)
    specs = functions(experiment.model).specs(experiment.model)
    abstract = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs, is_leaf=is_spec)
    save(model, load_params(run / "checkpoints", abstract), path)
    print(f"{path}: a {family} that transformers loads, {_bytes(4 * size(abstract))}")


def _bytes(size: float) -> str:
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:,.3g} {unit}"


if __name__ == "__main__":
    main()
