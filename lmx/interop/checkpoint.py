"""Checkpoints of Hugging Face's layout in and out, tensor by tensor."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree, name_of, named_leaves
from lmx.interop.families import FAMILIES
from lmx.interop.family import Family, Fused
from lmx.interop.files import has_tensors, open_tensors, read_json, write_tensors
from lmx.models.config import Transformer
from lmx.models.families import check, functions
from lmx.models.vision_config import CLIP
from lmx.parallel.layout import Layout
from lmx.parallel.rules import rules, shardings


@dataclass(frozen=True)
class Model:
    """A model of a family: what `lmx.models` computes, and how its checkpoints call it.

    Attributes:
      config: of the model.
      family: its table's name (`model_type`).
      about: the rest of its config.json, as JSON: special tokens, the type of its numbers.
      renamed: tensors that the checkpoint it was loaded from, an older one, calls otherwise than the table: their names in both.
    """

    config: Transformer | CLIP
    family: str
    about: str = "{}"
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def table(self) -> Family:
        return FAMILIES[self.family].of(json.loads(self.about))

    @property
    def hub(self) -> dict[str, Any]:
        """Its config.json. Where nothing is known of special tokens it says so: transformers would take the family's usual ones."""
        known = json.loads(self.about) or dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        said = self.table.write(self.config)
        for part in self.table.inside:
            said[part.theirs] = part.said(known) | said[part.theirs]
            known.pop(part.older, None)
        return known | said


def read_config(folder: Path) -> Model:
    """The model that a folder's config.json, and its tensors where it has any, describe. Raises ValueError for what lmx does not have, by name."""
    folder = Path(folder)
    model = _described(folder)
    return _untied(model, open_tensors(folder)) if has_tensors(folder) else model


def _described(folder: Path) -> Model:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    found = read_json(path)
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r} is not one of {', '.join(sorted(FAMILIES))}")
    try:
        model = Model(FAMILIES[kind].read(found), kind, json.dumps(found))
        check(model.config)
    except (TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} has a field of another kind than a {kind}'s ({error})") from error
    return model


def load(folder: str | Path, *, dtype=jnp.float32, mesh: Mesh | None = None, layout: Layout = Layout()) -> tuple[Model, Tree]:
    """A checkpoint's model and parameters (layers stacked), each parameter read where, and only as far as, a device needs it.

    Args:
      dtype: of the parameters.
      mesh, layout: where they go; with neither, on the default device.

    Raises:
      ValueError: a config or tensors that lmx has no place for, or lacks, each by its name.
    """
    folder = Path(folder)
    described, there = _described(folder), open_tensors(folder)
    names = Names(_untied(described, there))
    named, tensors = names.found(there)
    model = replace(names.model, renamed=tuple((name, own) for name, own in named.items() if name != own))
    specs = functions(model.config).specs(model.config)
    if mesh is None:
        where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), specs, is_leaf=is_spec)
    else:
        where = shardings(specs, mesh, rules(layout, split=layout.zero == 3))

    def leaf(path: tuple, spec: ParamSpec, sharding) -> jax.Array:
        read = _reader(tensors, name_of(path), spec, names)
        parts, at, part = [], None, None
        for device, index in sharding.addressable_devices_indices_map(spec.shape).items():  # one part at a time is in the host's memory
            if index != at:
                at, part = index, read(index).astype(dtype)
            parts.append(jax.block_until_ready(jax.device_put(part, device)))
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)

    return model, jax.tree_util.tree_map_with_path(leaf, specs, where, is_leaf=is_spec)


def _untied(model: Model, there: Mapping[str, np.ndarray]) -> Model:
    """The model with a head of its own where the file has one that differs from the embeddings: transformers goes by that and not by what
    config.json says, which it writes wrong for T5 1.1."""
    places = Names(model).places if model.config.tied else {}
    if "head" not in places:
        return model
    table, head = (_own_name(places[name].name, there, model.table) for name in ("embed", "head"))
    if table is None or head is None or np.array_equal(there[table], there[head]):
        return model
    return replace(model, config=replace(model.config, tied=False))


def found_tensors(model: Model, folder: str | Path) -> dict[str, np.ndarray]:
    """A folder's tensors by the names that the model's table has, mapped, not read. Raises ValueError for what is missing or too much."""
    return Names(model).found(open_tensors(Path(folder)))[1]


def tensors(model: Model, tree: Tree) -> dict[str, np.ndarray]:
    """A tree of the parameters' shapes (parameters, gradients) under the names of the checkpoint that the model is of, in its layouts."""
    names = dict(model.renamed)
    return {names.get(name, name): make() for name, (_, make) in _writers(model, tree).items()}


def save(model: Model, params: Tree, folder: str | Path, *, dtype=None) -> None:
    """Writes a folder that transformers loads.

    Args:
      dtype: of the numbers; that which the model's config.json says when None, else fp32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.hub
    kind = np.dtype(
        dtype or {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(config.get("dtype") or config.get("torch_dtype")) or np.float32
    )
    config["dtype"] = kind.name
    config.pop("torch_dtype", None)
    write_tensors(folder, {name: (shape, kind, make) for name, (shape, make) in _writers(model, params).items()})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Place:
    """Where one of our leaves is in a checkpoint: the tensor's name (with `{}` for the layer and `{expert}`), which part of it, and how many
    dimensions of one it has before ours."""

    name: str
    fused: Fused | None = None
    part: int = 0
    ones: int = 0


SUFFIXES = ((".weight", "/weight"), (".weight", "/scale"), (".weight", ""), (".bias", "/bias"), (".bias", "_bias"))
"""Of a module's tensors, and of ours."""


class Names:
    """The checkpoint's names of a model's parameters."""

    def __init__(self, model: Model):
        self.model, self.table = model, model.table
        self.specs = named_leaves(functions(model.config).specs(model.config), is_leaf=is_spec)

    @cached_property
    def places(self) -> dict[str, Place]:
        """By our path without group and place in the pattern: `layers/attention/query/weight`."""
        found = {}
        for theirs, ours in self.table.modules_of(self.model.config).items():
            for i, part in enumerate(ours.parts if isinstance(ours, Fused) else (ours,)):
                for suffix, own in (("", ""),) if theirs.endswith((".weight", ".bias")) else SUFFIXES:
                    found.setdefault(part + own, Place(theirs + suffix, ours if isinstance(ours, Fused) else None, i))
        return found | {ours: Place(theirs, ones=ones) for theirs, (ours, ones) in self.table.tensors_of(self.model.config).items()}

    def place(self, name: str) -> Place:
        """Of one of our leaves. Raises KeyError where the table lacks it: a defect of the table."""
        return self.places[short(name)]

    def turned(self, name: str) -> bool:
        """Whether a linear layer is stored `[outputs, inputs]`; a head is in every family, and what is no module in none."""
        plain = {ours for ours, _ in self.table.tensors.values()}
        return name == "head" or (self.table.turned and short(name) not in plain)

    def kernel(self, name: str) -> bool:
        """Whether a linear layer's inputs keep their dimensions."""
        return short(name) in self.table.kernels

    def all(self) -> Iterator[str]:
        """Every tensor's name."""
        for name, spec in self.specs.items():
            place = self.place(name)
            for layer in self.layers(name):
                for expert in range(spec.shape[1]) if "{expert}" in place.name else (0,):
                    if not self.unread(tensor := place.name.format(layer, expert=expert)):
                        yield tensor

    def unread(self, tensor: str) -> bool:
        """Whether no file has a tensor of this name, which is nothing's."""
        return any(fnmatchcase(tensor, pattern) for pattern in self.model.table.unread)

    def layers(self, name: str) -> list[int]:
        """The absolute layers of a stacked leaf; one that does not matter for others."""
        return list(self.specs[name].layers) or [0]

    def found(self, there: Mapping[str, np.ndarray]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        """What a file calls each tensor, and the tensors, by the names that the table has; those that it may leave out are zeros. Raises
        ValueError for what is missing and what is too much."""
        table, wanted = self.table, dict.fromkeys(self.all())
        shared = self.places["embed"].name if "embed" in self.places else None
        named = {}
        for name in wanted:
            own = _own_name(name, there, table)
            if own is None and name == shared:
                own = next((n for n in there if any(fnmatchcase(n, p) for p in table.copies)), None)
            if own is not None:
                named[name] = own
        places = {self.place(name): spec for name, spec in self.specs.items()}
        zeros = {p.name: np.zeros((1,) * p.ones + spec.shape, np.float32) for p, spec in places.items() if p.name in table.zeros}
        zeros = {name: array for name, array in zeros.items() if name not in named}
        missing = [name for name in wanted if name not in named and name not in zeros]
        used = set(named.values())
        rest = [n for n in there if n not in used and not any(fnmatchcase(n, p) for p in table.leftover)]
        heads = [n for n, ours in table.modules_of(self.model.config).items() if ours == "head"]
        tied = ("lm_head.weight", "embed_out.weight", *(f"{n}.weight" for n in heads)) if self.model.config.tied else ()
        again = [n for n in rest if n in tied or any(fnmatchcase(n, p) for p in table.copies)]
        rest = [n for n in rest if n not in again]
        if missing or rest:
            said = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(rest)}, which lmx knows nothing of"] * bool(rest)
            raise ValueError(f"the checkpoint of a {table.model_type} {', and '.join(said)}")
        for name in again:
            if not np.array_equal(there[name], there[named[shared]]):
                raise ValueError(
                    f"the checkpoint of a {table.model_type} has {name}, which should repeat {named[shared]} and differs from it"
                )
        return named, {name: there[own] for name, own in named.items()} | zeros


def lead(name: str) -> str:
    """`encoder/layers/0/1` of `encoder/layers/0/1/attention/query/weight`: its stack, group and place; empty for what is no layer's."""
    words = name.split("/")
    return "/".join(words[: words.index("layers") + 3]) if "layers" in words else ""


def short(name: str) -> str:
    """`encoder/layers/0/1/attention/query/weight` as `encoder/layers/attention/query/weight`."""
    return name.replace(lead(name), lead(name).rsplit("/", 2)[0], 1) if lead(name) else name


def sibling(name: str, part: str) -> str:
    """Of the same layer and kind: `layers/0/1/attention/query/weight`, `layers/attention/key` gives `layers/0/1/attention/key/weight`."""
    return f"{lead(name)}/{part.removeprefix(lead(name).rsplit('/', 2)[0] + '/')}/{name.rsplit('/', 1)[1]}"


def _own_name(name: str, there: Mapping[str, np.ndarray], table: Family) -> str | None:
    """What a file calls a tensor, or None where it lacks it."""
    return next((n for n in (name, *_variants(name, table)) if n in there), None)


def _variants(name: str, table: Family) -> Iterator[str]:
    for whole in (name, *(_said(name, dialect) for dialect in table.dialects)):
        for one in (whole, *(whole.removesuffix(now) + before for now, before in table.renamed if whole.endswith(now))):
            yield one
            for prefix in table.prefixes:
                yield one.removeprefix(prefix)
                yield prefix + one


def _said(name: str, dialect: tuple[tuple[str, str], ...]) -> str:
    for now, then in dialect:
        name = name.replace(now, then)
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _reader(there: Mapping[str, np.ndarray], name: str, spec: ParamSpec, names: Names) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """What reads any part of one of our leaves."""
    place, layers = names.place(name), names.layers(name)
    stacked = bool(lead(name))
    one = replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]) if stacked else spec

    def layer(number: int) -> np.ndarray:
        if names.unread(place.name.format(number, expert=0)):
            return np.zeros(one.shape, np.float32)
        if "{expert}" not in place.name:
            return _ours(there[place.name.format(number)], one, place, name, names)
        each = replace(one, shape=one.shape[1:], axes=one.axes[1:])
        tensors = (there[place.name.format(number, expert=e)] for e in range(one.shape[0]))
        return np.stack([_ours(tensor, each, place, name, names) for tensor in tensors])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.asarray(layer(0)[index])
        return np.stack([layer(number)[index[1:]] for number in layers[index[0]]])

    return read


def _ours(tensor: np.ndarray, spec: ParamSpec, place: Place, name: str, names: Names) -> np.ndarray:
    """A tensor of theirs, or its part, as one of our leaves. Raises ValueError where shapes do not agree."""
    linear = spec.inputs > 0
    shapes = [spec.shape[spec.inputs :]] if place.fused is None else _part_shapes(place.fused, name, names)
    outputs = sum(int(np.prod(s)) for s in shapes)
    inputs = int(np.prod(spec.shape[: spec.inputs]))
    turned = linear and names.turned(name)
    if names.kernel(name) and tensor.shape == (outputs, *spec.shape[: spec.inputs]):
        tensor = tensor.reshape(outputs, inputs)
    wanted = ((outputs, inputs) if turned else (inputs, outputs)) if linear else (outputs,) if place.fused else spec.shape
    if tensor.shape != tuple(wanted) and tensor.size == int(np.prod(wanted)) and not linear:
        tensor = tensor.reshape(wanted)
    if tensor.shape != tuple(wanted):
        raise ValueError(
            f"{place.name.format('*', expert='*')} is {list(tensor.shape)} in the checkpoint; config.json makes it {list(wanted)}"
        )
    flat = tensor.T if turned else tensor
    if place.fused is not None:
        flat = place.fused.split(flat, shapes)[place.part]
    return flat.reshape(spec.shape)


def _part_shapes(fused: Fused, name: str, names: Names) -> list[tuple[int, ...]]:
    """Outputs of each part of a fused tensor, from the parameter table."""
    specs = [names.specs[sibling(name, part)] for part in fused.parts]
    return [spec.shape[1 + spec.inputs :] for spec in specs]


def _writers(model: Model, tree: Tree) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """For every tensor of a checkpoint its shape and what makes it."""
    names = Names(model)
    leaves = named_leaves(tree)
    if set(leaves) != set(names.specs):
        raise ValueError(f"the tree is not of this model's parameters: {_some(sorted(set(leaves) ^ set(names.specs)))} differ")
    found: dict[str, tuple[tuple[int, ...], Callable]] = {}
    for name, spec in names.specs.items():
        place = names.place(name)
        if place.part:
            continue
        parts = [name] if place.fused is None else [sibling(name, part) for part in place.fused.parts]
        for repeat, layer in enumerate(names.layers(name)):
            if names.unread(place.name.format(layer, expert=0)):
                continue
            for expert in range(spec.shape[1]) if "{expert}" in place.name else (None,):
                make = _Writer(leaves, parts, names, place, repeat if lead(name) else None, expert)
                found[place.name.format(layer, expert=expert)] = (make.shape, make)
    return found


@dataclass(frozen=True)
class _Writer:
    """Makes one tensor of theirs from one of our leaves or several."""

    leaves: Mapping[str, Any]
    parts: list[str]
    names: Names
    place: Place
    repeat: int | None
    expert: int | None

    @property
    def _lead(self) -> int:
        return (self.repeat is not None) + (self.expert is not None)

    @property
    def _linear(self) -> int:
        return self.names.specs[self.parts[0]].inputs

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.names.specs[part].shape[self._lead :] for part in self.parts]
        if not self._linear:
            whole = self.place.fused is None and not self.parts[0].endswith("/bias")
            return (1,) * self.place.ones + (shapes[0] if whole else (sum(int(np.prod(s)) for s in shapes),))
        inputs = int(np.prod(shapes[0][: self._linear]))
        outputs = sum(int(np.prod(s[self._linear :])) for s in shapes)
        if self.names.kernel(self.parts[0]):
            return (outputs, *shapes[0][: self._linear])
        return (outputs, inputs) if self.names.turned(self.parts[0]) else (inputs, outputs)

    def __call__(self) -> np.ndarray:
        index = tuple(i for i in (self.repeat, self.expert) if i is not None)
        arrays = [np.asarray(self.leaves[part][index]) for part in self.parts]
        lead = self._linear
        joined = arrays[0] if self.place.fused is None else self.place.fused.join(arrays, lead)
        if not lead:
            return joined.reshape(self.shape)
        matrix = joined.reshape(int(np.prod(joined.shape[:lead])), -1)
        return (matrix.T if self.names.turned(self.parts[0]) else matrix).reshape(self.shape)
