"""Time mixing of RWKV-5 and 6 (Eagle and Finch: Peng et al., 2024, arXiv 2404.05892), whose heads keep matrices.

In RWKV-5 decays and the shares of the token before are parameters. In RWKV-6 each token adds to them what a network of low rank makes of it.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.params import ZEROS, Normal, OfLayer, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import linear, whole
from lmx.kernels.linear_attention import linear_attention
from lmx.kernels.wide import widened
from lmx.models import token_shift
from lmx.models.config import RWKV
from lmx.models.linears import linear_specs
from lmx.models.token_shift import INSIDE, Context, latest, own_share, projected, token_before
from lmx.parallel.rules import constrain

PROJECTED = ("receptance", "key", "value", "gate")
MIXED = ("decay", "key", "value", "receptance", "gate")
"""What is made of mixtures of tokens, in the order of RWKV-6's low-rank network."""
HEADS = ("batch", "length", "heads", None)


@dataclass(frozen=True)
class Decay(OfLayer):
    """Channels from those that remember to those that forget, deeper layers with more of the former (the paper's appendix)."""

    layers: int

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        share = jnp.linspace(0, 1, math.prod(shape))
        return (-6 + 5 * share ** (0.7 + 1.3 * layer / max(self.layers - 1, 1))).reshape(shape)


@dataclass(frozen=True)
class Bonus(OfLayer):
    """More for earlier channels of deeper layers, and a tenth more or less from channel to channel."""

    layers: int

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        channel, deep = jnp.arange(math.prod(shape)), layer / max(self.layers - 1, 1)
        return (deep * (1 - channel / max(len(channel) - 1, 1)) + 0.1 * ((channel + 1) % 3 - 1)).reshape(shape)


@dataclass(frozen=True)
class Depth(OfLayer):
    """The scale of what heads read: less in earlier layers."""

    layers: int

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, ((layer + 1) / self.layers) ** 0.7)


def specs(config: RWKV) -> Tree:
    """Parameters of one layer's time mixing."""
    embed, heads, depth = (config.embed,), (config.heads, config.head_dim), config.layers
    names, flat = ("heads", "head_dim"), ((config.width,), ("heads",))
    dynamic = config.version > 5
    tree = {name: linear_specs(embed, heads, ("embed",), names, config) for name in PROJECTED}
    tree["output"] = linear_specs(heads, embed, names, ("embed",), config, residual=True)
    tree["norm"] = {"scale": ParamSpec(*flat, init=Depth(depth)), "bias": ParamSpec(*flat)}
    tree["time"] = {
        "decay": ParamSpec(*(flat if dynamic else (heads, names)), init=Decay(depth)),
        "bonus": ParamSpec(heads, names, init=Bonus(depth)),
    }
    shares = {"key": (1.0, 0.0), "value": (1.0, 0.3), "receptance": (0.5, 0.0), "gate": (0.5, 0.0)}
    if not dynamic:
        return tree | {"shift": token_shift.specs(config, **shares)}
    mix, rank = (len(MIXED), config.mix_rank), (config.decay_rank,)
    # The first factors start at zero, so that nothing depends on the token; the second, with which it begins to, do not.
    down = {"mix": ParamSpec((*embed, *mix), ("embed", None, None), 1, ZEROS)}
    down["decay"] = ParamSpec((*embed, *rank), ("embed", None), 1, ZEROS)
    up = {"mix": ParamSpec((*mix, *embed), (None, None, "embed"), init=Normal(0.006))}
    up["decay"] = ParamSpec((*rank, *heads), (None, *names), 1, Normal(0.006))
    return tree | {"shift": token_shift.specs(config, base=(1.0, 0.0), decay=(1.0, 0.0), **shares), "down": down, "up": up}


def empty(config: RWKV, batch: int, dtype) -> Float[Array, "batch heads head_dim head_dim"]:
    """The state before the first token."""
    return jnp.zeros((batch, config.heads, config.head_dim, config.head_dim), dtype)


def time_mixing(
    x: Float[Array, "batch length embed"], params: Tree, config: RWKV, context: Context, execution: Execution, state: Tree | None
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """The sublayer that mixes tokens: `output(silu(gate) * norm(what heads read))`."""
    shares, rules = params["shift"], execution.rules
    if config.version > 5:  # said of its gradient: else XLA splits the sequence again where shares of tokens are made, and gathers each
        x = constrain(x, INSIDE, rules)
    before = token_before(x, context, state, execution)
    if config.version > 5:
        base = constrain(token_shift.mixture(x, before, own_share(shares["base"], config)), INSIDE, rules)
        low = constrain(jnp.tanh(linear(base, params["down"]["mix"])), (*INSIDE, None), rules)
        up = whole(params["up"]["mix"])

    def project(name: str, weight, site: str | None = None, names: tuple = HEADS) -> Array:
        if config.version > 5:
            place = MIXED.index(name)
            share, own_up = own_share(shares[name], config), up[place].astype(x.dtype)

            def own(low: Array) -> Array:
                return share - widened(constrain(low @ own_up, INSIDE, rules))

            y = projected(x, before, own, weight, execution, INSIDE, low[:, :, place])
        else:
            y = projected(x, before, lambda: own_share(shares[name], config), weight, execution, INSIDE)
        y = constrain(y, names, rules)
        return y if site is None else checkpoint_name(y, site)

    kept = {"receptance": "query", "key": "key", "value": "value", "gate": "hidden"}
    receptance, key, value, gate = (project(name, params[name]["weight"], kept[name]) for name in PROJECTED)
    receptance, key, value = (context.sites(f"attention/{n}", a) for n, a in (("query", receptance), ("key", key), ("value", value)))
    decay = widened(whole(params["time"]["decay"])).reshape(config.heads, config.head_dim)
    if config.version > 5:
        hidden = jnp.tanh(project("decay", params["down"]["decay"], names=INSIDE))
        decay = decay + widened(constrain(linear(hidden, params["up"]["decay"]), HEADS, rules))
    # From 5 on nothing is left of a state, whose gradient would be that of an infinite number.
    decay, bonus = -jnp.exp(jnp.minimum(decay, 5.0)), widened(whole(params["time"]["bonus"]))
    decay = jnp.expand_dims(decay, range(4 - decay.ndim))
    sums = None if state is None else state["sums"]
    mixed, after = linear_attention(receptance, key, value, decay, bonus, context.real, context.fresh, sums)
    mixed = checkpoint_name(context.sites("attention/mixed", constrain(mixed, HEADS, rules)), "mixed")

    @jax.checkpoint
    def gated(mixed: Array, gate: Array) -> Array:
        return (head_norm(mixed, params["norm"], config) * jax.nn.silu(widened(gate))).astype(mixed.dtype)

    y = linear(gated(mixed, gate), params["output"]["weight"], inputs=2)
    return y, None if state is None else {"last": latest(x, state["last"], context), "sums": after}


def head_norm(x: Float[Array, "batch length heads head_dim"], params: Tree, config: RWKV) -> Float[Array, "batch length heads head_dim"]:
    """What each head reads, normalised, scaled and moved; fp32 at least."""
    scale, bias = (widened(whole(params[name])).reshape(config.heads, config.head_dim) for name in ("scale", "bias"))
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdims=True)
    return scale * centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + config.head_norm_epsilon) + bias
