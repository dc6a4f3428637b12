"""Pipeline parallelism: the stack of layers cut into stages, microbatches flowing through them, inside one compiled step.

All devices run the same program in lockstep, a scan over ticks. In a tick a device does one forward of a microbatch through one of its
stages, then one backward. Forwards run along the devices, one a tick; with several stages a device ("rounds": interleaved virtual stages,
Narayanan et al., 2021) the last device hands on to the first. Backwards run the other way and begin `delay` ticks later: as soon as the
first microbatch is through (1F1B, Narayanan et al., 2019), or after the last forward (GPipe, Huang et al., 2019). Only stage inputs are
kept between the two, at most `2 stages - 1` of them under 1F1B; the backward pass computes its stage again.

The program has three phases, ticks of forwards only, of both, and of backwards only, so that what is idle is what theory says: with p
devices, M microbatches and v rounds a share `(p - 1) / (M v + p - 1)` of the time.

Zero bubble (ZB-H1, Qi et al., 2023, arXiv 2401.10241) is not there. In lockstep, where a device cannot form weights' gradients while another
is at inputs', it would save `(p - 1) w` of the `(p - 1)(2 f + b + w)` that are idle (f, b, w: a stage's forward, inputs' gradients, weights'),
not the paper's `2 (p - 1) w`. And weights' gradients later need the gradient of every product within the stage: found again they cost
`M (f + b)` more, at least as much as is saved once there are as many microbatches as devices; kept, they and the inputs of products are
twice a stage's activations for up to p microbatches, where 1F1B here keeps stage inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree, name_of
from lmx.parallel.layout import Layout
from lmx.parallel.offload import fetched, joined, stand_ins

AXIS = "pipeline"


class Model(NamedTuple):
    """A model, its objective with it, cut where a pipeline cuts it. `outer` are all parameters but the layers'.

    Attributes:
      enter: `(outer, microbatch, key) -> x`, what the first layer reads.
      stage: `(layers, x, microbatch, key, first) -> (x, sums)`: consecutive layers, of which the first has this index among the repeats
        of the pattern, and what they add to the loss and the metrics.
      leave: `(outer, x, microbatch) -> sums` of what the last layer gives: the loss and the metrics.
    """

    enter: Callable[..., Array]
    stage: Callable[..., tuple[Array, Any]]
    leave: Callable[..., Any]


@dataclass(frozen=True)
class Schedule:
    """Who does what when.

    Attributes:
      stages: devices of the pipeline.
      rounds: stages a device holds.
      microbatches: of a step.
      delay: the tick at which the last device's first backward runs.
    """

    stages: int
    rounds: int
    microbatches: int
    delay: int

    @property
    def items(self) -> int:
        """Forwards (and backwards) of each device."""
        return self.microbatches * self.rounds

    @property
    def kept(self) -> int:
        """Stage inputs that a device keeps at once, at most."""
        return min(self.items, self.delay + self.stages * self.rounds)

    @property
    def ticks(self) -> tuple[int, int, int]:
        """Ticks of forwards only, of both, of backwards only."""
        last_forward, end = self.items + self.stages - 1, self.delay + self.items + self.stages - 1
        return self.delay, last_forward - self.delay, end - last_forward

    @property
    def bubble(self) -> float:
        """The share of the time in which a device idles, by the ticks of the program."""
        forward, both, backward = self.ticks
        return 1 - 2 * self.items / (forward + 2 * both + backward)

    def forward(self, tick: Array, device: Array) -> "Item":
        """What a device does forwards in a tick."""
        return self._item(tick - device, ascending=True)

    def backward(self, tick: Array, device: Array) -> "Item":
        """What a device does backwards in a tick."""
        return self._item(tick - self.delay - (self.stages - 1 - device), ascending=False)

    def _item(self, k: Array, *, ascending: bool) -> "Item":
        valid = (k >= 0) & (k < self.items)
        k = jnp.clip(k, 0, self.items - 1)
        if self.rounds == 1:
            return Item(valid, k, jnp.zeros_like(k), k % self.kept)
        # Microbatches go in flights of as many as there are devices, through all rounds.
        flight, r = jnp.divmod(k, self.stages * self.rounds)
        step, place = jnp.divmod(r, self.stages)
        turn = step if ascending else self.rounds - 1 - step
        arrived = (flight * self.rounds + turn) * self.stages + place
        return Item(valid, flight * self.stages + place, turn, arrived % self.kept)


class Item(NamedTuple):
    """One forward or backward: whether there is one, of which microbatch, which of the device's stages, where its input is kept."""

    valid: Array
    microbatch: Array
    turn: Array
    slot: Array


def schedule(layout: Layout, microbatches: int) -> Schedule:
    """The schedule of a layout."""
    p, v = layout.pipeline, layout.rounds
    delay = p * v - 1 if layout.schedule == "1f1b" else microbatches * v + p - 1
    return Schedule(p, v, microbatches, delay)


def arranged(specs: Tree, layout: Layout) -> Tree:
    """A parameter table whose stacked layers lie in the order in which each device's share is its stages'; on disk they never do."""
    if layout.rounds == 1:
        return specs

    def of(spec: ParamSpec) -> ParamSpec:
        return replace(spec, layers=tuple(spec.layers[r] for r in order(layout, len(spec.layers)))) if spec.layers else spec

    return jax.tree.map(of, specs, is_leaf=is_spec)


def order(layout: Layout, repeats: int) -> list[int]:
    """Which repeat of the pattern lies in each place of the stacked layers."""
    p, v = layout.pipeline, layout.rounds
    size = repeats // (p * v)
    return [(turn * p + device) * size + i for device in range(p) for turn in range(v) for i in range(size)]


def natural(tree: Tree, layout: Layout, *, back: bool = False) -> Tree:
    """A tree of parameters, or of what is shaped like them (a train state), with its stacked layers in their order; `back` undoes it."""
    if layout.rounds == 1:
        return tree

    def of(path: tuple, leaf: Array) -> Array:
        if "layers" not in name_of(path).split("/") or leaf.ndim == 0:
            return leaf
        lies = np.array(order(layout, leaf.shape[0]))
        return jax.device_put(fetched(leaf)[lies if back else np.argsort(lies)], leaf.sharding)

    return jax.tree_util.tree_map_with_path(of, tree)


def value_and_grad(model: Model, layout: Layout) -> Callable:
    """A `(params, batch of [microbatches, rows, ...], key, seed) -> (sums, gradient of seed * loss)` over a pipeline, with
    `params["layers"]` a tuple of one stacked group in the order of `order`; sums are a loss and a tree of metrics."""

    def run(params: Tree, batch: Tree, key: Array, seed: Array):
        plan = schedule(layout, jax.tree.leaves(batch)[0].shape[0])
        (layers,), outer = params["layers"], _outer(params)

        def local(layers, outer, batch, key, seed):
            device = jax.lax.axis_index(AXIS)
            does = _Device(model, plan, layers, outer, batch, key, device)
            carry = does.start()

            def forward(carry, t):
                return does.forward(carry, t), None

            def backward(carry, t):
                return does.backward(carry, t, seed), None

            def both(carry, t):
                return backward(forward(carry, t)[0], t)

            first = 0
            for count, tick in zip(plan.ticks, (forward, both, backward), strict=True):
                carry, _ = jax.lax.scan(tick, carry, first + jnp.arange(count))
                first += count
            return _together(carry["sums"]), carry["layers"], jax.lax.psum(carry["outer"], AXIS)

        run = jax.shard_map(
            local,
            in_specs=(P(AXIS), P(), P(), P(), P()),
            out_specs=(P(), P(AXIS), P()),
            axis_names={AXIS},
            check_vma=False,
        )
        sums, d_layers, d_outer = run(layers, outer, batch, key, seed)
        return sums, d_outer | {"layers": (d_layers,)}

    return run


def sums(model: Model, layout: Layout) -> Callable:
    """A `(params, microbatch, key) -> sums` of one microbatch going through the pipeline alone: evaluation."""

    def run(params: Tree, microbatch: Tree, key: Array | None):
        plan = Schedule(layout.pipeline, layout.rounds, microbatches=1, delay=0)
        (layers,), outer = params["layers"], _outer(params)
        batch = jax.tree.map(lambda a: a[None], microbatch)

        def local(layers, outer, batch):
            device = jax.lax.axis_index(AXIS)
            does = _Device(model, plan, layers, outer, batch, key, device)

            # The only microbatch is in a device's stages one after another, so its items are a round apart.
            def tick(carry, t):
                x, found = carry
                turn, here = jnp.divmod(t, plan.stages)
                item = Item(here == device, jnp.int32(0), turn, jnp.int32(0))
                now = item._replace(valid=jnp.bool_(True))
                y, added = does.stage(item, does.microbatch(item))(does.mine(item), does.entered(item, now, x))
                now = now._replace(valid=here == plan.stages - 1)
                return (_along(y, 1), does.sum(item, found, does.left(item, now, y), added)), None

            (_, found), _ = jax.lax.scan(tick, (does.nothing(), does.no_sums()), jnp.arange(plan.stages * plan.rounds))
            return _together(found)

        return jax.shard_map(local, in_specs=(P(AXIS), P(), P()), out_specs=P(), axis_names={AXIS}, check_vma=False)(layers, outer, batch)

    return run


def _outer(params: Tree) -> Tree:
    return {name: value for name, value in params.items() if name != "layers"}


def _along(x: Tree, step: int) -> Tree:
    """To the next device, or back to the one before."""
    n = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + step) % n) for i in range(n)]), x)


class _Device(NamedTuple):
    """What one device of the pipeline does, and with what."""

    model: Model
    plan: Schedule
    layers: Tree
    outer: Tree
    batch: Tree
    key: Array | None
    device: Array

    def start(self) -> Tree:
        """What ticks carry: activations and cotangents on their way, stage inputs kept, gradients and sums so far."""
        x = self.nothing()
        return {
            "x": x,
            "dx": x,
            "kept": jnp.zeros((self.plan.kept, *x.shape), x.dtype),
            "layers": jax.tree.map(jnp.zeros_like, stand_ins(self.layers)),
            "outer": jax.tree.map(jnp.zeros_like, self.outer),
            "sums": self.no_sums(),
        }

    def forward(self, carry: Tree, tick: Array) -> Tree:
        item = self.plan.forward(tick, self.device)
        x = self.entered(item, self.plan.forward(tick, 0), carry["x"])
        y, _ = self.stage(item, self.microbatch(item))(self.mine(item), x)
        kept = jax.lax.dynamic_update_index_in_dim(carry["kept"], jnp.where(item.valid, x, carry["kept"][item.slot]), item.slot, 0)
        return carry | {"x": _along(y, 1), "kept": kept}

    def backward(self, carry: Tree, tick: Array, seed: Array) -> Tree:
        item = self.plan.backward(tick, self.device)
        microbatch, x = self.microbatch(item), carry["kept"][item.slot]
        layers, stage = self.mine(item), self.stage(item, microbatch)
        (y, added), pull = jax.vjp(lambda by, x: stage(joined(layers, by), x), stand_ins(layers), x)
        left, d_outer, dy = self.left_with_gradients(item, self.plan.backward(tick, self.plan.stages - 1), y, seed)
        dy = jnp.where(self.is_last(item), dy, carry["dx"])
        d_layers, dx = pull((jnp.where(item.valid, dy, 0), _seeded(added, jnp.where(item.valid, seed, 0))))

        def enter(d_outer):
            _, pull = jax.vjp(lambda outer: self.model.enter(outer, microbatch, self.key), self.outer)
            return jax.tree.map(jnp.add, d_outer, pull(jnp.where(item.valid & self.is_first(item), dx, 0))[0])

        first = self.plan.backward(tick, 0)
        d_outer = jax.lax.cond(first.valid & (first.turn == 0), enter, lambda d: d, d_outer)
        return carry | {
            "dx": _along(dx, -1),
            "layers": self.add(item, carry["layers"], d_layers),
            "outer": jax.tree.map(jnp.add, carry["outer"], d_outer),
            "sums": self.sum(item, carry["sums"], left, added),
        }

    # Devices that take different branches may wait for each other in collectives for ever. So whether something enters or leaves is asked
    # of the tick, which all devices share; they all do the work, which costs no time since they would wait for the one that must.

    def entered(self, item: Item, entering: Item, arrived: Array) -> Array:
        """A stage's input: what enters the first stage, what arrived elsewhere."""

        def enter():
            return self.model.enter(self.outer, self.microbatch(entering), self.key)

        x = jax.lax.cond(entering.valid & (entering.turn == 0), enter, lambda: arrived)
        return jnp.where(self.is_first(item), x, arrived)

    def left(self, item: Item, leaving: Item, y: Array) -> Any:
        """Sums of what leaves the last stage; nothing elsewhere."""
        sums = jax.lax.cond(self.leaves(leaving), lambda: self.model.leave(self.outer, y, self.microbatch(item)), lambda: self.no_sums()[0])
        return self.only(item, sums)

    def left_with_gradients(self, item: Item, leaving: Item, y: Array, seed: Array) -> tuple:
        """The same, with gradients of `seed * loss` by the outer parameters and by y."""
        microbatch, seed = self.microbatch(item), jnp.where(item.valid & self.is_last(item), seed, 0)

        def leave():
            sums, pull = jax.vjp(lambda outer, y: self.model.leave(outer, y, microbatch), self.outer, y)
            return sums, *pull(_seeded(sums, seed))

        def stay():
            return self.no_sums()[0], *jax.tree.map(jnp.zeros_like, (self.outer, y))

        sums, d_outer, dy = jax.lax.cond(self.leaves(leaving), leave, stay)
        return self.only(item, sums), d_outer, dy

    def leaves(self, item: Item) -> Array:
        return item.valid & (item.turn == self.plan.rounds - 1)

    def only(self, item: Item, sums: Any) -> Any:
        return jax.tree.map(lambda a: jnp.where(item.valid & self.is_last(item), a, 0), sums)

    def is_first(self, item: Item) -> Array:
        return (self.device == 0) & (item.turn == 0)

    def is_last(self, item: Item) -> Array:
        return (self.device == self.plan.stages - 1) & (item.turn == self.plan.rounds - 1)

    def stage(self, item: Item, microbatch: Tree) -> Callable:
        size = jax.tree.leaves(self.layers)[0].shape[0] // self.plan.rounds
        first = (item.turn * self.plan.stages + self.device) * size
        return lambda layers, x: self.model.stage(layers, x, microbatch, self.key, first)

    def microbatch(self, item: Item) -> Tree:
        return jax.tree.map(lambda a: a[item.microbatch], self.batch)

    def mine(self, item: Item) -> Tree:
        """The layers of an item's stage."""
        if self.plan.rounds == 1:
            return self.layers
        return jax.tree.map(lambda a: a.reshape(self.plan.rounds, -1, *a.shape[1:])[item.turn], self.layers)

    def add(self, item: Item, total: Tree, gradient: Tree) -> Tree:
        if self.plan.rounds == 1:
            return jax.tree.map(jnp.add, total, gradient)
        turns = jax.tree.map(lambda a: a.reshape(self.plan.rounds, -1, *a.shape[1:]), total)
        return jax.tree.map(lambda a, g, t: a.at[item.turn].add(g).reshape(t.shape), turns, gradient, total)

    def nothing(self) -> Array:
        microbatch = jax.tree.map(lambda a: a[0], self.batch)
        shape = jax.eval_shape(self.model.enter, self.outer, microbatch, self.key)
        return jnp.zeros(shape.shape, shape.dtype)

    def no_sums(self) -> tuple:
        """Sums of nothing: of what the last layer gives, and of what layers add."""
        microbatch, x = jax.tree.map(lambda a: a[0], self.batch), self.nothing()
        item = Item(jnp.bool_(True), *jnp.zeros(3, jnp.int32))
        _, added = jax.eval_shape(self.stage(item, microbatch), self.mine(item), x)
        shapes = jax.eval_shape(self.model.leave, self.outer, x, microbatch), added
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def sum(self, item: Item, total: tuple, left, added) -> tuple:
        added = jax.tree.map(lambda a: jnp.where(item.valid, a, 0), added)
        return jax.tree.map(jnp.add, total, (left, added))


def _together(sums: tuple):
    """All devices' sums as one loss and its metrics."""
    (loss, metrics), (more, others) = jax.lax.psum(sums, AXIS)
    return loss + more, metrics | others


def _seeded(sums, seed: Array):
    """The cotangent of sums: that of the loss is `seed`, of metrics nothing."""
    loss, metrics = sums
    return seed.astype(loss.dtype), jax.tree.map(jnp.zeros_like, metrics)
