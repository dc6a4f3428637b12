"""A checkpoint with what transformers computes with it (see the reference cases' README), and what lmx does."""

from functools import cached_property

import jax
import numpy as np

from lmx import interop
from lmx.interop.files import mapped

CLOSE = 2e-5
"""max|a - b| / max|b|, over real tokens."""


def apart(found, expected, real=None) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if real is not None:
        found, expected = found[real], expected[real]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compiled(function):
    """Cheaply: each case runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


class Case:
    def __init__(self, folder):
        self.folder = folder
        self.golden = mapped(folder / "golden.safetensors")
        self.model, self.params = interop.load(folder)
        self.inputs = {name.removeprefix("input."): a for name, a in self.golden.items() if name.startswith("input.")}

    @cached_property
    def outputs(self) -> tuple[dict, dict]:
        """What `call` gives, and the gradient of its loss."""
        inputs = {name: self.inputs[name] for name in ("input_ids", "attention_mask", "labels")}

        def loss(params):
            found = interop.call(self.model, params, inputs)
            return found["loss"], found

        gradient, found = compiled(jax.grad(loss, has_aux=True))(self.params)
        return found, gradient
