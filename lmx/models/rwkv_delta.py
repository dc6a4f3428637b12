"""Time mixing of RWKV-7 (Goose: Peng et al., 2025, arXiv 2503.14456): a head's matrix is also corrected, by a delta rule, where each token says.

How fast a token makes the state forget, how much of what is found it replaces, how much of the first layer's value it takes for its own, and its
gate are each of a network of low rank.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.params import ZEROS, Constant, Normal, OfLayer, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import linear, whole
from lmx.kernels.delta import delta_rule
from lmx.kernels.wide import widened
from lmx.models import token_shift
from lmx.models.config import RWKV
from lmx.models.linears import linear_specs
from lmx.models.rwkv_heads import HEADS, Depth, head_norm
from lmx.models.token_shift import INSIDE, Context, latest, own_share, projected, token_before
from lmx.parallel.rules import constrain

STEADIEST = math.exp(-0.5)
"""The logarithm of decays is between 0 and this below it."""
LOW_RANK = {"decay": "decay", "rate": "rate", "first": "value", "gate": "gate"}
"""Networks of low rank, and which mixture of tokens each reads."""


@dataclass(frozen=True)
class Channels(OfLayer):
    """A number that changes evenly over all channels, and in each head from `-zigzag` to `zigzag` (the paper's appendix)."""

    head_dim: int
    middle: float
    slope: float = 0.0
    zigzag: float = 0.0

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        channel, half = jnp.arange(math.prod(shape)), max(self.head_dim - 1, 1) / 2
        even = channel / max(len(channel) - 1, 1) - 0.5
        inside = (channel % self.head_dim - half) / half
        return (self.middle + self.slope * even + self.zigzag * inside * jnp.abs(inside)).reshape(shape)


@dataclass(frozen=True)
class Decay(OfLayer):
    """Channels from those that remember to those that forget, deeper layers with more of the former, before the sigmoid."""

    layers: int
    head_dim: int

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        share = jnp.linspace(0, 1, math.prod(shape)) ** (1 + (layer / max(self.layers - 1, 1)) ** 0.3)
        return (6 * share).reshape(shape) + Channels(self.head_dim, -5.5, zigzag=2.5).at(layer, shape)


def specs(config: RWKV) -> Tree:
    """Parameters of one layer's time mixing."""
    embed, heads, dim = (config.embed,), (config.heads, config.head_dim), config.head_dim
    names, flat = ("heads", "head_dim"), ((config.width,), ("heads",))
    tree = {name: linear_specs(embed, heads, ("embed",), names, config) for name in ("receptance", "key", "value")}
    tree["output"] = linear_specs(heads, embed, names, ("embed",), config, residual=True)
    tree["norm"] = {"scale": ParamSpec(*flat, init=Depth(config.layers)), "bias": ParamSpec(*flat)}
    tree["keys"] = {"place": ParamSpec(*flat, init=Channels(dim, 0.71, -0.1)), "rate": ParamSpec(*flat, init=Constant(1.02))}
    tree["keys"]["bonus"] = ParamSpec(heads, names, init=Constant(-0.04))
    ranks = {"decay": config.decay_rank, "rate": config.rate_rank, "first": config.value_rank, "gate": config.gate_rank}
    about = {"decay": Decay(config.layers, dim), "rate": Channels(dim, -0.19, 0.4, 0.3), "first": Channels(dim, 0.73, -0.4)}
    for name, rank in ranks.items():
        # The first factor starts at zero, so that nothing depends on the token; the second, with which it begins to, does not.
        down, up = ParamSpec((*embed, rank), ("embed", None), 1, ZEROS), ParamSpec((rank, *heads), (None, *names), 1, Normal(0.006))
        bias = {"bias": ParamSpec(heads, names, init=about[name])} if name in about else {}
        tree[name] = {"down": {"weight": down}, "up": {"weight": up} | bias}
    powers = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
    return tree | {"shift": token_shift.specs(config, **{name: (power, 0.0) for name, power in powers.items()})}


def values(x: Array, before: Array, params: Tree, config: RWKV, execution: Execution) -> Float[Array, "batch length heads head_dim"]:
    """A layer's own values, of its normed input and that of the tokens before: the first layer's are what `Context.first` is to be."""
    own = projected(x, before, lambda: own_share(params["shift"]["value"], config), params["value"]["weight"], execution, INSIDE)
    return checkpoint_name(constrain(own, HEADS, execution.rules), "value")


def time_mixing(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: RWKV,
    context: Context,
    execution: Execution,
    state: Tree | None,
    *,
    layer: Array | int,
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes tokens: `output(gate * (norm(what heads read) + bonus))`."""
    before, shares, rules = token_before(x, context, state, execution), params["shift"], execution.rules

    def project(mixture: str, weight, names: tuple) -> Array:
        y = projected(x, before, lambda: own_share(shares[mixture], config), weight, execution, INSIDE)
        return constrain(y, names, rules)

    def low(name: str, activation=lambda a: a) -> Array:
        hidden = activation(project(LOW_RANK[name], params[name]["down"]["weight"], INSIDE))
        return widened(constrain(linear(hidden, params[name]["up"]["weight"], params[name]["up"].get("bias")), HEADS, rules))

    def by_head(weight) -> Array:
        return widened(whole(weight)).reshape(config.heads, config.head_dim)

    receptance = widened(checkpoint_name(project("receptance", params["receptance"]["weight"], HEADS), "query"))
    key = widened(checkpoint_name(project("key", params["key"]["weight"], HEADS), "key"))
    value = widened(values(x, before, params, config, execution))
    decay, rate, gate = -STEADIEST * jax.nn.sigmoid(low("decay", jnp.tanh)), jax.nn.sigmoid(low("rate")), low("gate", jax.nn.sigmoid)
    from_first = jnp.where(layer == 0, 0, jax.nn.sigmoid(low("first")))
    value = value + (widened(context.first) - value) * from_first
    place = key * by_head(params["keys"]["place"])
    place = place * jax.lax.rsqrt(jnp.maximum(jnp.square(place).sum(-1, keepdims=True), 1e-24))
    key = key * (1 + (rate - 1) * by_head(params["keys"]["rate"]))
    receptance, key, value = (context.sites(f"attention/{n}", a) for n, a in (("query", receptance), ("key", key), ("value", value)))
    sums = None if state is None else state["sums"]
    mixed, after = delta_rule(receptance, key, value, decay, -place, place * rate, context.real, context.fresh, sums)
    mixed = checkpoint_name(context.sites("attention/mixed", constrain(mixed.astype(x.dtype), HEADS, rules)), "mixed")
    bonus = (receptance * key * by_head(params["keys"]["bonus"])).sum(-1, keepdims=True) * value
    read = (head_norm(mixed, params["norm"], config) + bonus) * gate
    y = linear(read.astype(x.dtype), params["output"]["weight"], inputs=2)
    return y, None if state is None else {"last": latest(x, state["last"], context), "sums": after}
