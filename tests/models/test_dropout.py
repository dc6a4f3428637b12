"""Dropout masks depend on the key, the example, the site and the layer, and on nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lmx.models.dropout
from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.models.config import Transformer
from lmx.models.dropout import Dropout, apply, keep
from lmx.models.stack import unstack
from lmx.models.transformer import forward, specs
from lmx.parallel.layout import Layout, make_mesh

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Half the time to compile."""
KEY = jax.random.key(1)
SHAPE = (8, 16)


def masks(examples, *, key=KEY, site="attention", layer=0, rate=0.5, shape=SHAPE) -> np.ndarray:
    return np.asarray(keep(Dropout(key, jnp.asarray(examples), rate), site, layer, shape))


def test_an_examples_mask_does_not_depend_on_the_rows_beside_it():
    whole = masks([10, 11, 12, 13])
    assert np.array_equal(masks([13, 10, 12, 11]), whole[[3, 0, 2, 1]])
    assert np.array_equal(masks([12, 13]), whole[2:])
    assert np.array_equal(masks([99, 11]), np.stack([masks([99])[0], whole[1]]))


def test_examples_steps_sites_and_layers_have_masks_of_their_own():
    found = [
        masks([10])[0],
        masks([11])[0],
        masks([10], layer=1)[0],
        masks([10], site="feedforward")[0],
        masks([10], key=jax.random.fold_in(KEY, 1))[0],
        masks([11], layer=1)[0],
        masks([10, 2**31 - 1])[1],
    ]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            # Independent masks of 128 numbers agree on half: within five deviations.
            assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def test_a_layers_index_may_be_traced():
    traced = jax.jit(lambda layer: keep(Dropout(KEY, jnp.array([10]), 0.5), "attention", layer, SHAPE))(2)
    assert np.array_equal(traced, masks([10], layer=2))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_mean_is_kept_and_the_rate_is_the_share_dropped(rate):
    found = masks(np.arange(64), rate=rate)
    assert np.unique(found).tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    error = np.sqrt(rate * (1 - rate) / found.size)
    assert (found == 0).mean() == pytest.approx(rate, abs=4 * error)
    assert found.mean() == pytest.approx(1.0, abs=4 * error / (1 - rate))
    # Of each row too, so that no row is favoured.
    assert np.abs((found == 0).mean((1, 2)) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / np.prod(SHAPE))


def test_apply_multiplies_in_the_types_of_the_activations():
    x = jnp.full((2, *SHAPE), 3.0, jnp.bfloat16)
    dropped = apply(x, Dropout(KEY, jnp.array([10, 11]), 0.5), "attention", 0)
    assert dropped.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(dropped, np.float32), 3 * masks([10, 11]))
    assert apply(x, None, "attention", 0) is x


def test_a_rate_of_zero_is_no_dropout():
    assert np.array_equal(masks([10, 11], rate=0.0), np.ones((2, *SHAPE), np.float32))


def test_a_mesh_of_eight_changes_no_bit():
    examples = jnp.arange(8)
    alone = masks(examples)
    for layout, where in (
        (Layout(data=8), P("data", None, None)),
        (Layout(data=2, tensor=4), P("data", None, "tensor")),
        (Layout(data=2, fsdp=2, tensor=2), P(("data", "fsdp"), "tensor", None)),
    ):
        mesh = make_mesh(layout)
        there = jax.jit(
            lambda e: keep(Dropout(KEY, e, 0.5), "attention", 0, SHAPE),
            in_shardings=NamedSharding(mesh, P(where[0])),
            out_shardings=NamedSharding(mesh, where),
        )(examples)
        assert there.sharding.shard_shape(there.shape) != there.shape
        assert np.array_equal(there, alone)


@pytest.fixture(scope="module")
def model():
    config = Transformer(vocab=24, layers=2, embed=8, heads=2, mlp=8, context=8)
    rng = np.random.default_rng(0)
    params = map_named(lambda _, spec: jnp.asarray(0.5 * rng.normal(size=spec.shape), jnp.float32), specs(config), is_leaf=is_spec)

    @quick
    def hidden(tokens, examples, key=KEY):
        return forward(params, config, tokens, dropout=Dropout(key, examples, 0.4)).hidden

    return config, params, hidden


TOKENS = np.random.default_rng(0).integers(0, 24, (4, 6)).astype(np.int32)
EXAMPLES = np.arange(20, 24, dtype=np.int32)


def test_a_forwards_rows_are_dropped_alike_in_whatever_order_and_company(model):
    hidden = model[2]
    whole = np.asarray(hidden(TOKENS, EXAMPLES))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(hidden(TOKENS[order], EXAMPLES[order]), whole[order], atol=1e-5)
    for half in (slice(0, 2), slice(2, 4)):
        np.testing.assert_allclose(hidden(TOKENS[half], EXAMPLES[half]), whole[half], atol=1e-5)
    # The same text as another example, or at another step, is dropped otherwise.
    assert np.abs(hidden(TOKENS, EXAMPLES + 1) - whole).max() > 0.1
    assert np.abs(hidden(TOKENS, EXAMPLES, jax.random.fold_in(KEY, 1)) - whole).max() > 0.1


def test_the_forms_of_the_stack_drop_the_same(model):
    config, params, hidden = model
    unrolled = params | {"layers": unstack(params["layers"])}
    found = quick(lambda p: forward(p, config, TOKENS, dropout=Dropout(KEY, EXAMPLES, 0.4)).hidden)(unrolled)
    np.testing.assert_allclose(found, hidden(TOKENS, EXAMPLES), atol=1e-5)


def test_every_site_of_a_layer_drops(model, monkeypatch):
    config, params, _ = model
    asked = []

    def recorded(dropout, site, layer, shape):
        asked.append((site, shape))
        return keep(dropout, site, layer, shape)

    monkeypatch.setattr(lmx.models.dropout, "keep", recorded)
    jax.eval_shape(lambda p: forward(p, config, TOKENS, dropout=Dropout(KEY, EXAMPLES, 0.4)).hidden, params)
    # The scan traces a layer once.
    assert asked == [("embed", (6, 8)), ("attention/weights", (2, 6, 6)), ("attention", (6, 8)), ("feedforward", (6, 8))]


def test_a_forward_with_a_rate_of_zero_is_the_one_without_dropout(model):
    config, params, _ = model
    without = quick(lambda p: forward(p, config, TOKENS).hidden)(params)
    zero = quick(lambda p: forward(p, config, TOKENS, dropout=Dropout(KEY, EXAMPLES, 0.0)).hidden)(params)
    np.testing.assert_allclose(zero, without, atol=1e-5)
