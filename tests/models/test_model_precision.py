"""What a forward is held in: activations in the compute type; norm statistics, softmax and logits in fp32; parameters in the master type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import initial_values, is_spec
from lmx.core.precision import POLICIES
from lmx.core.tree import map_named
from lmx.models.config import Transformer
from lmx.models.losses import cross_entropy, logits
from lmx.models.norms import norm
from lmx.models.transformer import empty_cache, forward, specs

CONFIG = Transformer(
    vocab=24, layers=2, embed=16, heads=2, mlp=24, context=8, norm="layernorm", bias=True, qk_norm=True, logit_softcap=5.0, embed_scale=True
)
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 8)).astype(np.int32)
SEGMENTS = np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)


def loss(params, execution):
    hidden = forward(params, CONFIG, TOKENS, segments=SEGMENTS, execution=execution).hidden
    weights = (SEGMENTS > 0).astype(np.float32)
    return cross_entropy(params, CONFIG, hidden, np.roll(TOKENS, -1, 1), weights, execution=execution)[0], hidden


def equations(jaxpr):
    """Every equation of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fp64"])  # of which tests/train/test_fp64.py is the test
def test_every_policy_holds_what_it_says(name):
    policy = POLICIES[name]
    execution = Execution(precision=policy)
    params = jax.eval_shape(lambda: initial_values(jax.random.key(0), specs(CONFIG), policy.params))
    (total, hidden), gradient = jax.eval_shape(lambda p: jax.value_and_grad(loss, has_aux=True)(p, execution), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(policy.params)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(policy.params)}
    assert hidden.dtype == jnp.dtype(policy.compute)
    assert total.dtype == jnp.float32
    assert jax.eval_shape(lambda p, h: logits(p, CONFIG, h), params, hidden).dtype == jnp.float32


@pytest.mark.parametrize("name", ["bf16", "bf16_pure", "fp16"])
def test_products_are_narrow_and_statistics_softmax_and_losses_are_float32(name):
    policy = POLICIES[name]
    params = jax.eval_shape(lambda: initial_values(jax.random.key(0), specs(CONFIG), policy.params))
    program = jax.make_jaxpr(lambda p: loss(p, Execution(precision=policy))[0])(params).jaxpr
    kinds = {}
    for equation in equations(program):
        kinds.setdefault(equation.primitive.name, []).append([v.aval.dtype for v in equation.invars])
    narrow, wide = jnp.dtype(policy.compute), jnp.dtype("float32")
    # Query, key, value, output, scores, the weighted sum, gate, up, down; and the head.
    assert len(kinds["dot_general"]) == 10
    assert all(types == [narrow, narrow] for types in kinds["dot_general"])
    # Both norms of a layer, the queries' and the keys', the final one.
    assert len(kinds["rsqrt"]) == 5
    for primitive in ("rsqrt", "exp", "log", "tanh", "cos", "sin", "reduce_sum", "div"):
        floating = [t for types in kinds[primitive] for t in types if jnp.issubdtype(t, jnp.floating)]
        assert floating
        assert all(t == wide for t in floating), primitive


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_statistics_survive_a_mean_that_dwarfs_the_spread(kind):
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(300 + 8 * rng.integers(-3, 4, (4, 512)), jnp.bfloat16), np.float64)
    params = {"scale": rng.normal(size=512).astype(np.float32), "bias": rng.normal(size=512).astype(np.float32)}
    if kind == "rmsnorm":
        del params["bias"]
    found = norm(jnp.asarray(x, jnp.bfloat16), params, kind, 1e-5)
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params.get("bias", 0)
    assert found.dtype == jnp.bfloat16
    # Nothing but the result's own rounding.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_a_layernorm_of_float32_does_not_lose_the_spread_under_the_mean():
    x = np.float32(1e4) + np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    found = norm(jnp.asarray(x), {"scale": np.ones(64, np.float32)}, "layernorm", 1e-5)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_norm_of_zeros_is_finite():
    for kind in ("layernorm", "rmsnorm"):
        out, pull = jax.vjp(lambda x, kind=kind: norm(x, {"scale": np.ones(8, np.float32)}, kind, 1e-5), jnp.zeros((2, 8)))
        assert not np.asarray(out).any()
        assert np.isfinite(pull(jnp.ones((2, 8)))[0]).all()


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_narrow_training_types_are_near_float32(name, tolerance):
    rng = np.random.default_rng(0)
    params = map_named(lambda _, spec: jnp.asarray(0.1 * rng.normal(size=spec.shape), jnp.float32), specs(CONFIG), is_leaf=is_spec)

    def run(policy):
        return jax.jit(lambda p: loss(p, Execution(precision=POLICIES[policy])))(params)

    (wide, hidden), (narrow, rounded) = run("fp32"), run(name)
    assert float(narrow) == pytest.approx(float(wide), rel=tolerance)
    assert 0 < np.abs(np.asarray(rounded, np.float32) - hidden).max() < tolerance * 4 * np.abs(hidden).max()


def test_a_cache_holds_the_type_it_was_made_with():
    params = jax.eval_shape(lambda: initial_values(jax.random.key(0), specs(CONFIG)))
    execution = Execution(precision=POLICIES["bf16"])

    def run(params):
        cache = empty_cache(CONFIG, 2, 8, jnp.bfloat16, unrolled=False)
        return forward(params, CONFIG, TOKENS, cache=cache, execution=execution)

    output = jax.eval_shape(run, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(output.cache.layers)} == {jnp.dtype("bfloat16")}
    assert output.hidden.dtype == jnp.bfloat16
