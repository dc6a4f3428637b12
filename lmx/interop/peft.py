"""Adapters of PEFT's layout in and out: LoRA and DoRA, IA3, prompts, P-tuning, prefixes."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.interop.adapter_settings import Settings, read
from lmx.interop.checkpoint import Model, Names, Place, sibling
from lmx.interop.family import Fused
from lmx.interop.files import mapped, read_json, write_file
from lmx.models import adapters
from lmx.models.adapters import LowRank, Part, Prefix, Prompt, Replaced, Scaled
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.parallel.layout import Layout
from lmx.parallel.rules import rules, shardings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"
ENDS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}
"""Of their names, and what they are here."""


@flax.struct.dataclass
class Adapter:
    """An adapter of a model: its parameters, which are its leaves, and what they are.

    Attributes:
      values: for each part, by its name, a tree of arrays.
      parts: names of parts and what they are, sorted.
      model: what it is over.
      about: its adapter_config.json.
      tensors: what PEFT calls its tensors, and their shapes there.
    """

    values: Tree
    parts: tuple[tuple[str, Part], ...] = flax.struct.field(pytree_node=False)
    model: Model = flax.struct.field(pytree_node=False)
    about: str = flax.struct.field(pytree_node=False)
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = flax.struct.field(pytree_node=False)

    @property
    def specs(self) -> Tree:
        """The parameter table of `values`."""
        return adapters.specs(dict(self.parts), functions(self.model.config).specs(self.model.config))


@dataclass(frozen=True)
class Module:
    """A module of theirs with a matrix or a table of ours.

    Attributes:
      weights: of ours; several where it is fused.
      place: of the first of them.
      repeat: its layer's place in the stack, or None.
      use: of a tied table.
    """

    weights: tuple[str, ...]
    place: Place
    repeat: int | None
    use: adapters.Use = "both"


class Base:
    """A model as an adapter sees it: modules, and tensors of any kind, by the names that PEFT has for them."""

    def __init__(self, model: Model, lead: Callable[[str], str] = str):
        """Args: lead, the name that a module has in the adapter's base, from its table's."""
        self.model, self.names, self.lead = model, Names(model), lead

    @property
    def _tied(self) -> bool:
        return self.model.config.tied and self.model.config.vocabulary_head

    @cached_property
    def tensors(self) -> dict[str, Module]:
        """Every tensor of a checkpoint; a tied head too. Experts' are no modules of their own."""
        found = {}
        for leaf, spec in self.names.specs.items():
            place = self.names.place(leaf)
            if place.part or "{expert}" in place.name:
                continue
            leaves = (leaf,) if place.fused is None else tuple(sibling(leaf, part) for part in place.fused.parts)
            for repeat, layer in enumerate(self.names.layers(leaf)):
                use = "table" if leaf == "embed" and self._tied else "both"
                found[place.name.format(layer)] = Module(leaves, place, repeat if spec.layers else None, use)
        if self._tied and self.head:
            found[f"{self.head}.weight"] = Module(("embed",), Place(f"{self.head}.weight"), None, "head")
        return {self.lead(name): module for name, module in found.items()}

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Linear layers and tables."""
        ends = ".weight"
        return {n.removesuffix(ends): m for n, m in self.tensors.items() if n.endswith(ends) and (self.linear(m) or self.table(m))}

    @cached_property
    def head(self) -> str | None:
        """What gives the logits."""
        names = self.model.table.modules_of(self.model.config).items()
        return next((theirs for theirs, ours in names if ours == "head"), None) if self.model.config.vocabulary_head else None

    def spec(self, module: Module) -> ParamSpec:
        return self.names.specs[module.weights[0]]

    def linear(self, module: Module) -> bool:
        return self.spec(module).inputs > 0 or module.use == "head"

    def table(self, module: Module) -> bool:
        spec = self.spec(module)
        return not spec.layers and len(spec.shape) == 2

    def repeats(self, module: Module) -> int:
        return len(self.names.layers(module.weights[0]))

    def sides(self, module: Module) -> tuple[int, int]:
        """How much a matrix reads, or how many rows a table has, and how much it gives."""
        if module.use == "head":
            return self.spec(module).shape[::-1]
        specs = [self.names.specs[name] for name in module.weights]
        lead = len(specs[0].layers) > 0
        split = lead + (specs[0].inputs or 1)
        return math.prod(specs[0].shape[lead:split]), sum(math.prod(spec.shape[split:]) for spec in specs)

    def shape(self, module: Module) -> tuple[int, ...]:
        """Of a whole tensor of theirs."""
        inputs, outputs = self.sides(module)
        if module.use == "head" or (self.linear(module) and self.names.turned(module.weights[0])):
            return outputs, inputs
        if self.linear(module) or self.table(module):
            return inputs, outputs
        return (
            *(1,) * module.place.ones,
            sum(math.prod(self.names.specs[n].shape[len(self.spec(module).layers) > 0 :]) for n in module.weights),
        )


def base_of(model: Model, names: Iterable[str]) -> Base:
    """The model by the names that an adapter's tensors mean: its table's, or those with or without one of the prefixes that files may lack.
    Raises ValueError for a tensor that the model has none for."""
    prefixes, wanted, unknown = model.table.prefixes, [name for name in names if name != EMBEDDINGS], []
    leads = [str, *(partial(_less, p) for p in prefixes), *(p.__add__ for p in prefixes)]
    for lead in leads:
        base = Base(model, lead)
        left = [name for name in wanted if plain(name) not in base.tensors]
        if not left:
            return base
        unknown = unknown or left
    raise ValueError(f"the adapter has {_some(unknown)}, which a {model.family} has nothing for")


def _less(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def parsed(name: str) -> tuple[str, str | None]:
    """Module and end of `base_model.model.MODULE.lora_A.weight`; of a tensor that stands for the base's own its name, and None."""
    name = re.sub(r"^base_model\.(model\.(?=\w+\.))?", "", name)
    found = re.fullmatch(rf"(.+)\.({'|'.join(ENDS)})(\.weight)?", name)
    return (found[1], found[2]) if found else (name.replace(".base_layer.", "."), None)


def plain(name: str) -> str:
    """The tensor of the base that a tensor of an adapter adds to, or takes the place of."""
    module, end = parsed(name)
    return f"{module}.weight" if end else module


@dataclass(frozen=True)
class Slot:
    """Where a tensor of theirs is among values of ours.

    Attributes:
      part, field: whose value.
      module: what it is over; None of what is over none.
      at: the layer's place among the value's, or None.
      rank: of LoRA.
    """

    part: str
    field: str
    module: Module | None = None
    at: int | None = None
    rank: int = 0

    def _views(self, values: Tree) -> list[np.ndarray]:
        found = values[self.part][self.field]
        found = [a if self.at is None else a[self.at] for a in (found if isinstance(found, tuple) else (found,))]
        if self.field == "down":
            return [found[0][..., : self.rank]]
        return [a[: self.rank] for a in found] if self.field == "up" else found

    def _turned(self, base: Base) -> bool:
        """Whether theirs has outputs first."""
        if self.field == "value":
            return self.module.use != "head" and base.linear(self.module) and base.names.turned(self.module.weights[0])
        return self.field in ("down", "up")

    def _lead(self, base: Base) -> int:
        """Dimensions of ours before those that are theirs' last."""
        if self.field == "value":
            return base.spec(self.module).inputs if self.module.use == "both" else 0
        return 1 if self.field == "up" else 0

    def read(self, values: Tree, name: str, tensor: np.ndarray, base: Base) -> None:
        """Puts theirs into ours. Raises ValueError where shapes do not agree."""
        views = self._views(values)
        flat, lead = tensor.T if self._turned(base) else tensor, self._lead(base)
        rows = int(np.prod(views[0].shape[:lead]))
        if self.field == "down":
            wanted = (int(np.prod(views[0].shape[:-1])), self.rank)
        elif self.field == "value" and base.table(self.module):
            wanted = views[0].shape
        else:
            wanted = (*((rows,) if lead else ()), sum(a.size for a in views) // rows)
            flat = flat.reshape(wanted) if flat.size == np.prod(wanted) and (not lead or flat.shape[0] == rows) else flat
        if flat.shape != wanted:
            hint = ""
            if self.module is not None and self.module.weights == ("embed",) and self.field == "value":
                hint = "; where the vocabulary has grown, grow the base's first (lmx.interop.resize_vocabulary)"
            raise ValueError(f"{name} is {list(tensor.shape)}, and its model and settings make it hold {list(wanted)} turned{hint}")
        for view, piece in zip(views, self._split(flat, views, lead), strict=True):
            view[...] = piece.reshape(view.shape)

    def _split(self, flat: np.ndarray, views: list[np.ndarray], lead: int) -> list[np.ndarray]:
        fused = self._fused(views)
        return [flat] if fused is None else fused.split(flat, [a.shape[lead:] for a in views])

    def _fused(self, views: list[np.ndarray]) -> Fused | None:
        return self.module.place.fused if self.module is not None and len(views) > 1 else None

    def write(self, values: Tree, shape: tuple[int, ...], base: Base) -> np.ndarray:
        """The inverse."""
        views, lead = self._views(values), self._lead(base)
        fused = self._fused(views)
        joined = views[0] if fused is None else fused.join(views, lead)
        if not self._turned(base):
            return joined.reshape(shape)
        return joined.reshape(-1, shape[0]).T.reshape(shape)


def plan(settings: Settings, base: Base, tensors: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Part], dict[str, Slot]]:
    """What an adapter with these tensors is, and where each of them goes. Raises ValueError where its settings mean others."""
    parts, slots = {}, {}
    names = [name for name in tensors if name != EMBEDDINGS]
    if settings.kind in ("LORA", "IA3"):
        if EMBEDDINGS in tensors:
            raise ValueError(f"the adapter is a {settings.kind}, and its file has {EMBEDDINGS}")
        _plan_modules(settings, base, [name for name in names if parsed(name)[1]], parts, slots)
    elif wrong := [name for name in names if parsed(name)[1]]:
        raise ValueError(f"the adapter is a {settings.kind}, and its file has {_some(wrong)}")
    else:
        if EMBEDDINGS not in tensors:
            raise ValueError(f"the adapter is a {settings.kind}, and its file lacks {EMBEDDINGS}")
        parts["virtual"], slots[EMBEDDINGS] = _virtual(settings, base.model, tensors[EMBEDDINGS]), Slot("virtual", "embeddings")
    _plan_whole(settings, base, [name for name in names if not parsed(name)[1]], parts, slots)
    return parts, {name: slots[name] for name in tensors}


def _plan_modules(settings: Settings, base: Base, names: list[str], parts: dict[str, Part], slots: dict[str, Slot]) -> None:
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, end = parsed(name)
        found.setdefault(module, {})[ENDS[end]] = name
    linear = [name for name, module in base.modules.items() if base.linear(module)]
    wanted = settings.targeted(base.modules, linear=linear, head=base.head and base.lead(base.head))
    if wanted is not None and set(wanted) != set(found):
        lacks, more = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        said = [f"lacks {_some(lacks)}, which its settings target"] * bool(lacks)
        raise ValueError(f"the adapter {', and '.join(said + [f'has {_some(more)}, which they do not'] * bool(more))}")
    fields = {"scale"} if settings.kind == "IA3" else {"down", "up"} | ({"magnitude"} if settings.get("use_dora") else set())
    groups: dict[str, dict[int, str]] = {}
    for name, own in found.items():
        if set(own) != fields:
            raise ValueError(
                f"{name} has {', '.join(sorted(own))} in the adapter, where a {settings.kind} of its settings has {', '.join(sorted(fields))}"
            )
        module = base.modules[name]
        part = module.weights[0].removesuffix("/weight") + ("/head" if module.use == "head" else "")
        groups.setdefault(part, {})[module.repeat or 0] = name
        for field, tensor in own.items():
            slots[tensor] = Slot(part, field, module, module.repeat, settings.rank(name) if settings.kind == "LORA" else 0)
    if (tied := groups.get("embed")) and isinstance(base.model.config, EncoderDecoder):
        raise ValueError(_unread(base.model, tied[0]))
    for part, of in groups.items():
        module = base.modules[next(iter(of.values()))]
        layers = range(base.repeats(module))
        if settings.kind == "IA3":
            feeds = {settings.feeds(name) for name in of.values()}
            if len(feeds) > 1:
                raise ValueError(f"feedforward_modules names {part} in some layers and not in others")
            parts[part] = Scaled(module.weights, tuple(i in of for i in layers), feeds.pop())
            continue
        ranks = tuple(settings.rank(of[i]) if i in of else 0 for i in layers)
        scales = tuple(settings.scale(of[i]) if i in of else 0.0 for i in layers)
        parts[part] = LowRank(module.weights, ranks, scales, bool(settings.get("use_dora")), module.use)


def _plan_whole(settings: Settings, base: Base, names: list[str], parts: dict[str, Part], slots: dict[str, Slot]) -> None:
    """Biases, modules_to_save, and tables that PEFT has saved with an adapter of them: of a tied table both uses, but as a module to save."""
    layers: dict[tuple[str, str], list[int]] = {}
    places = []
    for name in names:
        tensor = plain(name)
        module = base.tensors[tensor]
        own = any(tensor.rsplit(".", 1)[0].endswith(saved) for saved in settings.saved) and ".base_layer." not in name
        use = module.use if own else "both"
        if own and module.weights == ("embed",) and use != "head" and isinstance(base.model.config, EncoderDecoder):
            raise ValueError(_unread(base.model, tensor))
        part = "/".join([module.weights[0], *(["head"] if module.use == "head" else []), "saved"])
        places.append((name, module, part))
        layers.setdefault(part, []).extend([] if module.repeat is None else [module.repeat])
        parts[part] = Replaced(module.weights, tuple(sorted(layers[part])), use)
    for name, module, part in places:
        at = None if module.repeat is None else parts[part].layers.index(module.repeat)
        slots[name] = Slot(part, "value", module, at)


def _virtual(settings: Settings, model: Model, shape: tuple[int, ...]) -> Part:
    config, said = model.config, settings.said
    if not isinstance(config, Transformer):
        raise ValueError(
            f"a {model.family} has no attention or positions that virtual tokens could stand in; {settings.kind} needs a Transformer"
        )
    tokens, width, copies = said["num_virtual_tokens"], said["token_dim"], settings.get("num_transformer_submodules", 1)
    if copies not in ((1, 2) if isinstance(config, EncoderDecoder) else (1,)):
        raise ValueError(f"adapter_config.json: num_transformer_submodules={copies} of a {model.family}")
    if settings.kind != "PREFIX_TUNING":
        if width != config.table_size:
            raise ValueError(f"adapter_config.json: token_dim={width}, and the model's embeddings have {config.table_size}")
        if shape != (tokens * copies, width):
            raise ValueError(f"{EMBEDDINGS} is {list(shape)}, and its settings make it {[tokens * copies, width]}")
        return Prompt(tokens, *shape)
    layers, heads = said["num_layers"], said["num_attention_heads"]
    wanted = {"num_layers": config.layers, "num_attention_heads": config.key_heads, "token_dim": config.key_heads * config.head_size}
    for name, value in wanted.items():
        if said[name] != value:
            raise ValueError(f"adapter_config.json: {name}={said[name]}, and the model's keys and values make it {value}")
    return Prefix(tokens, layers, heads, config.head_size, 2 * copies)


def _unread(model: Model, name: str) -> str:
    return (
        f"{name} of a {model.family}: encoder and decoder look rows up through modules of their own, so PEFT's adapter of it does nothing"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_adapter(folder: str | Path, model: Model, *, dtype=jnp.float32, mesh: Mesh | None = None, layout: Layout = Layout()) -> Adapter:
    """An adapter that PEFT has saved, for a model.

    Args:
      model: what it is over, as `load` gives it.
      dtype: of its parameters.
      mesh, layout: where they go; with neither, on the default device.

    Raises:
      ValueError: settings or tensors that lmx has no place for, or lacks, each by its name.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} has no {CONFIG}, so it is no adapter of PEFT's")
    said = read_json(folder / CONFIG)
    settings = read(said)
    if not (folder / TENSORS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; its adapter_model.bin is a pickle: save it again with a newer peft" if pickled else ""
        raise ValueError(f"{folder} has no {TENSORS}{hint}")
    there = mapped(folder / TENSORS)
    base = base_of(model, there)
    parts, slots = plan(settings, base, {name: tensor.shape for name, tensor in there.items()})
    empty = Adapter({}, tuple(sorted(parts.items())), model, json.dumps(said), tuple((n, a.shape) for n, a in there.items()))
    specs = empty.specs
    arrays = jax.tree.map(lambda spec: np.zeros(spec.shape, np.dtype(dtype)), specs, is_leaf=is_spec)
    for name, slot in slots.items():
        slot.read(arrays, name, there[name], base)
    if mesh is None:
        return empty.replace(values=jax.tree.map(jnp.asarray, arrays))
    where = shardings(specs, mesh, rules(layout, split=layout.zero == 3))
    return empty.replace(values=jax.tree.map(jax.device_put, arrays, where))


def adapter_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter (or a gradient of one) under PEFT's names, and in its layouts."""
    shapes = dict(adapter.tensors)
    base = base_of(adapter.model, shapes)
    _, slots = plan(read(json.loads(adapter.about)), base, shapes)
    values = jax.tree.map(np.asarray, adapter.values)
    return {name: slot.write(values, shapes[name], base) for name, slot in slots.items()}


def save_adapter(adapter: Adapter, folder: str | Path, *, dtype=None) -> None:
    """Writes a folder that PEFT loads. Args: dtype, of the numbers; each parameter's own when None."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS, {name: a if dtype is None else a.astype(dtype) for name, a in adapter_tensors(adapter).items()})
    (folder / CONFIG).write_text(json.dumps(json.loads(adapter.about), indent=2, sort_keys=True) + "\n")


def adapt(params: Tree, adapter: Adapter) -> Tree:
    """The parameters under an adapter, for `call`, `generate` and every forward; differentiable in both."""
    return adapters.over(params, dict(adapter.parts), adapter.values)


def unmerge(params: Tree, adapter: Adapter) -> Tree:
    """The parameters before `merge(adapt(params, adapter))`, but for rounding. Raises ValueError for what merging forgets."""
    return adapters.unmerge(params, dict(adapter.parts), adapter.values)
