"""RWKV's mean over the past: against its definition in float64, however it is cut, for large keys, in what it keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.kernels.wkv import NONE, empty, running, wkv, wkv_from

BATCH, LENGTH, CHANNELS = 2, 24, 3


def arguments(seed: int = 0, dtype=np.float32):
    """Keys, values, decays and bonuses, and the segments of rows: 0 is padding."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(BATCH, LENGTH, CHANNELS)) * scale for scale in (3, 1))
    decay, bonus = -np.exp(rng.normal(size=CHANNELS)), rng.normal(size=CHANNELS)
    lengths = rng.integers(0, 9, (BATCH, LENGTH))
    segments = np.stack([np.repeat(np.arange(LENGTH), row)[:LENGTH] if row.sum() >= LENGTH else np.ones(LENGTH, int) for row in lengths])
    return [jnp.asarray(a, dtype) for a in (k, v, decay, bonus)], segments


def masks(segments: np.ndarray):
    real = segments > 0
    return jnp.asarray(real), jnp.asarray(real & np.insert(segments[:, 1:] != segments[:, :-1], 0, True, axis=1))


def definition(k, v, decay, bonus, segments):
    """The sums as the paper writes them, every pair of tokens by itself."""
    k, v, decay, bonus = (np.asarray(a, np.float64) for a in (k, v, decay, bonus))
    out = np.zeros(v.shape)
    for b, t in zip(*np.nonzero(segments), strict=True):
        before = np.nonzero(segments[b, :t] == segments[b, t])[0]
        logs = np.concatenate([(t - 1 - before)[:, None] * decay + k[b, before], (bonus + k[b, t])[None]])
        weights = np.exp(logs - logs.max(0))
        out[b, t] = (weights * np.concatenate([v[b, before], v[b, t][None]])).sum(0) / weights.sum(0)
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_it_is_its_definition_whatever_is_packed(seed):
    values, segments = arguments(seed)
    found = np.where(segments[..., None] > 0, _run(*values, *masks(segments)), 0)
    np.testing.assert_allclose(found, definition(*values, segments), atol=3e-6)


_run = jax.jit(wkv)


def test_gradients_are_how_the_definition_changes():
    values, segments = arguments(3)
    weigh = np.random.default_rng(0).normal(size=values[0].shape) * (segments > 0)[..., None]
    found = jax.jit(jax.grad(lambda *a: jnp.sum(weigh * wkv(*a, *masks(segments))), argnums=(0, 1, 2, 3)))(*values)
    values = [np.asarray(a, np.float64) for a in values]
    for i, gradient in enumerate(found):
        for at in np.ndindex(gradient.shape):
            way = np.zeros(gradient.shape)
            way[at] = 1e-6
            ends = [np.sum(weigh * definition(*values[:i], values[i] + by * way, *values[i + 1 :], segments)) for by in (1, -1)]
            assert gradient[at] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("piece", [1, 5, 8, 24, 32])
def test_however_the_length_is_cut_the_sums_are_the_same(piece):
    (k, v, decay, _), segments = arguments(1)
    real, fresh = masks(segments)
    start = empty(BATCH, CHANNELS).replace(numerator=v[:, 0], denominator=v[:, 1] ** 2, exponent=k[:, 0])
    whole, cut = (running(v, v[..., :1] ** 2, k, real, fresh, decay, start, piece=n) for n in (LENGTH, piece))
    for name in ("numerator", "denominator"):
        a, b = (getattr(sums, name) * np.exp(sums.exponent) for sums in (cut, whole))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_as_accelerators_run_it_values_and_gradients_are_the_same(monkeypatch):
    values, segments = arguments(5)

    def found():
        run = partial(wkv, real=masks(segments)[0], fresh=masks(segments)[1])
        y, back = jax.vjp(run, *values)
        return y, *back(values[1] * (segments > 0)[..., None])

    step_by_step = found()
    monkeypatch.setattr("lmx.kernels.wkv.devices.on_cpu", lambda: False)
    for a, b in zip(found(), step_by_step, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


def test_going_on_from_earlier_sums_is_reading_all_at_once():
    values, segments = arguments(2)
    k, v, decay, bonus = values
    real, fresh = masks(segments)
    sums, parts = empty(BATCH, CHANNELS), []
    for begin, end in ((0, 1), (1, 9), (9, 10), (10, 24)):
        here = slice(begin, end)
        y, sums = wkv_from(k[:, here], v[:, here], decay, bonus, real[:, here], fresh[:, here], sums)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), wkv(*values, real, fresh), atol=2e-6)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_keys_of_any_size_give_finite_means_and_gradients(size):
    (k, v, decay, bonus), segments = arguments()

    def loss(k, v, decay, bonus):
        y = wkv(size * k, v, decay, bonus, *masks(segments))
        return jnp.sum(y**2), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(k, v, decay, bonus)
    assert np.abs(y).max() <= np.abs(v).max() * (1 + 1e-6), "a mean is no larger than what it is of"
    assert all(np.isfinite(g).all() for g in gradients)


def test_bf16_is_summed_in_fp32():
    values, segments = arguments(4)
    k, v = (a.astype(jnp.bfloat16) for a in values[:2])
    found = wkv(k, v, *values[2:], *masks(segments))
    exact = wkv(k.astype(jnp.float32), v.astype(jnp.float32), *values[2:], *masks(segments))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_what_is_kept_for_the_backward_pass_is_one_number_a_token_and_channel_beside_what_went_in_and_out():
    values, segments = arguments()
    _, back = jax.vjp(partial(wkv, real=masks(segments)[0], fresh=masks(segments)[1]), *values)
    kept = sum(leaf.size for leaf in jax.tree.leaves(back))
    assert kept <= 4 * BATCH * LENGTH * CHANNELS + 2 * CHANNELS + 2 * BATCH * LENGTH


def test_rows_of_padding_give_numbers():
    values, _ = arguments()
    none = jnp.zeros((BATCH, LENGTH), bool)
    y, sums = wkv_from(*values, none, none, empty(BATCH, CHANNELS))
    assert np.isfinite(y).all()
    assert (sums.exponent <= NONE).all()
