"""RWKV-5, 6 and 7: as the paper's recurrence, in parallel and token by token, packed and alone."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rwkv
import pytest
from slopes import check_gradients

from lmx.core.execution import Execution
from lmx.core.params import abstract, initial_values
from lmx.core.precision import POLICIES
from lmx.core.tree import size
from lmx.infer.weights import decoding_params
from lmx.models import stack
from lmx.models.config import RWKV, Model, Transformer, check
from lmx.models.losses import cross_entropy, logits
from lmx.models.rwkv import empty_cache, flops_per_token, specs
from lmx.models.rwkv import forward as _forward

forward = partial(jax.jit, static_argnums=1, static_argnames="execution")(_forward)


EAGLE = RWKV(version=5, vocab=17, layers=2, embed=8, channels=12, head_dim=4, mlp=16, init_std=0.5)
FINCH = replace(EAGLE, version=6, mix_rank=3, decay_rank=5)
GOOSE = replace(EAGLE, version=7, decay_rank=5, rate_rank=3, value_rank=2, gate_rank=4)
MODELS = pytest.mark.parametrize("config", [EAGLE, FINCH, GOOSE], ids=["5", "6", "7"])


@cache
def start(config: RWKV):
    """Random values, none of them a one or a zero."""
    rng, values = np.random.default_rng(1), jax.jit(lambda: initial_values(jax.random.key(0), specs(config)))()
    return jax.tree.map(lambda a: (a + 0.3 * rng.normal(size=a.shape)).astype(np.float32), jax.device_get(values))


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, EAGLE.vocab, (rows, length)).astype(np.int32)


def for_numpy(params) -> dict:
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    return params | {"layers": stack.unstack(params["layers"])[0]}


def far(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


KNOBS = {"tied": True, "channels": None, "norm_epsilon": 1e-2, "head_norm_epsilon": 0.1}


@pytest.mark.parametrize(("config", "knobs"), [(EAGLE, {}), (FINCH, {}), (GOOSE, {}), (GOOSE, KNOBS)], ids=["5", "6", "7", "7 otherwise"])
def test_logits_are_those_of_the_papers_recurrence_in_float64(config, knobs):
    config = replace(config, **knobs)
    params, tokens = start(config), random_tokens(1, 37)
    found = logits(params, config, forward(params, config, tokens).hidden)[0]
    assert far(found, numpy_rwkv.logits(for_numpy(params), config, tokens[0])) < 1e-5


@pytest.mark.parametrize("config", [FINCH, GOOSE], ids=["6", "7"])
def test_every_gradient_is_how_the_float64_loss_changes(config):
    params, tokens = start(config), random_tokens(1, 20)
    targets, weights = np.roll(tokens, -1, 1), np.linspace(0.5, 1.5, 20, dtype=np.float32)[None]

    def loss(params):
        return cross_entropy(params, config, forward(params, config, tokens).hidden, targets, weights)[0]

    def exact(params) -> float:
        rows = numpy_rwkv.logits(for_numpy(params), config, tokens[0])
        rows = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        return -(weights[0] * rows[np.arange(20), targets[0]]).sum()

    check_gradients(loss, exact, params, rel=2e-4)


@pytest.mark.parametrize(
    ("config", "cuts"),
    [(EAGLE, range(1, 24)), (FINCH, range(1, 24)), (GOOSE, range(1, 24)), (GOOSE, (5, 23))],
    ids=["5", "6", "7", "7 in two"],
)
def test_the_recurrent_form_gives_what_the_parallel_one_gives(config, cuts):
    params, tokens = start(config), random_tokens(2, 23)
    whole = forward(params, config, tokens).hidden
    state, parts, begin, params = empty_cache(config, 2), [], 0, decoding_params(params)
    for end in cuts:
        output = forward(params, config, tokens[:, begin:end], cache=state)
        assert jax.tree.map(jnp.shape, output.cache) == jax.tree.map(jnp.shape, state), "the state does not grow"
        state, begin = output.cache, end
        parts.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@MODELS
def test_the_state_has_one_size_whatever_the_length_and_slots(config):
    layer = 2 * config.embed + config.width * config.head_dim
    assert {size(empty_cache(config, 1, slots)) for slots in (0, 16, 1 << 20)} == {1 + config.layers * layer}


SEGMENTS = np.array([[1] * 7 + [2] * 7 + [3] * 7, [0] * 3 + [1] * 7 + [0] * 4 + [2] * 7, [0] * 21], np.int32)


@MODELS
def test_packed_texts_give_what_each_gives_alone(config):
    params, tokens = start(config), random_tokens(3, 21)
    texts = np.stack([tokens[row, SEGMENTS[row] == s] for row, s in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2))])
    packed = forward(params, config, tokens, segments=SEGMENTS).hidden
    alone = forward(params, config, texts, segments=np.ones_like(texts)).hidden
    np.testing.assert_allclose(packed[SEGMENTS > 0], alone.reshape(-1, config.embed), atol=5e-6)
    assert np.isfinite(packed).all(), "padding gives numbers too"


def test_padding_is_passed_over_and_the_state_goes_on_behind_it():
    mask, text, more = np.array([[0, 1, 1, 1, 1, 1, 0, 0]]), random_tokens(1, 5), random_tokens(1, 4, seed=1)
    params, padded = decoding_params(start(GOOSE)), np.zeros((1, 8), np.int32)
    padded[mask == 1] = text[0]
    alone = forward(params, GOOSE, np.concatenate([text, more], 1)).hidden
    first = forward(params, GOOSE, padded, segments=mask, cache=empty_cache(GOOSE, 1))
    np.testing.assert_allclose(first.hidden[mask == 1], alone[0, :5], atol=5e-6)
    again = np.concatenate([np.zeros((1, 2), np.int32), more], 1)
    second = forward(params, GOOSE, again, segments=np.array([[0, 0, 1, 1, 1, 1]]), cache=first.cache)
    np.testing.assert_allclose(second.hidden[:, 2:], alone[:, 5:], atol=5e-6)
    other = forward(params, GOOSE, more, segments=np.full((1, 4), 2), cache=first.cache)
    np.testing.assert_allclose(other.hidden, forward(params, GOOSE, more).hidden, atol=5e-6)


@pytest.mark.parametrize(("config", "precision"), [(FINCH, "bf16"), (GOOSE, "fp8")], ids=["6", "7"])
def test_low_precision_is_the_same_but_for_rounding(config, precision):
    params, tokens = start(config), random_tokens(4, 16)
    exact = forward(params, config, tokens).hidden
    found = forward(params, config, tokens, execution=Execution(precision=POLICIES[precision])).hidden.astype(jnp.float32)
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < (0.03 if precision == "bf16" else 0.2)


def test_the_strongest_decay_forgets_all_and_has_gradients():
    values = start(EAGLE)
    layer = values["layers"][0]["0"]
    time = layer["attention"]["time"] | {"decay": np.full_like(layer["attention"]["time"]["decay"], 200.0)}
    params = values | {"layers": ({"0": layer | {"attention": layer["attention"] | {"time": time}}},)}
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(_forward(p, EAGLE, random_tokens(1, 9)).hidden ** 3)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_finch_starts_as_an_eagle():
    """What depends on tokens is zero at first, and the shares are those of the other token."""
    eagle, finch = (jax.jit(partial(initial_values, specs=specs(config)))(jax.random.key(0)) for config in (EAGLE, FINCH))
    tokens = random_tokens(2, 9)
    np.testing.assert_allclose(forward(finch, FINCH, tokens).hidden, forward(eagle, EAGLE, tokens).hidden, atol=1e-5)
    layers = eagle["layers"][0]["0"]["attention"]
    for i in range(2):
        decay = -6 + 5 * np.linspace(0, 1, 12) ** (0.7 + 1.3 * i)
        np.testing.assert_allclose(layers["time"]["decay"][i].ravel(), decay, atol=1e-5)
        np.testing.assert_allclose(layers["norm"]["scale"][i], ((i + 1) / 2) ** 0.7, atol=1e-6)
        np.testing.assert_allclose(layers["shift"]["gate"][i], (np.arange(8) / 8) ** (0.5 * (1 - i / 2)), atol=1e-6)


def test_sizes_are_those_of_the_published_models():
    def count(version: int, layers: int, embed: int, **ranks) -> int:
        config = RWKV(version=version, vocab=65536, layers=layers, embed=embed, **ranks)
        return sum(leaf.size for leaf in jax.tree.leaves(abstract(specs(config))))

    # The paper's table 2, in the digits that it gives.
    assert round(count(5, 24, 1024) / 1e6) == 462
    assert round(count(5, 32, 4096) / 1e9, 2) == 7.52
    assert round(count(6, 24, 2048) / 1e9, 2) == 1.60
    assert round(count(6, 32, 2560) / 1e9, 2) == 3.10
    # Table 2 of the next one.
    assert round(count(7, 12, 768) / 1e6) == 191
    assert round(count(7, 24, 2048, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256) / 1e9, 2) == 1.53


def test_flops_count_weights_and_matrices():
    more = {"time": 12 * EAGLE.layers * EAGLE.width * EAGLE.head_dim}
    weights = EAGLE.layers * (5 * 8 * 12 + 2 * 8 * 16 + 8 * 8) + 8 * 17
    assert flops_per_token(EAGLE, 512) == 6 * weights + more["time"]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"head_dim": 5}, "the width of time mixing, 12.*model.head_dim=5"),
        ({"mix_rank": 8}, "model.mix_rank=8 is of model.version 6, not of 5"),
        ({"version": 4}, "model.head_dim=4 is of model.version 5 and 6 and 7, not of 4"),
        ({"version": 6, "decay_rank": 0}, "model.decay_rank=0 must be above 0"),
    ],
)
def test_a_config_that_is_no_model_is_refused_by_name(knobs, said):
    with pytest.raises(ValueError, match=said):
        check(replace(EAGLE, **knobs))


@pytest.mark.parametrize("config", [Transformer(vocab=8), RWKV(vocab=8), FINCH], ids=["transformer", "4", "6"])
def test_every_config_says_what_a_model_says(config):
    assert isinstance(config, Model)
