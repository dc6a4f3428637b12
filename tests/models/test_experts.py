"""Mixtures of experts: against a float64 NumPy one, and what holds of them whatever the numbers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_experts
import pytest

from lmx.core.params import count, initial_values, is_spec
from lmx.core.products import gradient_in_tiles, in_tiles
from lmx.core.tree import map_named, named_leaves
from lmx.core.weights import ragged
from lmx.infer import generate
from lmx.models import experts, stack
from lmx.models.config import Transformer, check
from lmx.models.losses import logits
from lmx.models.transformer import flops_per_token, forward, specs

BATCH, LENGTH, EMBED = 3, 12, 10
LAYER = Transformer(vocab=8, embed=EMBED, heads=1, mlp=14, experts=4)
CASES = {
    "dropless": LAYER,
    "dropless, one of six, shared": replace(LAYER, experts=6, experts_per_token=1, shared_experts=2, expert_mlp=6, bias=True),
    "shared of another width, with a gate": replace(
        LAYER, shared_experts=1, shared_mlp=5, shared_gate=True, expert_mlp=6, renormalize_experts=False
    ),
    "capacity": replace(LAYER, expert_capacity=0.7),
    "capacity, probabilities as they are": replace(
        LAYER, expert_capacity=0.6, renormalize_experts=False, gated=False, activation="gelu_tanh", experts_per_token=3, shared_experts=1
    ),
}
MODEL = Transformer(
    vocab=24, layers=5, embed=16, heads=4, kv_heads=2, mlp=24, context=32, experts=4, expert_mlp=8, shared_experts=1, init_std=0.3,
    pattern=("global_dense", "local"), window=5,
)  # fmt: skip


def parameters(config: Transformer, seed: int = 0):
    """Random float32 numbers in float64 arrays."""
    rng = np.random.default_rng(seed)
    return map_named(
        lambda _, spec: 0.6 * rng.normal(size=spec.shape).astype(np.float32).astype(np.float64), experts.specs(config), is_leaf=is_spec
    )


def inputs(seed: int = 0):
    """Rows, the first packed, the second padded in the middle and the last all padding but one token."""
    rng = np.random.default_rng(seed)
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[0, 5:] = 2
    segments[1, [0, 1, 6, 11]] = 0
    segments[2, 1:] = 0
    return rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32).astype(np.float64), segments


def for_numpy(params) -> dict:
    names = {name: name.removesuffix("/weight").replace("/", "_") for name in named_leaves(params)} | {"shared_gate/weight": "token_gate"}
    return {names[name]: value for name, value in named_leaves(params).items()}


@partial(jax.jit, static_argnums=2, static_argnames="decoding")
def layer(x, params, config, segments, *, decoding=False):
    return experts.experts(x, params, config, experts.Execution(), segments=segments, decoding=decoding)


def narrow(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@pytest.mark.parametrize("case", CASES)
def test_outputs_auxiliary_values_and_gradients_are_those_of_the_papers(case):
    config, params, (x, segments) = CASES[case], parameters(CASES[case]), inputs()
    check(config)
    rng = np.random.default_rng(1)
    towards = rng.normal(size=x.shape).astype(np.float32)
    rows = {"balance": rng.uniform(1, 2, BATCH), "router_z": rng.uniform(1, 2, BATCH), "dropped": np.zeros(BATCH)}

    def total(y, aux, np=np):
        return (y * towards).sum() + sum((aux[name] * np.asarray(rows[name])).sum() for name in rows)

    def theirs(values):
        return numpy_experts.experts(values["x"], for_numpy(values["params"]), config, segments)

    def ours(values):
        y, aux = layer(values["x"], values["params"], config, segments)
        return total(y, aux, jnp), (y, aux)

    values = {"x": x, "params": params}
    (_, (y, aux)), gradient = jax.device_get(jax.value_and_grad(ours, has_aux=True)(narrow(values)))
    expected, expected_aux = theirs(values)
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())
    assert set(aux) == set(expected_aux)
    for name, value in expected_aux.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    if config.expert_capacity:
        assert expected_aux["dropped"].max() > 0.05
    if not config.shared_experts:
        assert (y[segments == 0] == 0).all()

    # Along a random direction of each parameter and of x, the gradient's slope is that of central differences.
    step, slopes = 1e-6, {}
    for name, value in named_leaves(values).items():
        direction = rng.normal(size=value.shape)

        def at(sign, name=name, direction=direction):
            return total(*theirs(map_named(lambda n, a: a + sign * step * direction if n == name else a, values)))

        slopes[name] = float((named_leaves(gradient)[name] * direction).sum()), (at(1) - at(-1)) / (2 * step)
    largest = max(abs(slope) for _, slope in slopes.values())
    assert not {name: pair for name, pair in slopes.items() if abs(pair[0] - pair[1]) > 1e-4 * max(abs(pair[1]), 1e-2 * largest)}


@pytest.mark.parametrize("case", ["dropless", "dropless, one of six, shared"])
def test_a_capacity_that_suffices_drops_nothing(case):
    config, params, (x, segments) = CASES[case], narrow(parameters(CASES[case])), inputs()
    dropless, _ = layer(narrow(x), params, config, segments)
    ample, aux = layer(narrow(x), params, replace(config, expert_capacity=100.0), segments)
    np.testing.assert_allclose(ample, dropless, atol=2e-6)
    assert not aux["dropped"].any()


def test_what_is_dropped_depends_neither_on_other_sequences_nor_on_later_tokens_nor_on_padding():
    config, params, (x, segments) = CASES["capacity"], narrow(parameters(LAYER)), inputs()
    x = narrow(x)
    together, aux = layer(x, params, config, segments)
    for row in range(BATCH):
        alone, own = layer(x[row : row + 1], params, config, segments[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
        assert {name: float(v[0]) for name, v in own.items()} == pytest.approx({name: float(v[row]) for name, v in aux.items()}, rel=1e-5)
    later, _ = layer(x.at[:, 8:].set(1.0), params, config, segments)
    np.testing.assert_allclose(later[:, :8], together[:, :8], atol=1e-5)
    padding, aux_then = layer(jnp.where(segments[..., None] == 0, 5.0, x), params, config, segments)
    np.testing.assert_allclose(padding, together, atol=1e-5)
    np.testing.assert_allclose(aux_then["balance"], aux["balance"], rtol=1e-6)


def test_an_even_router_has_a_balance_of_one_and_a_narrow_one_more():
    params, (x, segments) = narrow(parameters(LAYER)), inputs()
    even = params | {"router": {"weight": jnp.zeros((EMBED, 4))}}
    np.testing.assert_allclose(layer(narrow(x), even, LAYER, segments)[1]["balance"], 1, rtol=1e-6)
    # All tokens to the same two experts: their probability is 1/2 each, of a share of 1/2 each, and there are four.
    narrowed = params | {"router": {"weight": jnp.zeros((EMBED, 4)).at[:, :2].set(9.0)}}
    found = layer(jnp.abs(narrow(x)), narrowed, LAYER, segments)[1]["balance"]
    np.testing.assert_allclose(found, 2, rtol=1e-4)


def test_a_cache_means_that_no_token_is_dropped_and_nothing_is_measured():
    params, (x, segments) = narrow(parameters(LAYER)), inputs()
    y, aux = layer(narrow(x), params, CASES["capacity"], segments, decoding=True)
    np.testing.assert_allclose(y, layer(narrow(x), params, LAYER, segments)[0], atol=1e-5)
    assert aux == {}


@pytest.mark.parametrize("sizes", [(5, 0, 3, 1), (0, 0, 0, 0), (0, 20, 0, 4), (200, 0, 90, 10), (64, 64, 128, 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_products_in_tiles_are_those_of_jax(sizes, dtype):
    rng, rows = np.random.default_rng(0), sum(sizes) + 7
    x, g = (jnp.asarray(rng.normal(size=(rows, n)), dtype) for n in (6, 9))
    weight, sizes = jnp.asarray(rng.normal(size=(4, 6, 9)), dtype), jnp.array(sizes, jnp.int32)
    close = partial(np.testing.assert_allclose, rtol=2e-2 if dtype == "bfloat16" else 2e-5, atol=2e-5)
    close(*(jnp.asarray(f(x, weight, sizes), jnp.float32) for f in (in_tiles, jax.lax.ragged_dot)))
    ends = np.cumsum(sizes)
    each = [
        np.asarray(x, np.float64)[end - size : end].T @ np.asarray(g, np.float64)[end - size : end]
        for end, size in zip(ends, sizes, strict=True)
    ]
    close(gradient_in_tiles(x, g, sizes, jnp.float32), np.stack(each))


@pytest.mark.parametrize("equal", [True, False])
def test_gradients_of_grouped_products_are_not_rounded_to_the_operands_type(equal):
    rng, sizes = np.random.default_rng(0), jnp.array([8, 8, 8], jnp.int32)
    x, weight = jnp.asarray(rng.normal(size=(24, 5)), jnp.bfloat16), jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32)
    towards = jnp.asarray(rng.normal(size=(24, 7)), jnp.bfloat16)

    def total(weight):
        y = ragged(x.reshape(3, 8, 5), weight).reshape(24, 7) if equal else ragged(x, weight, sizes)
        assert y.dtype == jnp.bfloat16
        return jnp.sum((y * towards).astype(jnp.float32))

    exact = np.einsum("eri,ero->eio", *(np.asarray(a, np.float64).reshape(3, 8, -1) for a in (x, towards)))
    np.testing.assert_allclose(jax.grad(total)(weight), exact, rtol=1e-5, atol=1e-5)


def test_on_a_gpu_grouped_products_are_one_operation():
    def total(x, weight, sizes):
        return ragged(x, weight, sizes).sum()

    shapes = (
        jax.ShapeDtypeStruct((64, 8), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 8, 16), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    text = jax.jit(jax.grad(total, (0, 1))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in text
    assert "while" not in text


def test_a_stack_mixes_dense_layers_and_mixtures_in_either_form():
    params = initial_values(jax.random.key(0), specs(MODEL))
    whole, rest = params["layers"]
    assert set(whole) == {"0", "1"}
    assert set(rest) == {"0"}
    assert "feedforward" in whole["0"]
    assert "experts" not in whole["0"]
    assert "experts" in whole["1"]
    assert "feedforward" not in whole["1"]
    assert whole["1"]["experts"]["up"]["weight"].shape == (2, 4, 16, 8)
    tokens = jax.random.randint(jax.random.key(1), (3, 14), 0, MODEL.vocab)
    run = jax.jit(lambda params: forward(params, MODEL, tokens))
    scanned, unrolled = run(params), run(params | {"layers": stack.unstack(params["layers"])})
    np.testing.assert_allclose(scanned.hidden, unrolled.hidden, atol=1e-5)
    assert set(scanned.aux) == {"balance", "router_z", "dropped"}
    for name, value in scanned.aux.items():
        assert value.shape == (3,)
        np.testing.assert_allclose(value, unrolled.aux[name], rtol=1e-5)
    assert MODEL.mixtures == 2
    assert (scanned.aux["balance"] > 2).all()
    assert forward(params, MODEL, tokens).aux.keys() == scanned.aux.keys()


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_generation_is_the_argmax_of_the_whole_text_through_every_expert(capacity):
    params = initial_values(jax.random.key(0), specs(MODEL))
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    found = generate(replace(MODEL, expert_capacity=capacity), params, prompts, max_new_tokens=8)
    whole = jax.jit(lambda tokens: logits(params, MODEL, forward(params, MODEL, tokens).hidden))  # else compiled anew for every token
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        padded = jnp.zeros((1, 16), jnp.int32)
        for token in new:
            tokens = padded.at[0, : len(text)].set(jnp.array(text))
            assert token == int(whole(tokens)[0, len(text) - 1].argmax())
            text.append(token)


def test_flops_count_the_experts_that_a_token_passes_through_and_parameters_all():
    dense = Transformer(vocab=64, layers=3, embed=32, heads=4, mlp=48)
    sparse = replace(dense, experts=8, experts_per_token=2, expert_mlp=24)
    router = 3 * 32 * 8
    assert flops_per_token(sparse, 16) == flops_per_token(dense, 16) + 6 * router
    assert count(specs(sparse)) == count(specs(dense)) + 3 * 3 * 32 * 24 * (8 - 2) + router


def test_experts_have_no_biases_and_shared_ones_do():
    names = set(named_leaves(experts.specs(replace(LAYER, bias=True, shared_experts=2)), is_leaf=is_spec))
    assert {name for name in names if "bias" in name} == {f"shared/{name}/bias" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": -1}, "model.experts=-1 must be at least 0"),
        ({"experts_per_token": 5}, "model.experts_per_token=5 is more than model.experts=4"),
        ({"experts_per_token": 0}, "model.experts_per_token=0 must be at least 1"),
        ({"expert_capacity": 0.0}, "model.expert_capacity=0.0 must be above 0"),
        ({"experts": 0, "expert_capacity": 1.0}, "model.expert_capacity=1.0 is of a mixture of experts; set model.experts"),
        ({"experts": 0, "shared_experts": 1}, "model.shared_experts=1 is of a mixture"),
        ({"shared_gate": True}, "model.shared_gate=True is of shared experts"),
        ({"shared_mlp": 8}, "model.shared_mlp=8 is of shared experts"),
        ({"experts": 0, "pattern": ("global_dense",)}, "names dense layers"),
        ({"pattern": ("global_dense",)}, "model.experts=4 but no layer"),
        ({"pattern": ("local_dense", "global")}, "model.window=None"),
    ],
)
def test_what_is_no_mixture_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        check(replace(LAYER, **wrong))
