"""RWKV (Peng et al., 2023, arXiv 2305.13048; 2024, arXiv 2404.05892; 2025, arXiv 2503.14456) as pure functions: a parameter table and one
forward, in parallel and from token to token. Time mixing of RWKV-4 is here, that of 5 and 6 in `lmx.models.rwkv_heads`, of 7 in
`lmx.models.rwkv_delta`."""

import math
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.params import Normal, OfLayer, ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.core.weights import linear, narrowed, whole
from lmx.kernels.wide import wide, widened
from lmx.kernels.wkv import empty, wkv, wkv_from
from lmx.models import dropout as drop
from lmx.models import norms, rwkv_delta, rwkv_heads, stack, token_shift
from lmx.models import sites as named
from lmx.models.config import RWKV
from lmx.models.dropout import Dropout
from lmx.models.experts import Aux
from lmx.models.linears import linear_specs
from lmx.models.sites import Edits
from lmx.models.token_shift import BETWEEN, INSIDE, Context, latest, own_share, projected, token_before
from lmx.models.transformer import Output
from lmx.parallel.context import ring_size
from lmx.parallel.offload import fetched
from lmx.parallel.rules import constrain, move, placed, placed_outside
from lmx.parallel.tensor import lookup


@flax.struct.dataclass
class State:
    """What is carried from token to token, of a size that does not depend on how many there were.

    Attributes:
      layers: for each group of the stack, in the form of its parameters: of each sublayer what it last read, `{"attention": {"last", "sums"},
        "feedforward": {"last"}}` with `last` of `[batch, embed]`, and sums `lmx.kernels.wkv.Sums` of `[batch, channels]` or, from RWKV-5 on,
        a matrix of each head `[batch, heads, head_dim, head_dim]`.
      segments: the segment of the last token, 0 before the first.
    """

    layers: Tree
    segments: Int[Array, "batch"]


@dataclass(frozen=True)
class Decay(OfLayer):
    """Channels from those that remember to those that forget, deeper layers with more of the former (the paper's appendix)."""

    layers: int

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        share = jnp.arange(shape[0]) / max(shape[0] - 1, 1)
        return -5 + 8 * share ** (0.7 + 1.3 * layer / max(self.layers - 1, 1))


@dataclass(frozen=True)
class Bonus(OfLayer):
    """log 0.3, and a half more or less from channel to channel."""

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        return math.log(0.3) + 0.5 * ((jnp.arange(shape[0]) + 1) % 3 - 1)


def specs(config: RWKV) -> Tree:
    """The parameter table."""
    norm = norms.specs("layernorm", config.embed, "embed", bias=True)
    tree = {
        "embed": ParamSpec((config.vocab, config.embed), ("vocab", "embed"), init=Normal(config.init_std)),
        "embed_norm": norm,
        "layers": stack.specs(config, layer_specs),
        "norm": norm,
    }
    if not config.tied:
        tree["head"] = ParamSpec((config.embed, config.vocab), ("embed", "vocab"), 1, Normal(config.init_std))
    return tree


def layer_specs(config: RWKV, kind: str) -> Tree:
    """Parameters of one layer. A sublayer's `shift` holds, for each of its projections, the share of a token itself in what is projected."""
    return {
        "attention_norm": norms.specs("layernorm", config.embed, "embed", bias=True),
        "attention": {4: time_specs, 7: rwkv_delta.specs}.get(config.version, rwkv_heads.specs)(config),
        "feedforward_norm": norms.specs("layernorm", config.embed, "embed", bias=True),
        "feedforward": _channel_specs(config),
    }


def _channel_specs(config: RWKV) -> Tree:
    """Parameters of one layer's channel mixing, which has no gate in RWKV-7."""
    embed, hidden = (config.embed,), (config.hidden,)
    tree = {
        "key": linear_specs(embed, hidden, ("embed",), ("mlp",), config),
        "value": linear_specs(hidden, embed, ("mlp",), ("embed",), config, residual=True),
    }
    if config.version > 6:
        return tree | {"shift": token_shift.specs(config, steep=4, key=(1.0, 0.0))}
    gate = {"receptance": linear_specs(embed, embed, ("embed",), (None,), config)}
    return tree | gate | {"shift": token_shift.specs(config, key=(1.0, 0.0), receptance=(1.0, 0.0))}


def time_specs(config: RWKV) -> Tree:
    """Parameters of one layer's time mixing in RWKV-4."""
    embed, width = (config.embed,), (config.width,)
    tree = {name: linear_specs(embed, width, ("embed",), ("heads",), config) for name in ("key", "value", "receptance")}
    return tree | {
        "output": linear_specs(width, embed, ("heads",), ("embed",), config, residual=True),
        "time": {
            "decay": ParamSpec(width, ("heads",), init=Decay(config.layers)),
            "bonus": ParamSpec(width, ("heads",), init=Bonus()),
        },
        "shift": token_shift.specs(config, key=(1.0, 0.0), value=(1.0, 0.3), receptance=(0.5, 0.0)),
    }


def empty_cache(config: RWKV, batch: int, slots: int = 0, dtype=jnp.float32, *, unrolled: bool = True) -> State:
    """The state before the first token, for parameters as tuples of layers (`unrolled`) or stacked. It has no `slots`, however many a
    cache would need."""
    last = jnp.zeros((batch, config.embed), dtype)
    sums = empty(batch, config.width, wide(dtype)) if config.version == 4 else rwkv_heads.empty(config, batch, wide(dtype))
    layer = {"attention": {"last": last, "sums": sums}, "feedforward": {"last": last}}
    stacked = {"0": jax.tree.map(lambda a: jnp.broadcast_to(a, (config.layers, *a.shape)), layer)}
    layers = (layer,) * config.layers if unrolled else stacked
    return State((layers,), jnp.zeros(batch, jnp.int32))


def forward(
    params: Tree,
    config: RWKV,
    tokens: Int[Array, "batch length"],
    *,
    positions: Int[Array, "batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    cache: State | None = None,
    dropout: Dropout | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> Output:
    """Hidden states of tokens, as `lmx.models.transformer.forward` gives them.

    Args:
      params: as `specs` says, layers stacked or as a tuple.
      positions: not read: order is the order in the row.
      segments: which text of a packed row each token belongs to, from 1; 0 is padding, before, between and behind texts, and is passed over.
        All one text when None. A text's tokens lie side by side.
      cache: the state after earlier tokens. The row's first text goes on from it where it has the segment of the last token (1, or None).
      dropout: None, or what is dropped from where.
      edits: what is changed inside, by the names of `lmx.models.sites`.

    Raises:
      ValueError: an execution that puts sequences in another order.
    """
    if ring_size(execution) > 1:
        raise ValueError("layout.exchange=ring puts sequences in another order than an RWKV reads them in; set layout.context to 1")
    edits = edits or {}
    named.check(config, execution, edits)
    sites = named.outside(execution.taps, edits)
    context = _context(tokens.shape, segments, cache, dropout)
    x = sites("embeddings", enter(params, config, tokens, positions, dropout, execution))
    before = None if cache is None else cache.layers
    if config.version > 6:
        context = context.replace(first=_first(x, params["layers"][0], config, context, execution, None if before is None else before[0]))
    x, layers, aux, taps = stack.run_layers(x, params["layers"], config, context, execution, before, block, edits)
    hidden = sites("final", leave(params, config, x, execution))
    taps |= sites.found
    if cache is None:
        return Output(hidden, None, aux, taps)
    segments = jnp.ones_like(tokens) if segments is None else segments.astype(jnp.int32)
    return Output(hidden, State(layers, latest(segments[..., None], cache.segments[:, None], context)[:, 0]), aux, taps)


def enter(
    params: Tree, config: RWKV, tokens: Array, positions: Array | None, dropout: Dropout | None, execution: Execution
) -> Float[Array, "batch length embed"]:
    """What the first layer reads."""
    params, dtype = placed_outside(params, specs(config), execution), jnp.dtype(execution.precision.compute)
    x = lookup(tokens, params["embed"], dtype, execution.rules)
    x = norms.norm(constrain(x, BETWEEN, execution.rules), params["embed_norm"], "layernorm", config.norm_epsilon)
    return drop.apply(x, dropout, "embed", 0)


def leave(params: Tree, config: RWKV, x: Array, execution: Execution) -> Float[Array, "batch length embed"]:
    """Hidden states, from what the last layer gives."""
    return norms.norm(x, placed_outside(params, specs(config), execution)["norm"], "layernorm", config.final_norm_epsilon)


def share(config: RWKV, positions: Array, segments: Array | None, dropout: Dropout | None, execution: Execution) -> Context:
    """What the layers of one forward without a state share."""
    return _context(positions.shape, segments, None, dropout)


def _context(shape: tuple[int, int], segments: Array | None, cache: State | None, dropout: Dropout | None) -> Context:
    segments = jnp.ones(shape, jnp.int32) if segments is None else segments
    real = segments > 0
    first = jnp.arange(shape[1]) == 0
    follows = real & ~first & (segments == jnp.roll(segments, 1, 1))
    resumes = jnp.zeros_like(real)
    if cache is not None:
        resumes = real & (jnp.cumsum(real, 1) == 1) & (segments == cache.segments[:, None])
    last = jnp.max(jnp.where(real, jnp.arange(shape[1]), -1), 1)
    return Context(real, real & ~follows & ~resumes, follows, resumes, last, dropout)


def block(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: RWKV,
    context: Context,
    execution: Execution,
    *,
    kind: str,
    layer: Array | int,
    cache: Tree | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None, Aux]:
    """One layer; gives its output and, where there is one, its state after the last token (`State.layers`)."""
    params = placed(params, layer_specs(config, kind), execution)
    if execution.precision.fp8:
        params |= {name: narrowed(params[name]) for name in ("attention", "feedforward")}
    new = {}
    mixing = {4: time_mixing, 7: partial(rwkv_delta.time_mixing, layer=layer)}.get(config.version, rwkv_heads.time_mixing)
    for name, sublayer in (("attention", mixing), ("feedforward", channel_mixing)):
        y = norms.norm(x, params[f"{name}_norm"], "layernorm", config.norm_epsilon)
        y = move(y, INSIDE, BETWEEN, execution.rules)
        y, new[name] = sublayer(y, params[name], config, context, execution, None if cache is None else cache[name])
        if config.rescale_every:
            y = jnp.ldexp(y, -(layer // config.rescale_every)).astype(x.dtype)
        y = context.sites(f"{name}/output", drop.apply(y, context.dropout, name, layer))
        x = constrain(x + y, BETWEEN, execution.rules)
        if name == "attention":
            x = context.sites("residual", x)
    if config.rescale_every:
        x = jnp.where((layer + 1) % config.rescale_every == 0, x / 2, x)
    return x, None if cache is None else new, {}


run_part = partial(stack.run_part, layer=block)
"""Consecutive layers: a stage of a pipeline."""


def _first(x: Array, group: Tree, config: RWKV, context: Context, execution: Execution, cache: Tree | None) -> Array:
    """The first layer's values, of what it reads, from the first group of parameters and states."""
    stacked = isinstance(group, dict)
    params = fetched(jax.tree.map(lambda a: a[0], group["0"])) if stacked else group[0]
    state = None if cache is None else jax.tree.map(lambda a: a[0], cache["0"]) if stacked else cache[0]
    params = placed(params, layer_specs(config, config.pattern[0]), execution)
    attention = narrowed(params["attention"]) if execution.precision.fp8 else params["attention"]
    y = norms.norm(x, params["attention_norm"], "layernorm", config.norm_epsilon)
    y = move(y, INSIDE, BETWEEN, execution.rules)
    before = token_before(y, context, None if state is None else state["attention"], execution)
    return rwkv_delta.values(y, before, attention, config, execution)


def time_mixing(
    x: Float[Array, "batch length embed"], params: Tree, config: RWKV, context: Context, execution: Execution, state: Tree | None
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes tokens: `output(sigmoid(receptance) * wkv(key, value))`."""
    before = token_before(x, context, state, execution)

    def project(name: str, site: str) -> Array:
        y = projected(x, before, lambda: own_share(params["shift"][name], config), params[name]["weight"], execution, INSIDE)
        y = context.sites(f"attention/{site}", constrain(y, ("batch", "length", "heads"), execution.rules))
        return checkpoint_name(y, site)

    receptance, key, value = project("receptance", "query"), project("key", "key"), project("value", "value")
    decay, bonus = -jnp.exp(widened(whole(params["time"]["decay"]))), widened(whole(params["time"]["bonus"]))
    if state is None:
        mixed, new = wkv(key, value, decay, bonus, context.real, context.fresh), None
    else:
        mixed, sums = wkv_from(key, value, decay, bonus, context.real, context.fresh, state["sums"])
        new = {"last": latest(x, state["last"], context), "sums": sums}
    mixed = context.sites("attention/mixed", constrain(mixed, ("batch", "length", "heads"), execution.rules))
    mixed = checkpoint_name(mixed, "mixed")
    return linear(_gated(receptance, mixed), params["output"]["weight"]), new


def channel_mixing(
    x: Float[Array, "batch length embed"], params: Tree, config: RWKV, context: Context, execution: Execution, state: Tree | None
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes channels: `sigmoid(receptance) * value(relu(key)^2)`, in RWKV-7 without the gate."""
    before = token_before(x, context, state, execution)
    own = {name: partial(own_share, share, config) for name, share in params["shift"].items()}
    hidden = projected(x, before, own["key"], params["key"]["weight"], execution, INSIDE)
    hidden = checkpoint_name(constrain(hidden, ("batch", "length", "mlp"), execution.rules), "hidden")
    hidden = context.sites("feedforward/hidden", jax.checkpoint(_squared)(hidden))
    value = linear(hidden, params["value"]["weight"])
    new = None if state is None else {"last": latest(x, state["last"], context)}
    if config.version > 6:
        return constrain(value, BETWEEN, execution.rules), new
    # The gate is as wide as the residual stream: each tensor device computes that of its own part of the sequence.
    receptance = projected(x, before, own["receptance"], params["receptance"]["weight"], execution, BETWEEN)
    receptance = constrain(receptance, BETWEEN, execution.rules)
    y = _gated(receptance, constrain(value, BETWEEN, execution.rules))
    return y, new


@jax.checkpoint
def _gated(receptance: Array, y: Array) -> Array:
    return (jax.nn.sigmoid(widened(receptance)) * widened(y)).astype(y.dtype)


def _squared(hidden: Array) -> Array:
    return jnp.square(jax.nn.relu(widened(hidden))).astype(hidden.dtype)


def flops_per_token(config: RWKV, length: int) -> float:
    """FLOPs of training on one token, forward and backward, as MFU counts them: 6 for each weight that multiplies it, and for
    each time that a number of heads' matrices is written or read. What is done channel by channel is not counted; nothing depends on the length."""
    heads = {4: 0.0, 7: 24.0}.get(config.version, 12.0) * config.layers * config.width * config.head_dim
    weights = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs(config), is_leaf=is_spec) if spec.inputs)
    return 6.0 * (weights + (config.vocab * config.embed if config.tied else 0)) + heads
