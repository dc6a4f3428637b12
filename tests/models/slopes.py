"""Gradients against how a float64 loss changes."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from lmx.core.tree import Tree, map_named, named_leaves


def check_gradients(loss: Callable[[Tree], jax.Array], exact: Callable[[Tree], float], params: Tree, *, rel: float) -> None:
    """Every gradient of a loss is the slope of the exact one, along a way of its own."""
    gradients = named_leaves(jax.jit(jax.grad(loss))(params))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rng, by = np.random.default_rng(0), 1e-5
    for name, gradient in gradients.items():
        # Along the gradient itself, so that what is compared is not small by chance; and across it.
        way = np.asarray(gradient, np.float64) / np.linalg.norm(gradient) + rng.normal(size=gradient.shape) / gradient.size**0.5

        def moved(by, name=name, way=way):
            return exact(map_named(lambda n, a: a + by * way if n == name else a, params))

        assert np.vdot(gradient, way) == pytest.approx((moved(by) - moved(-by)) / (2 * by), rel=rel), name
