"""The feed-forward layer, plain or gated (Shazeer, 2020)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.products import shifted
from lmx.core.tree import Tree
from lmx.core.weights import KEPT, whole
from lmx.kernels import devices
from lmx.kernels.wide import widened
from lmx.models.config import Transformer
from lmx.models.linears import linear_specs
from lmx.models.sites import NONE, Sites
from lmx.parallel.collective import linear_back, linears
from lmx.parallel.rules import constrain


def gelu_by_sigmoid(x: Array) -> Array:
    """`jax.nn.gelu(x, approximate=True)`, whose `(1 + tanh(u)) / 2` is `sigmoid(2 u)`: by fewer instructions, of which a GPU has no time to
    spare beside its memory, and few enough for XLA to sum the gradient of a bias where it forms that of x."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True) if devices.on_cpu() else gelu_by_sigmoid(x),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

HEAVY = ("gelu", "tanh")
"""Whose derivatives XLA:GPU would rather write and read in fp32 than form where it sums the gradient of a bias."""


def specs(config: Transformer) -> Tree:
    """Parameters of one feed-forward layer; `gate` only where it is gated."""
    names = ("gate", "up") if config.gated else ("up",)
    into = {name: linear_specs((config.embed,), (config.hidden,), ("embed",), ("mlp",), config, bias=config.mlp_bias) for name in names}
    return into | {
        "down": linear_specs((config.hidden,), (config.embed,), ("mlp",), ("embed",), config, residual=True, bias=config.mlp_bias)
    }


def feedforward(
    x: Float[Array, "batch length embed"], params: Tree, config: Transformer, execution: Execution, sites: Sites = NONE
) -> Float[Array, "batch length embed"]:
    """`down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))` (GLU variants)."""
    activation = ACTIVATIONS[config.activation]

    into = [params[name] for name in (("gate", "up") if config.gated else ("up",))]
    biases = [whole(layer["bias"]) for layer in into if "bias" in layer]
    rest = config.gated or config.activation in HEAVY

    def activated(*given: Array) -> Array:
        projected, biases = given[: len(into)], given[len(into) :]
        first, *second = map(widened, (shifted(y, bias, rest) for y, bias in zip(projected, biases, strict=True)) if biases else projected)
        return (activation(first) * second[0] if second else activation(first)).astype(x.dtype)

    def down(hidden: Array) -> Array:
        return linear_back(hidden, params["down"], "mlp", execution)

    # The activation adds the biases: added before, what it reads would be written once more, for its backward pass.
    products = linears(x, [{"weight": layer["weight"]} for layer in into], "mlp", execution)
    projected = [constrain(y, ("batch", "length", "mlp"), execution.rules) for y in products]
    projected = [checkpoint_name(y, "hidden") for y in projected]
    # For the backward pass a CPU keeps only the projections: the activation is cheaper to do again than to write and read.
    if devices.on_cpu() and not sites.asked("feedforward/hidden"):
        return jax.checkpoint(lambda *projected: down(activated(*projected)), policy=KEPT)(*projected, *biases)
    return down(sites("feedforward/hidden", jax.checkpoint(activated)(*projected, *biases)))
