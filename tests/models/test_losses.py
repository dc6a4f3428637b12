"""Cross-entropy in chunks: the number, its gradients, and how much of the logits exists at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import cap, loss

from lmx.models import losses
from lmx.models.config import Transformer
from lmx.models.losses import cross_entropy, logits
from lmx.parallel import tensor

BATCH, LENGTH, EMBED, VOCAB = 2, 12, 8, 11
CONFIGS = {
    "tied": Transformer(vocab=VOCAB, embed=EMBED),
    "own head": Transformer(vocab=VOCAB, embed=EMBED, tied=False),
    "capped": Transformer(vocab=VOCAB, embed=EMBED, logit_softcap=2.0),
}
Z_LOSS = 0.1


def inputs(config: Transformer):
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(VOCAB, EMBED))} if config.tied else {"head": rng.normal(size=(EMBED, VOCAB))}
    hidden, targets = rng.normal(size=(BATCH, LENGTH, EMBED)), rng.integers(0, VOCAB, (BATCH, LENGTH))
    weights = rng.uniform(0, 2, (BATCH, LENGTH)) * rng.integers(0, 2, (BATCH, LENGTH))
    return jax.tree.map(lambda a: a.astype(np.float32), params), *(hidden.astype(np.float32), targets, weights.astype(np.float32))


def expected(config, params, hidden, targets, weights) -> tuple[float, float]:
    """Loss and right guesses in float64."""
    head = params["embed"].T if config.tied else params["head"]
    rows = cap(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64), config.logit_softcap)
    return loss(rows, targets, np.asarray(weights, np.float64), Z_LOSS)


def value_and_grad(config, params, hidden, targets, weights):
    def total(params, hidden):
        return cross_entropy(params, config, hidden, targets, weights, z_loss=Z_LOSS)

    return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, hidden))


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_or_in_chunks_it_is_the_loss_in_float64(name, monkeypatch):
    config = CONFIGS[name]
    params, hidden, targets, weights = inputs(config)
    right, correct = expected(config, params, hidden, targets, weights)
    (whole, sums), gradients = value_and_grad(config, params, hidden, targets, weights)
    assert whole == pytest.approx(right, rel=2e-6)
    assert sums["correct"] == pytest.approx(correct, rel=1e-6)
    assert sums["z_loss"] > 0.05 * whole
    assert sums["cross_entropy"] + sums["z_loss"] == pytest.approx(whole, rel=1e-6)

    rng, step = np.random.default_rng(1), 1e-6
    for (part,), gradient in ((tuple(params), gradients[0]), (("hidden",), gradients[1])):
        base = np.asarray(hidden if part == "hidden" else params[part], np.float64)
        gradient = gradient if part == "hidden" else gradient[part]
        direction = rng.normal(size=base.shape)
        ends = []
        for sign in (1, -1):
            moved = base + sign * step * direction
            at = (params, moved) if part == "hidden" else ({part: moved}, hidden)
            ends.append(expected(config, *at, targets, weights)[0])
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)

    # 4 chunks of 3 tokens; and, where not even one token of each row fits, a chunk for each place.
    for room in (BATCH * 3 * VOCAB, 1):
        monkeypatch.setitem(tensor.CHUNKS, "cpu", room)
        (chunked, sums_too), gradients_too = value_and_grad(config, params, hidden, targets, weights)
        assert chunked == pytest.approx(whole, rel=1e-6)
        assert all(sums_too[n] == pytest.approx(sums[n], rel=1e-6) for n in sums)
        for a, b in zip(jax.tree.leaves(gradients_too), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_a_gpu_reads_logits_once_for_the_same_statistics():
    rng = np.random.default_rng(0)
    rows = (30 * rng.normal(size=(3, 5, 1000))).astype(np.float32)
    rows[0, 0] = -np.inf  # but for one
    rows[0, 0, 7] = -1e30
    hit = np.arange(1000) == rng.integers(0, 1000, (3, 5, 1))
    for found, exact in zip(jax.jit(losses.at_once)(rows, hit), losses.statistics(rows, hit), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_weights_add_up_token_by_token():
    config = CONFIGS["tied"]
    params, hidden, targets, _ = inputs(config)

    @jax.jit
    def of(weights):
        return cross_entropy(params, config, hidden, targets, weights)[0]

    ones = np.ones((BATCH, LENGTH), np.float32)
    first = ones * (np.arange(LENGTH) < 5)
    assert float(of(ones)) == pytest.approx(float(of(first)) + float(of(ones - first)), rel=1e-6)
    assert float(of(2 * first)) == pytest.approx(2 * float(of(first)), rel=1e-6)
    assert float(of(0 * ones)) == 0.0


def test_the_target_of_a_token_without_weight_does_not_matter():
    config = CONFIGS["tied"]
    params, hidden, targets, weights = inputs(config)
    other = np.where(weights == 0, -100, targets)
    assert (other != targets).any()
    before, after = (value_and_grad(config, params, hidden, t, weights) for t in (targets, other))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))


def test_logits_that_overflow_an_exponential_give_a_finite_loss():
    config = CONFIGS["tied"]
    params, hidden, targets, weights = inputs(config)
    (total, _), gradients = value_and_grad(config, params, 1e3 * hidden, targets, weights)
    assert total == pytest.approx(expected(config, params, 1e3 * hidden, targets, weights)[0], rel=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_a_capped_head_caps_what_is_sampled_from_too():
    params, hidden, _, _ = inputs(CONFIGS["capped"])
    found = logits(params, CONFIGS["capped"], 100 * hidden)
    assert float(np.abs(found).max()) <= 2.0
    np.testing.assert_allclose(found, 2.0 * np.tanh(100 * hidden @ params["embed"].T / 2.0), atol=1e-4)


def largest_array(text: str) -> int:
    """Numbers in the largest floating array of a compiled program."""
    shapes = re.findall(r"\b(?:f64|f32|bf16|f16)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_full_logits_never_exist(monkeypatch):
    batch, length, vocab = 4, 32, 96
    config = Transformer(vocab=vocab, embed=EMBED)
    arrays = (
        {"embed": jax.ShapeDtypeStruct((vocab, EMBED), jnp.float32)},
        jax.ShapeDtypeStruct((batch, length, EMBED), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )

    def compiled() -> str:
        def total(params, hidden, targets, weights):
            return cross_entropy(params, config, hidden, targets, weights)[0]

        return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays).compile().as_text()

    assert largest_array(compiled()) >= batch * length * vocab
    monkeypatch.setitem(tensor.CHUNKS, "cpu", batch * length * vocab // 8)
    assert largest_array(compiled()) <= batch * length * vocab // 8
