"""What training carries from step to step, where it lives, and how it starts."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.params import initial_values
from lmx.core.precision import LossScale, Precision, initial_loss_scale
from lmx.core.tree import Tree
from lmx.parallel.layout import Layout
from lmx.parallel.rules import like_parameters, rules, shardings


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: optimizer steps taken (skipped ones included); int32 scalar.
      key: the run's random key; never changes, every use folds in the step.
      params: trainable parameters, in the master type.
      frozen: parameters that are not trained: another tree, without gradients or optimizer state.
      optimizer: the optimizer's state.
      loss_scale: of fp16, else None.
    """

    step: Array
    key: Array
    params: Tree
    frozen: Tree
    optimizer: Tree
    loss_scale: LossScale | None = None


def state_shardings(specs: Tree, shapes: TrainState, mesh: Mesh, layout: Layout) -> TrainState:
    """A sharding for each leaf of a state of these shapes: parameters and what is shaped like them by the rules, the rest replicated."""
    whole = NamedSharding(mesh, P())
    scale = jax.tree.map(lambda _: whole, shapes.loss_scale)
    moments = rules(layout, split=layout.zero >= 1)
    optimizer = like_parameters(shapes.optimizer, specs, mesh, moments, in_host="optimizer" in layout.offload)
    params = shardings(specs, mesh, rules(layout, split=layout.zero >= 3), in_host="params" in layout.offload)
    return TrainState(whole, whole, params, {}, optimizer, scale)


def initial_state(seed: int, specs: Tree, transform: optax.GradientTransformation, precision: Precision) -> TrainState:
    """The state before the first step. To be run under `jax.jit` with `state_shardings`; the same on every mesh."""
    key = jax.random.key(seed)
    params = initial_values(jax.random.fold_in(key, 0), specs, precision.params)
    scale = initial_loss_scale() if precision.scaled else None
    return TrainState(jnp.int32(0), key, params, {}, transform.init(params), scale)
