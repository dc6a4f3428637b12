"""Mixture of experts: feed-forwards of which a router picks a few for each token (Shazeer et al., 2017; Mixtral, Jiang et al., 2024).

Two modes. Dropless: rows are sorted by expert and multiplied group by group. With a capacity (GShard, Lepikhin et al., 2021; Switch,
Fedus et al., 2022) an expert has a fixed number of slots in each sequence, which its tokens fill in order of position; those that find
none pass it by. Slots are counted by sequence so that what is dropped depends neither on how sequences are grouped nor on later tokens.
Capacity is a device of training: with a cache no token is dropped, since it would be by the length of the call that brings it. Padding
(segment 0) goes to no expert.

On a mesh the `expert` axis splits experts as well as rows. Capacity: slots travel to their experts and back by all-to-all, each device
sending `factor x experts per token` times its tokens. Dropless, whose counts are only known at run time: every device is given the tokens
of all (all-gather over the axis), works on those that are its experts', and sums are scattered back (reduce-scatter); that is exact and
balanced or not as the router is, and sends each token to as many devices as the axis has. Experts' hidden dimension is split by `tensor`,
and their embedding by ZeRO, as any feed-forward's.

Experts have no biases; shared experts have them where the config does.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.params import Normal, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import KEPT, Part, Split, linear, ragged
from lmx.kernels.wide import wide, widened
from lmx.models import feedforward
from lmx.models.config import Transformer
from lmx.models.linears import linear_specs
from lmx.models.sites import NONE, Sites
from lmx.parallel.collective import goes_round
from lmx.parallel.manual import axes, manual, names
from lmx.parallel.rules import constrain, move, partition

Aux = dict[str, Float[Array, "batch"]]
"""What layers give beside their output, by name: fp32 at least, a number a row, to be summed over layers. Empty but for mixtures."""


def specs(config: Transformer) -> Tree:
    """Parameters of one mixture. The router's `[embed, experts]` lies whole on every device: it is small, and each needs all of it."""
    plain, width = replace(config, bias=False), config.expert_hidden

    def each(inputs: tuple[int, str], outputs: tuple[int, str], *, residual: bool = False) -> Tree:
        (n, i), (m, o) = inputs, outputs
        weight = linear_specs((n,), (m,), (i,), (o,), plain, residual=residual)["weight"]
        return {"weight": replace(weight, shape=(config.experts, *weight.shape), axes=("experts", *weight.axes))}

    embed, mlp = (config.embed, "embed"), (width, "mlp")
    tree = {"router": {"weight": ParamSpec((config.embed, config.experts), ("embed", None), 1, Normal(config.init_std))}}
    tree |= {name: each(embed, mlp) for name in (("gate", "up") if config.gated else ("up",))}
    tree |= {"down": each(mlp, embed, residual=True)}
    if config.shared_experts:
        tree["shared"] = feedforward.specs(replace(config, mlp=config.shared_hidden))
    if config.shared_gate:
        tree["shared_gate"] = {"weight": ParamSpec((config.embed, 1), ("embed", None), 1, Normal(config.init_std))}
    return tree


def experts(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Transformer,
    execution: Execution,
    *,
    segments: Int[Array, "batch length"] | None = None,
    decoding: bool = False,
    sites: Sites = NONE,
) -> tuple[Float[Array, "batch length embed"], Aux]:
    """The sum of each token's experts, weighted by the router, and of the shared ones; and, unless decoding, auxiliary values.

    Args:
      segments: 0 is padding, which goes to no expert.
      decoding: whether there is a cache: no token is dropped then, and there are no auxiliary values.

    Returns:
      the output, and for each row, fp32 at least (means over tokens that are not padding, so that weighted sums over rows are the same however rows
      are grouped): `balance`, `experts x sum over experts (share of the row's choices) x (mean probability)`, 1 where even (Switch, over
      each sequence); `router_z`, the mean of `log(Z)^2` of the router (ST-MoE, Zoph et al., 2022); `dropped`, the share of choices dropped.

    Raises:
      ValueError: sizes that the mesh does not divide, or a capacity where `layout.context` splits sequences.
    """
    capacity = None if decoding else capacity_of(config, x.shape[1])
    x = constrain(x, ("batch", "sequence", None), execution.rules)
    real = jnp.ones(x.shape[:2], bool) if segments is None else segments != 0
    routing, aux = _route(x, params["router"]["weight"], real, config, capacity, sites)
    own = {name: params[name]["weight"] for name in params if name not in ("router", "shared", "shared_gate")}
    y = _on_mesh(x, routing, own, config, execution, capacity)
    if config.shared_experts:
        there = ("batch", "sequence" if goes_round(x.shape, execution) else "length", None)
        whole = move(x, there, ("batch", "sequence", None), execution.rules)
        shared = feedforward.feedforward(whole, params["shared"], config, execution)
        if config.shared_gate:
            gate = jax.nn.sigmoid(linear(widened(whole), params["shared_gate"]["weight"]))
            shared = (widened(shared) * gate).astype(shared.dtype)
        y = y + shared
    return y, {} if decoding else aux


def capacity_of(config: Transformer, length: int) -> int | None:
    """Slots of an expert in a sequence; None where it takes every token."""
    if config.expert_capacity is None:
        return None
    return min(length, math.ceil(config.expert_capacity * config.experts_per_token * length / config.experts))


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
      chosen: each token's experts, the likeliest first, int `[batch, length, choices]`; `config.experts` for padding.
      weights: what their outputs are multiplied by, fp32 at least, of the same shape.
    """

    chosen: Array
    weights: Array


def _route(x: Array, weight: Array | Split, real: Array, config: Transformer, capacity: int | None, sites: Sites) -> tuple[Routing, Aux]:
    logits = sites("router/logits", linear(widened(x), weight))
    probabilities = jax.nn.softmax(logits)
    chosen = _likeliest(jax.lax.stop_gradient(logits), config.experts_per_token)
    hits = jax.nn.one_hot(chosen, config.experts, dtype=logits.dtype) * real[..., None, None]
    weights = jnp.sum(probabilities[..., None, :] * hits, -1)
    if config.renormalize_experts:
        weights = weights / jnp.where(real, weights.sum(-1), 1)[..., None]

    tokens = jnp.maximum(real.sum(1), 1).astype(logits.dtype)
    counts = hits.sum((1, 2))
    share = counts / (config.experts_per_token * tokens[:, None])
    mean = jnp.sum(probabilities * real[..., None], 1) / tokens[:, None]
    log_z = jax.nn.logsumexp(logits, -1)
    aux = {
        "balance": config.experts * jnp.sum(share * mean, -1),
        "router_z": jnp.sum(real * log_z**2, 1) / tokens,
        "dropped": jnp.zeros_like(tokens)
        if capacity is None
        else jnp.sum(jnp.maximum(counts - capacity, 0), -1) / (config.experts_per_token * tokens),
    }
    return Routing(jnp.where(real[..., None], chosen, config.experts), weights), aux


def _likeliest(logits: Array, choices: int) -> Array:
    """The indices of the largest, in order. `jax.lax.top_k` is not computed where its rows are: XLA gathers them all first."""
    found = []
    for _ in range(choices):
        found.append(jnp.argmax(logits, -1))
        logits = jnp.where(jax.nn.one_hot(found[-1], logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jnp.stack(found, -1)


def _on_mesh(x: Array, routing: Routing, params: Tree, config: Transformer, execution: Execution, capacity: int | None) -> Array:
    """Each device works on what its part of the mesh gives it; see the module's beginning for what travels."""
    sizes = {} if execution.rules is None else axes()
    mix = partial(_mix, config=config, capacity=capacity)
    if all(size == 1 for size in sizes.values()):
        return mix(x, routing, params, expert_axis=None)
    _check(config, capacity, sizes)
    place = partial(partition, rules=execution.rules, sizes=sizes)
    of_x = place(("batch", "sequence", None), x.shape)
    expert_axis = "expert" if sizes.get("expert", 1) > 1 else None
    summed, gathered = sizes.get("tensor", 1) > 1, "tensor" in names(P(of_x[1]))
    of_params, over = _places(params, specs(config), place)

    def local(x, routing, params):
        stays = execution.remat != "none"
        params = {name: Part(value, over[name], stays) if over[name] else value for name, value in params.items()}
        if gathered:
            x, routing = jax.tree.map(lambda a: jax.lax.all_gather(a, "tensor", axis=1, tiled=True), (x, routing))
        y = mix(x, routing, params, expert_axis=expert_axis)
        if gathered:
            return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y, "tensor") if summed else y

    arrays = {name: weight.value if isinstance(weight, Split) else weight for name, weight in params.items()}
    return manual(local, (of_x, Routing(of_x, of_x), of_params), of_x)(x, routing, arrays)


def _places(params: Tree, table: Tree, place: Callable[..., P]) -> tuple[Tree, Tree]:
    """Where each expert weight enters a manual region, and which of its dimensions are to be gathered over which axis there."""
    entered, over = {}, {}
    for name, weight in params.items():
        spec = table[name]["weight"]
        whole = place(spec.axes, spec.shape)
        entered[name] = weight.parts if isinstance(weight, Split) else whole
        pairs = [(d, axis) for d, entry in enumerate(entered[name]) for axis in names(P(entry)) if axis not in names(whole)]
        over[name] = tuple(pairs)
    return entered, over


def _check(config: Transformer, capacity: int | None, sizes: dict[str, int]) -> None:
    for knob, size, axis in (("model.experts", config.experts, "expert"), ("model.expert_mlp", config.expert_hidden, "tensor")):
        if size % sizes.get(axis, 1):
            raise ValueError(f"{knob}={size} is not divisible by layout.{axis}={sizes[axis]}")
    if capacity is not None and sizes.get("context", 1) > 1:
        raise ValueError(
            f"model.expert_capacity={config.expert_capacity} counts slots along a whole sequence, which layout.context={sizes['context']} "
            "splits; set one of them to None or 1"
        )


def _mix(x: Array, routing: Routing, params: Tree, *, config: Transformer, capacity: int | None, expert_axis: str | None) -> Array:
    """The experts of one device's tokens, `[batch, length, embed]`."""
    if capacity is None:
        return _dropless(x, routing, params, config, expert_axis)
    return _with_capacity(x, routing, params, config, capacity, expert_axis)


def _dropless(x: Array, routing: Routing, params: Tree, config: Transformer, expert_axis: str | None) -> Array:
    count, first = config.experts, 0
    if expert_axis is not None:
        x, routing = jax.tree.map(lambda a: jax.lax.all_gather(a, expert_axis, axis=0, tiled=True), (x, routing))
        count = config.experts // jax.lax.axis_size(expert_axis)
        first = jax.lax.axis_index(expert_axis) * count
    own = routing.chosen - first
    own = jnp.where((own >= 0) & (own < count), own, count).reshape(1, -1, own.shape[-1])
    rank, sizes = _ranks(own, count)
    starts = jnp.append(jnp.cumsum(sizes[0]) - sizes[0], own.size)  # what is no expert's here goes past the end
    slots = jnp.minimum(starts[own] + rank, own.size)
    y = _through(x, slots, own.size, routing.weights, lambda rows: _feed(rows, params, config, sizes[0]))
    return y if expert_axis is None else jax.lax.psum_scatter(y, expert_axis, scatter_dimension=0, tiled=True)


def _with_capacity(x: Array, routing: Routing, params: Tree, config: Transformer, capacity: int, expert_axis: str | None) -> Array:
    batch, _, embed = x.shape
    rank, _ = _ranks(routing.chosen, config.experts)
    total = config.experts * batch * capacity
    kept = (rank < capacity) & (routing.chosen < config.experts)
    slots = jnp.where(kept, (routing.chosen * batch + jnp.arange(batch)[:, None, None]) * capacity + rank, total)

    def feed(rows: Array) -> Array:
        rows = rows.reshape(config.experts, batch * capacity, embed)
        if expert_axis is None:
            return _feed(rows, params, config).reshape(total, embed)
        travel = partial(jax.lax.all_to_all, axis_name=expert_axis, tiled=True)
        rows = travel(rows, split_axis=0, concat_axis=1)
        return travel(_feed(rows, params, config), split_axis=1, concat_axis=0).reshape(total, embed)

    return _through(x, slots, total, routing.weights, feed)


def _feed(rows: Array, params: Tree, config: Transformer, sizes: Array | None = None) -> Array:
    """Each row through its expert; rows as `lmx.core.weights.ragged` takes them."""
    activation = feedforward.ACTIVATIONS[config.activation]

    def rest(*projected: Array) -> Array:
        hidden = activation(projected[0]) * projected[1] if config.gated else activation(projected[0])
        return ragged(hidden, params["down"], sizes)

    return jax.checkpoint(rest, policy=KEPT)(*(ragged(rows, params[name], sizes) for name in (("gate", "up") if config.gated else ("up",))))


def _ranks(chosen: Array, count: int) -> tuple[Array, Array]:
    """How many earlier tokens of its group chose the same expert, for each choice `[groups, tokens, choices]`; and how many chose each
    expert, `[groups, experts]`. Choices that are no expert are `count`."""
    hits = jax.nn.one_hot(chosen, count, dtype=jnp.int32).sum(2)
    before = jnp.cumsum(hits, 1) - hits
    return jnp.take_along_axis(before, jnp.minimum(chosen, count - 1), -1), hits.sum(1)


def _through(x: Array, slots: Array, total: int, weights: Array, feed: Callable[[Array], Array]) -> Array:
    """Tokens into their slots, of which there are `total`, through `feed`, and back: the weighted sum of each token's choices. A choice
    whose slot is `total` gives nothing."""
    choices, embed = slots.shape[-1], x.shape[-1]
    slots = slots.reshape(-1, choices)
    source = jnp.full(total, slots.size).at[slots.reshape(-1)].set(jnp.arange(slots.size), mode="drop")
    rows = _carry(x.reshape(-1, embed), source[:, None] // choices, slots)
    back = _carry(feed(rows), slots.reshape(-1, 1), source[:, None]).reshape(*slots.shape, embed)
    return jnp.sum(back * weights.reshape(*slots.shape, 1), 1).astype(x.dtype).reshape(x.shape)


@jax.custom_vjp
def _carry(x: Array, there: Array, back: Array) -> Array:
    """Rows `sum over a of x[there[i, a]]`, an index past the end giving zero. `back` is the same relation seen from x, so that the backward
    pass is a gather too, and no scatter."""
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0).sum(1, dtype=wide(x.dtype)).astype(x.dtype)


_carry.defvjp(lambda x, there, back: (_carry(x, there, back), (there, back)), lambda saved, g: (_carry(g, *saved[::-1]), None, None))
