"""Any model as a Flax `nnx.Module`, for code that is written in NNX: its parameters are `nnx.Param`s with their logical axes as metadata."""

from typing import Any

import jax
from flax import nnx

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.core.tree import Tree
from lmx.models.config import Model
from lmx.models.families import functions
from lmx.models.losses import logits


class Module(nnx.Module):
    """A model that is called on tokens and gives logits.

    Every parameter is an `nnx.Param`, at `module.params[...]` as in the parameter table, whose `out_sharding` metadata has the logical name
    of each dimension. So `nnx.state`, `nnx.split`, `nnx.grad` and `nnx.Optimizer` treat it as any other module.
    """

    def __init__(self, config: Model, params: Tree, execution: Execution = Execution()):
        """Args: the config, and parameters as its table says (an `lmx.interop.Model`'s config and what `load` gives)."""
        self.config, self.execution = config, execution
        # Eager sharding would take logical names for those of mesh axes.
        with nnx.use_eager_sharding(False):
            self.params = nnx.data(
                jax.tree.map(
                    lambda spec, value: nnx.Param(value, out_sharding=spec.axes), functions(config).specs(config), params, is_leaf=is_spec
                )
            )

    def __call__(self, tokens: jax.Array, **inputs: Any) -> jax.Array:
        """Logits `[batch, length, vocab]`; inputs as of its forward."""
        params = parameters(self)
        output = functions(self.config).forward(params, self.config, tokens, execution=self.execution, **inputs)
        return logits(params, self.config, output.hidden)


def parameters(module: Module) -> Tree:
    """A module's parameters as lmx has them."""
    return jax.tree.map(lambda variable: variable[...], module.params, is_leaf=lambda x: isinstance(x, nnx.Variable))
