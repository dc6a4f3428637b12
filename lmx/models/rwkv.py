"""RWKV-4 (Peng et al., 2023, arXiv 2305.13048) as pure functions: a parameter table and one forward, in parallel and from token to token."""

import math
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from lmx.core.execution import Execution
from lmx.core.params import Normal, OfLayer, ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.core.weights import PRODUCT, Weight, linear, narrowed, whole
from lmx.kernels.wide import wide, widened
from lmx.kernels.wkv import empty, wkv, wkv_from
from lmx.models import dropout as drop
from lmx.models import norms, stack
from lmx.models import sites as named
from lmx.models.config import RWKV
from lmx.models.dropout import Dropout
from lmx.models.experts import Aux
from lmx.models.linears import linear_specs
from lmx.models.sites import NONE, Edits, Sites
from lmx.models.transformer import Output
from lmx.parallel.rules import constrain, move, placed
from lmx.parallel.tensor import lookup

BETWEEN, INSIDE = ("batch", "sequence", None), ("batch", "length", None)


@flax.struct.dataclass
class State:
    """What is carried from token to token, of a size that does not depend on how many there were.

    Attributes:
      layers: for each group of the stack, in the form of its parameters: of each sublayer what it last read, `{"attention": {"last", "sums"},
        "feedforward": {"last"}}` with `last` of `[batch, embed]`, and the `lmx.kernels.wkv.Sums` of `[batch, channels]`.
      segments: the segment of the last token, 0 before the first.
    """

    layers: Tree
    segments: Int[Array, "batch"]


@flax.struct.dataclass
class Context:
    """What the layers of one forward share.

    Attributes:
      real: False at padding.
      fresh: where a text begins.
      follows: whether the token before in the row is of the same text.
      resumes: of the first token of each row, whether it goes on from the state.
      last: the index of each row's last token, -1 where all are padding.
      sites: of the layer at hand.
    """

    real: Bool[Array, "batch length"]
    fresh: Bool[Array, "batch length"]
    follows: Bool[Array, "batch length"]
    resumes: Bool[Array, "batch length"]
    last: Int[Array, "batch"]
    dropout: Dropout | None = None
    sites: Sites = flax.struct.field(pytree_node=False, default=NONE)


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


@dataclass(frozen=True)
class Shift(OfLayer):
    """The share of a token itself, the rest being the token's before: more of it in later dimensions and in deeper layers."""

    layers: int
    power: float = 1.0
    more: float = 0.0

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        share = jnp.arange(shape[0]) / shape[0]
        return share ** (self.power * (1 - layer / self.layers)) + self.more * layer / max(self.layers - 1, 1)


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
    embed, width, hidden = ((size,) for size in (config.embed, config.width, config.hidden))

    def shift(**inits: OfLayer) -> Tree:
        return {name: ParamSpec(embed, ("embed",), init=init) for name, init in inits.items()}

    plain, value = Shift(config.layers), Shift(config.layers, more=0.3)
    attention = {name: linear_specs(embed, width, ("embed",), ("heads",), config) for name in ("key", "value", "receptance")}
    return {
        "attention_norm": norms.specs("layernorm", config.embed, "embed", bias=True),
        "attention": attention
        | {
            "output": linear_specs(width, embed, ("heads",), ("embed",), config, residual=True),
            "time": {
                "decay": ParamSpec(width, ("heads",), init=Decay(config.layers)),
                "bonus": ParamSpec(width, ("heads",), init=Bonus()),
            },
            "shift": shift(key=plain, value=value, receptance=Shift(config.layers, power=0.5)),
        },
        "feedforward_norm": norms.specs("layernorm", config.embed, "embed", bias=True),
        "feedforward": {
            "key": linear_specs(embed, hidden, ("embed",), ("mlp",), config),
            "receptance": linear_specs(embed, embed, ("embed",), (None,), config),
            "value": linear_specs(hidden, embed, ("mlp",), ("embed",), config, residual=True),
            "shift": shift(key=plain, receptance=plain),
        },
    }


def empty_cache(config: RWKV, batch: int, slots: int = 0, dtype=jnp.float32, *, unrolled: bool = True) -> State:
    """The state before the first token, for parameters as tuples of layers (`unrolled`) or stacked. It has no `slots`, however many a
    cache would need."""
    last = jnp.zeros((batch, config.embed), dtype)
    layer = {"attention": {"last": last, "sums": empty(batch, config.width, wide(dtype))}, "feedforward": {"last": last}}
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
    """
    edits = edits or {}
    named.check(config, execution, edits)
    sites = named.outside(execution.taps, edits)
    context = _context(tokens.shape, segments, cache, dropout)
    x = sites("embeddings", enter(params, config, tokens, positions, dropout, execution))
    before = None if cache is None else cache.layers
    x, layers, aux, taps = stack.run_layers(x, params["layers"], config, context, execution, before, block, edits)
    hidden = sites("final", leave(params, config, x, execution))
    taps |= sites.found
    if cache is None:
        return Output(hidden, None, aux, taps)
    segments = jnp.ones_like(tokens) if segments is None else segments.astype(jnp.int32)
    return Output(hidden, State(layers, _latest(segments[..., None], cache.segments[:, None], context)[:, 0]), aux, taps)


def enter(
    params: Tree, config: RWKV, tokens: Array, positions: Array | None, dropout: Dropout | None, execution: Execution
) -> Float[Array, "batch length embed"]:
    """What the first layer reads."""
    params, dtype = _own(params, config, execution), jnp.dtype(execution.precision.compute)
    x = lookup(tokens, params["embed"], dtype, execution.rules)
    x = norms.norm(constrain(x, BETWEEN, execution.rules), params["embed_norm"], "layernorm", config.norm_epsilon)
    return drop.apply(x, dropout, "embed", 0)


def leave(params: Tree, config: RWKV, x: Array, execution: Execution) -> Float[Array, "batch length embed"]:
    """Hidden states, from what the last layer gives."""
    return norms.norm(x, _own(params, config, execution)["norm"], "layernorm", config.final_norm_epsilon)


def _own(params: Tree, config: RWKV, execution: Execution) -> Tree:
    """The parameters outside the stack."""
    own = {name: value for name, value in params.items() if name != "layers"}
    return placed(own, {name: spec for name, spec in specs(config).items() if name in own}, execution)


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
    for name, sublayer in (("attention", time_mixing), ("feedforward", channel_mixing)):
        y = norms.norm(x, params[f"{name}_norm"], "layernorm", config.norm_epsilon)
        y = move(y, INSIDE, BETWEEN, execution.rules)
        y, new[name] = sublayer(y, params[name], context, execution, None if cache is None else cache[name])
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


def time_mixing(
    x: Float[Array, "batch length embed"], params: Tree, context: Context, execution: Execution, state: Tree | None
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes tokens: `output(sigmoid(receptance) * wkv(key, value))`."""
    before = _before(x, context, state, execution)

    def project(name: str, site: str) -> Array:
        y = _projected(x, before, params["shift"][name], params[name]["weight"], execution, INSIDE)
        y = context.sites(f"attention/{site}", constrain(y, ("batch", "length", "heads"), execution.rules))
        return checkpoint_name(y, site)

    receptance, key, value = project("receptance", "query"), project("key", "key"), project("value", "value")
    decay, bonus = -jnp.exp(widened(whole(params["time"]["decay"]))), widened(whole(params["time"]["bonus"]))
    if state is None:
        mixed, new = wkv(key, value, decay, bonus, context.real, context.fresh), None
    else:
        mixed, sums = wkv_from(key, value, decay, bonus, context.real, context.fresh, state["sums"])
        new = {"last": _latest(x, state["last"], context), "sums": sums}
    mixed = context.sites("attention/mixed", constrain(mixed, ("batch", "length", "heads"), execution.rules))
    mixed = checkpoint_name(mixed, "mixed")
    return linear(_gated(receptance, mixed), params["output"]["weight"]), new


def channel_mixing(
    x: Float[Array, "batch length embed"], params: Tree, context: Context, execution: Execution, state: Tree | None
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes channels: `sigmoid(receptance) * value(relu(key)^2)`."""
    before = _before(x, context, state, execution)
    hidden = _projected(x, before, params["shift"]["key"], params["key"]["weight"], execution, INSIDE)
    hidden = checkpoint_name(constrain(hidden, ("batch", "length", "mlp"), execution.rules), "hidden")
    hidden = context.sites("feedforward/hidden", jax.checkpoint(_squared)(hidden))
    value = linear(hidden, params["value"]["weight"])
    # The gate is as wide as the residual stream: each tensor device computes that of its own part of the sequence.
    receptance = _projected(x, before, params["shift"]["receptance"], params["receptance"]["weight"], execution, BETWEEN)
    receptance = constrain(receptance, BETWEEN, execution.rules)
    y = _gated(receptance, constrain(value, BETWEEN, execution.rules))
    return y, None if state is None else {"last": _latest(x, state["last"], context)}


def _projected(
    x: Array, before: Array, share: Weight, weight: Weight, execution: Execution, names: tuple[str | None, ...]
) -> Float[Array, "batch length channels"]:
    """A projection of each token mixed with the one before. The mixture is done again for the backward pass rather than kept.

    Tokens are mixed where all of the sequence is, and then are where `names` say: else XLA would shift them from device to device.
    """

    @jax.checkpoint
    def project(x: Array, before: Array) -> Array:
        own = widened(whole(share))
        mixture = (widened(x) * own + widened(before) * (1 - own)).astype(x.dtype)
        return linear(move(mixture, names, INSIDE, execution.rules), weight)

    return checkpoint_name(project(x, before), PRODUCT)


@jax.checkpoint
def _gated(receptance: Array, y: Array) -> Array:
    return (jax.nn.sigmoid(widened(receptance)) * widened(y)).astype(y.dtype)


def _squared(hidden: Array) -> Array:
    return jnp.square(jax.nn.relu(widened(hidden))).astype(hidden.dtype)


def _before(x: Array, context: Context, state: Tree | None, execution: Execution) -> Array:
    """What was read of the token before, within the text."""
    before = jnp.where(context.follows[..., None], jnp.roll(x, 1, 1), 0)
    if state is not None:
        before = jnp.where(context.resumes[..., None], state["last"][:, None].astype(x.dtype), before)
    return constrain(before, INSIDE, execution.rules)


def _latest(x: Array, last: Array, context: Context) -> Array:
    """x `[batch, length, n]` at each row's last token; what was so before where all are padding."""
    found = jnp.take_along_axis(x, jnp.maximum(context.last, 0)[:, None, None], 1)[:, 0]
    return jnp.where(context.last[:, None] >= 0, found.astype(last.dtype), last)


def flops_per_token(config: RWKV, length: int) -> float:
    """FLOPs of training on one token, forward and backward, as MFU counts them: 6 for each weight that multiplies it. What is done channel
    by channel is not counted; it does not depend on the length."""
    weights = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs(config), is_leaf=is_spec) if spec.inputs)
    return 6.0 * (weights + (config.vocab * config.embed if config.tied else 0))
