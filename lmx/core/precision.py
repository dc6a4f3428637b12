"""Precision policies, and dynamic loss scaling for fp16."""

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.config import ConfigError
from lmx.core.tree import Tree

PrecisionName = Literal["fp32", "tf32", "bf16", "bf16_pure", "fp16", "fp8", "fp64"]


@dataclass(frozen=True)
class Precision:
    """Which type what is held in. Norm statistics, softmax, logits and losses are always fp32 at least
    (`lmx.kernels.wide`).

    Attributes:
      params: the master parameters, gradients and optimizer state.
      compute: activations, and the copy of the parameters that products read.
      products: how GPUs are to multiply fp32 numbers: in all of fp32, or (`tensorfloat32`) their first 11 bits, several times faster.
      fp8: whether products with layers' weights are of float8 numbers (`lmx.core.weights.Narrow`).
      scaled: whether losses are scaled (Micikevicius et al., 2018) so that small fp16 gradients do not vanish.
    """

    params: str = "float32"
    compute: str = "float32"
    scaled: bool = False
    products: str = "highest"
    fp8: bool = False

    @property
    def multiplies(self) -> str:
        """What products are of."""
        return self.products if self.products == "tensorfloat32" else self.compute


POLICIES: dict[str, Precision] = {
    "fp32": Precision(),
    "tf32": Precision(products="tensorfloat32"),
    "bf16": Precision(compute="bfloat16"),
    "bf16_pure": Precision(params="bfloat16", compute="bfloat16"),
    "fp16": Precision(compute="float16", scaled=True),
    "fp8": Precision(compute="bfloat16", fp8=True),
    "fp64": Precision(params="float64", compute="float64"),
}


def policy(name: str) -> Precision:
    """The policy of a name. Raises ConfigError where there is none, or where JAX would make fp32 of fp64."""
    if name not in POLICIES:
        raise ConfigError(f"precision={name} is not one of {', '.join(POLICIES)}")
    if POLICIES[name].params == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError(f"precision={name} needs 64-bit numbers, which JAX leaves off by default: set JAX_ENABLE_X64=1, or use fp32")
    return POLICIES[name]


@flax.struct.dataclass
class LossScale:
    """The state of dynamic loss scaling: the scale, clean steps since it last changed, steps skipped so far."""

    scale: Array
    clean: Array
    skipped: Array


GROWTH_INTERVAL = 2000
LARGEST_SCALE = 2.0**24


def initial_loss_scale(scale: float = 2.0**15) -> LossScale:
    return LossScale(jnp.float32(scale), jnp.int32(0), jnp.int32(0))


def update_loss_scale(state: LossScale, finite: Array) -> LossScale:
    """Halves the scale after an overflow (never below 1), doubles it after 2,000 clean steps in a row."""
    clean = jnp.where(finite, state.clean + 1, 0)
    grow = clean >= GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), state.scale / 2)
    return LossScale(jnp.clip(scale, 1.0, LARGEST_SCALE), jnp.where(grow, 0, clean), state.skipped + (1 - finite.astype(jnp.int32)))


def all_finite(tree: Tree) -> Array:
    """Whether every number of a tree is finite: a scalar bool."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
