"""A model as an `nnx.Module`, trained by plain NNX code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lmx.core.params import initial_values
from lmx.interop.bridge import Module, parameters
from lmx.models.config import Transformer
from lmx.models.losses import cross_entropy
from lmx.models.transformer import forward, specs

MODEL = Transformer(vocab=40, layers=3, embed=16, heads=4, kv_heads=2, mlp=24, pattern=("local", "global"), window=3, init_std=0.2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, MODEL.vocab)


def test_it_trains_in_plain_nnx_and_gives_its_parameters_back():
    params = initial_values(jax.random.key(0), specs(MODEL))
    module = Module(MODEL, params)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(TOKENS)[:, :-1], TOKENS[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradient)
        return value

    def ours(params):
        hidden = forward(params, MODEL, TOKENS).hidden[:, :-1]
        return cross_entropy(params, MODEL, hidden, TOKENS[:, 1:], jnp.ones((2, 7)))[0] / 14

    losses, exact = [], []
    for _ in range(3):
        value, gradient = jax.jit(jax.value_and_grad(ours))(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        exact.append(float(value))
        losses.append(float(step(module, optimizer)))
    np.testing.assert_allclose(losses, exact, rtol=1e-5)
    assert exact[-1] < exact[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parameters(module), params)


def test_logical_axes_are_metadata():
    module = Module(MODEL, initial_values(jax.random.key(0), specs(MODEL)))
    state = nnx.state(module, nnx.Param)
    query = state["params"]["layers"][0]["0"]["attention"]["query"]["weight"]
    assert query.get_metadata()["out_sharding"] == ("layers", "embed", "heads", "head_dim")
    graph, state = nnx.split(module)
    np.testing.assert_array_equal(nnx.merge(graph, state)(TOKENS), module(TOKENS))
