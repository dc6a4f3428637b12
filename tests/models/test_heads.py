"""Heads that give no logits of the vocabulary, against float64 NumPy; layers that share their parameters, against layers that do not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import gelu

from lmx.core.params import initial_values, is_spec
from lmx.models import heads, stack
from lmx.models.config import Transformer, check
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import empty_cache, flops_per_token, forward, specs

ENCODER = Transformer(vocab=11, layers=3, embed=8, heads=2, mlp=12, causal=False, bias=True, activation="gelu", init_std=0.3)
FIRST = np.array([0, 2, 4])


def parameters(config: Transformer):
    check(config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: 0.4 * rng.normal(size=spec.shape).astype(np.float32), heads.specs(config), is_leaf=is_spec)


def layer(params, name: str, x):
    return np.asarray(x, np.float64) @ params[name]["weight"] + params[name]["bias"]


@pytest.mark.parametrize(
    ("head", "labels", "activation", "function"),
    [("pooler", 0, "tanh", np.tanh), ("pooler", 0, None, gelu), ("classifier", 3, "tanh", np.tanh), ("detector", 0, None, gelu)],
)
def test_a_dense_layer_then_labels(head, labels, activation, function):
    config = replace(ENCODER, head=head, labels=labels, head_activation=activation)
    params, hidden = parameters(config), np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    rows = hidden if head == "detector" else hidden[np.arange(3), FIRST]
    exact = function(layer(params, "transform" if head == "detector" else "pooler", rows))
    if head == "pooler":
        found = heads.pooled(params, config, hidden, jnp.asarray(FIRST))
        np.testing.assert_allclose(heads.pooled(params, config, hidden), function(layer(params, "pooler", hidden[:, 0])), atol=1e-6)
    else:
        exact = layer(params, "classifier", exact)
        exact = exact[..., 0] if head == "detector" else exact
        found = heads.classes(params, config, hidden, jnp.asarray(FIRST))
    assert found.shape == exact.shape
    np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize(("head", "labels"), [("tokens", 4), ("spans", 0)])
def test_labels_of_each_token(head, labels):
    config = replace(ENCODER, head=head, labels=labels)
    params, hidden = parameters(config), np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(heads.classes(params, config, hidden), layer(params, "classifier", hidden), atol=1e-6)


def test_a_model_without_logits_has_no_language_model_loss():
    config = replace(ENCODER, head="pooler")
    with pytest.raises(ValueError, match=r"model\.head=pooler gives no logits"):
        cross_entropy({}, config, jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
    assert not {"head", "head_bias"} & set(specs(replace(config, tied=False)))


PAIR = {"pattern": ("local", "global"), "window": 3, "layers": 4}
DECODER = Transformer(vocab=11, layers=3, embed=8, heads=2, mlp=12, init_std=0.3, shared_layers=True)


@pytest.mark.parametrize("knobs", [{}, PAIR], ids=["one", "pattern"])
def test_shared_layers_are_a_stack_of_copies_whose_gradients_are_summed(knobs):
    shared = replace(DECODER, **knobs)
    own = replace(shared, shared_layers=False)
    params, tokens = initial_values(jax.random.key(0), specs(shared)), jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
    repeats = shared.layers // len(shared.pattern)
    copies = params | {"layers": jax.tree.map(lambda a: jnp.repeat(a, repeats, 0), params["layers"])}

    def loss(params, config):
        return jnp.sum(jnp.sin(forward(params, config, tokens).hidden))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    found, exact = gradient(params, shared), gradient(copies, own)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    summed = exact[1] | {"layers": jax.tree.map(lambda a: a.sum(0, keepdims=True), exact[1]["layers"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), found[1], summed)
    assert flops_per_token(shared, 7) == flops_per_token(own, 7)


@pytest.mark.parametrize("knobs", [{}, PAIR], ids=["one", "pattern"])
def test_shared_layers_decode(knobs):
    config = replace(DECODER, **knobs)
    params, tokens = initial_values(jax.random.key(0), specs(config)), jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    apart = params | {"layers": stack.unstack(params["layers"])}
    jax.tree.map(np.testing.assert_array_equal, stack.stack(apart["layers"], config), params["layers"])
    exact = logits(params, config, forward(params, config, tokens).hidden)
    cache, rows, run = empty_cache(config, 2, 8), [], jax.jit(lambda token, cache: forward(apart, config, token, cache=cache))
    for i in range(6):
        output = run(tokens[:, i : i + 1], cache)
        cache = output.cache
        rows.append(logits(params, config, output.hidden))
    np.testing.assert_allclose(jnp.concatenate(rows, 1), exact, atol=1e-5)
