"""Runs of lmx as checkpoints of a family, and checkpoints as runs.

An imported run has a folder `huggingface` with what the checkpoint's had beside its tensors: config.json, and the tokenizer's files. Exporting
it gives them back as they were.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmx.core.config import from_json
from lmx.core.params import is_spec
from lmx.core.tree import Tree
from lmx.data.recipe import Data
from lmx.interop.checkpoint import Model, found_tensors, load, read_config, save
from lmx.interop.families import FAMILIES
from lmx.models import config as model_config
from lmx.models.config import EncoderDecoder
from lmx.models.families import functions
from lmx.parallel.layout import Layout
from lmx.parallel.rules import rules, shardings
from lmx.train.checkpoints import Checkpoints, Manager, load_params
from lmx.train.experiment import Experiment
from lmx.train.logging import RECORD, read_record, write_record
from lmx.train.objectives import CausalLM, MaskedLM, Seq2Seq
from lmx.train.state import TrainState

HUB, KEPT = "huggingface", "imported.json"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files that are kept: a config, a tokenizer's."""


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(folder) / RECORD).is_file()


def import_run(folder: str | Path, run: str | Path, *, mesh: Mesh | None = None, layout: Layout = Layout()) -> Experiment:
    """Writes a checkpoint as a run before its first step: a record, the parameters (fp32; each device of a mesh its part), and what else the
    folder has. Gives what the record says.

    Raises:
      ValueError: what `load` refuses, or a folder that holds a run.
    """
    folder, run = Path(folder), Path(run)
    if is_run(run):
        raise ValueError(f"{run} holds a run; name another folder")
    model, params = load(folder, mesh=mesh, layout=layout)
    kinds = {tensor.dtype.name for tensor in found_tensors(model, folder).values()}
    kept = run / HUB
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for pattern in BESIDE for path in folder.glob(pattern) if not path.name.endswith(".index.json")):
        shutil.copyfile(path, kept / path.name)
    (kept / KEPT).write_text(json.dumps({"family": model.family, "dtypes": sorted(kinds)}) + "\n")
    objective = Seq2Seq() if isinstance(model.config, EncoderDecoder) else CausalLM() if model.config.causal else MaskedLM()
    tokenizer = str(kept) if (kept / "tokenizer.json").exists() else "bytes"
    experiment = Experiment(
        name=run.name,
        folder=str(run.parent),
        data=Data(train="", tokenizer=tokenizer, length=min(256, model.config.context)),
        model=model.config,
        objective=objective,
    )
    write_record(run, experiment, sources={}, data={})
    state = TrainState(jnp.int32(0), jax.random.key(0), params, {}, {})
    with Manager(run / "checkpoints", Checkpoints()) as manager:
        manager.save(0, state, {"example": 0})
    return experiment


def read_run(run: str | Path, family: str | None = None) -> Model:
    """The model of a run, as one of the family that it was imported from, or of the one that is named.

    Raises:
      ValueError: neither says a family, or that family cannot say what the model is.
    """
    run = Path(run)
    config = from_json(Experiment, read_record(run)["config"]).model
    if imported(run):
        came = json.loads((run / HUB / KEPT).read_text())["family"]
        if family in (None, came):
            return Model(config, came, (run / HUB / "config.json").read_text())
    if family is None:
        raise ValueError(f"{run} was not imported, so say as which family its model is to be read: one of {', '.join(sorted(FAMILIES))}")
    if family not in FAMILIES:
        raise ValueError(f"family {family} is not one of {', '.join(sorted(FAMILIES))}")
    return Model(config, family)


def load_run(
    run: str | Path, *, family: str | None = None, mesh: Mesh | None = None, layout: Layout = Layout(), step: int | None = None
) -> tuple[Model, Tree]:
    """A run's model and its newest parameters, or those of a step, as `load` gives a checkpoint's."""
    model = read_run(run, family)
    return model, run_params(run, model.config, mesh=mesh, layout=layout, step=step)


def run_params(
    run: str | Path, config: model_config.Model, *, mesh: Mesh | None = None, layout: Layout = Layout(), step: int | None = None
) -> Tree:
    """The parameters alone, of a run's model."""
    specs = functions(config).specs(config)
    if mesh is None:
        where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), specs, is_leaf=is_spec)
    else:
        where = shardings(specs, mesh, rules(layout, split=layout.zero == 3))
    abstract = jax.tree.map(lambda spec, at: jax.ShapeDtypeStruct(spec.shape, "float32", sharding=at), specs, where, is_leaf=is_spec)
    return load_params(Path(run) / "checkpoints", abstract, step)


def imported(run: str | Path) -> bool:
    """Whether a run came from a checkpoint, whose names its tensors then have too."""
    return (Path(run) / HUB / KEPT).exists()


def export_run(run: str | Path, folder: str | Path, family: str | None = None) -> Model:
    """Writes a run's newest parameters as a folder that transformers loads; of an imported run in the checkpoint's own type, with its other
    files as they were. Gives what the folder holds.

    Raises:
      ValueError: as `read_run`.
    """
    run, folder = Path(run), Path(folder)
    model, params = load_run(run, family=family)
    came = json.loads((run / HUB / KEPT).read_text()) if imported(run) else {}
    own = came.get("family") == model.family
    kinds = came["dtypes"] if own else []
    save(model, params, folder, dtype=jnp.dtype(kinds[0]) if len(kinds) == 1 else None)
    if own:
        for path in (run / HUB).iterdir():
            if path.name != KEPT and (path.name != "config.json" or read_config(run / HUB).config == model.config):
                shutil.copyfile(path, folder / path.name)
    return model
