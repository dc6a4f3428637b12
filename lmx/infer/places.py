"""Where an engine computes: a layout's devices as the stages of a pipeline, each a mesh of its own with its layers' weights.

Of a layout's axes inference has a meaning for three. `tensor` devices split heads, feed-forward and vocabulary as in training. `pipeline` cuts
the stack of layers into stages, each on its own devices with its own program and its own pages (MPMD in one process). `data` is replicas:
engines of their own (`lmx.infer.replicas`). What a layout says of the backward pass (zero, remat, schedule, ...) and of sequences between
sublayers, of which there is one token each, has no meaning here, nor its `attention`, which the execution names.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Several
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.execution import Execution
from lmx.core.params import ParamSpec, adapted_specs, is_spec
from lmx.core.tree import Tree
from lmx.core.weights import Adapted, Twofold, Weight
from lmx.models import config as model_config
from lmx.models.config import RWKV, EncoderDecoder, Model
from lmx.models.families import functions
from lmx.models.llava import SEEING
from lmx.parallel import layout as layouts
from lmx.parallel.attention import paged_name
from lmx.parallel.host import compiled_here
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import partition, rules

UNUSED = {
    "fsdp": "weights are whole where they multiply, once for each token; split them over layout.tensor or layout.pipeline",
    "context": "a text's tokens come one at a time; split its heads over layout.tensor",
    "expert": "a step's tokens are one batch; layout.tensor splits each expert",
}
"""Axes of training that an engine does not have, and what it has instead."""
READ_FIRST = ("positions", "block_positions", "token_types", "embed_norm", "embed_projection", "encoder", *SEEING)
"""Parameters that stand before the layers, beside the embedding, which a tied head reads too."""


@dataclass(frozen=True)
class Place:
    """The devices of one stage, and its share of the stack.

    Attributes:
      mesh: None: wherever the parameters are.
      execution: with rules where the stage has several devices.
      layers: the first of its layers, and the one behind its last.
      whole: whether those are all that there are.
    """

    mesh: Mesh | None
    execution: Execution
    layers: tuple[int, int]
    whole: bool = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For calls of compiled functions: the mesh is the surrounding one, and products are as the precision says."""
        with ExitStack() as stack:
            stack.enter_context(jax.default_matmul_precision(self.execution.precision.products))
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
                stack.enter_context(compiled_here(self.mesh))
            yield

    def put(self, tree: Tree) -> Tree:
        """Arrays, on each of the devices; a copy crosses to them without waiting."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, P()))

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Where an array is, by the logical names of its dimensions. Of a place with a mesh."""
        if self.execution.rules is None:
            return NamedSharding(self.mesh, P())
        spec = partition(axes, shape, self.execution.rules, dict(self.mesh.shape))
        used = max((i + 1 for i, axis in enumerate(spec) if axis is not None), default=0)
        return NamedSharding(self.mesh, P(*spec[:used]))  # as programs name it that give such an array back

    def weights(self, model: Model, params: Tree) -> Tree:
        """Its part of parameters, as `lmx.infer.weights.reading_params` gives them, on its devices. A stage that is not all of the model has
        its layers as one tuple."""
        table, own = functions(model).specs(model), params
        if not self.whole:
            own, table = (
                _stage(tree, model, self.layers) for tree in (params, table | {"layers": _unstacked(table["layers"], params["layers"])})
            )
        if self.mesh is None:
            return own
        return {name: self._placed(table[name], own[name]) if name in table else self.put(own[name]) for name in own}

    def _placed(self, table: Tree, tree: Tree) -> Tree:
        if isinstance(table, dict) and "layers" in table:  # an encoder
            return {name: self._placed(table[name], tree[name]) for name in tree}
        if isinstance(table, tuple) and table and is_group(table[0]):
            table = _unstacked(table, tree)
        return jax.tree.map(self._placed_weight, table, tree, is_leaf=is_spec)

    def _placed_weight(self, spec: ParamSpec, weight: Weight) -> Weight:
        if isinstance(weight, Twofold):
            return Twofold(self._placed_weight(spec, weight.table), self._placed_weight(spec, weight.head))
        if isinstance(weight, Adapted):
            down, up = adapted_specs(spec, weight.scale.shape[-1])
            parts = {"base": spec, "down": down, "up": up}
            return self.put(weight).replace(**{name: self._placed_weight(of, getattr(weight, name)) for name, of in parts.items()})
        return jax.tree.map(lambda a: jax.device_put(a, self.sharding(spec.axes, a.shape)), weight)


def is_group(tree: Tree) -> bool:
    """Whether it is a group of the stack, stacked."""
    return isinstance(tree, dict) and "0" in tree


def _unstacked(table: Tree, layers: Tree) -> Tree:
    """The table of groups of layers in the form in which they are, stacked or as tuples."""

    def single(spec: ParamSpec) -> ParamSpec:
        return replace(spec, shape=spec.shape[1:], axes=spec.axes[1:], layers=())

    def of(group: Tree, layers: Tree) -> Tree:
        if isinstance(layers, dict):
            return group
        return tuple(jax.tree.map(single, group[str(i % len(group))], is_leaf=is_spec) for i in range(len(layers)))

    return tuple(of(*pair) for pair in zip(table, layers, strict=True))


def _stage(tree: Tree, model: Model, layers: tuple[int, int]) -> Tree:
    """What a stage reads of parameters, or of their table."""
    first, last = layers
    flat = [layer for group in tree["layers"] for layer in group]
    own = {"layers": tuple(flat[first:last])}
    outside = [name for name in tree if name != "layers"]
    before = {*READ_FIRST, "embed", "relative"}
    behind = {*outside} - {*READ_FIRST, "embed"} | ({"embed"} if model.tied else set())
    wanted = {"relative", "virtual"} | (before if first == 0 else set()) | (behind if last == model.layers else set())
    return own | {name: tree[name] for name in outside if name in wanted}


def check(model: Model, layout: Layout, available: int) -> None:
    """Refuses a layout that an engine, or its replicas, cannot have, before anything is compiled.

    Raises:
      ValueError: one line that names the value, what was expected and the knob.
    """
    for axis, instead in UNUSED.items():
        if getattr(layout, axis) > 1:
            raise ValueError(f"layout.{axis}={getattr(layout, axis)} is training's alone: {instead}, and set layout.{axis} to 1")
    for knob, plain in (("rounds", 1), ("collective_matmul", False), ("offload", ())):
        if getattr(layout, knob) != plain:
            raise ValueError(f"layout.{knob}={getattr(layout, knob)} is training's alone; leave it out")
    sizes = model_config.divided(model, layout.tensor)
    sizes = {"tensor": {knob: size for knob, size in sizes["tensor"].items() if not knob.endswith("vocab")}}
    used = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    layouts.check(used, sizes, layout.data, 1, available)
    if layout.pipeline == 1:
        return
    if isinstance(model, RWKV | EncoderDecoder):
        raise ValueError(
            f"layout.pipeline={layout.pipeline} cuts one stack of attention layers, and a {type(model).__name__} is none; set it to 1, and split "
            "its layers over layout.tensor"
        )
    if model.shared_layers:
        raise ValueError(
            f"model.shared_layers has one set of parameters for all layers, which layout.pipeline={layout.pipeline} has none to divide of; "
            "set it to 1"
        )
    if layout.pipeline > model.layers:
        raise ValueError(f"layout.pipeline={layout.pipeline} stages are more than model.layers={model.layers}; use that many at most")


def places(model: Model, params: Tree, layout: Layout, execution: Execution, devices: Several[jax.Device] | None) -> tuple[Place, ...]:
    """The stages of an engine.

    Args:
      params: of whatever form.
      devices: which ones, stage after stage; None: this process's first, or where the layout has one, the one that has the parameters.

    Raises:
      ValueError: as `check`; replicas; an execution that brings rules of its own, or names an attention that reads no pages.
    """
    check(model, layout, len(jax.local_devices() if devices is None else devices))
    if layout.data > 1:
        raise ValueError(
            f"layout.data={layout.data} replicas are as many engines: lmx.infer.Replicas has them; an engine has layout.data=1"
        )
    if execution.rules is not None or execution.split is not None:
        raise ValueError("execution.rules and execution.split are the layout's to say; leave them None, and give layout")
    if not isinstance(model, RWKV):
        paged_name(execution)
    spread = any(isinstance(leaf, Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(params))
    if layout.devices == 1 and devices is None and not spread:
        return (Place(None, execution, (0, model.layers)),)
    devices = jax.local_devices() if devices is None else devices
    tensor = Layout(tensor=layout.tensor, sequence=False)
    execution = replace(execution, rules=rules(tensor)) if layout.tensor > 1 else execution
    ends = [model.layers * i // layout.pipeline for i in range(layout.pipeline + 1)]
    meshes = [make_mesh(tensor, list(devices[i * layout.tensor :])) for i in range(layout.pipeline)]
    return tuple(Place(mesh, execution, own, layout.pipeline == 1) for mesh, own in zip(meshes, pairwise(ends), strict=True))


@contextmanager
def where(params: Tree) -> Iterator[None]:
    """For programs that read parameters where they are: those for several CPU devices are compiled here (`compiled_here` says why)."""
    meshes = {
        leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding)
    }
    with ExitStack() as stack:
        for mesh in meshes:
            stack.enter_context(compiled_here(mesh))
        yield
