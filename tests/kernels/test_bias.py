"""A learned bias of scores: what every implementation computes with it, and its gradient, against a loop in float64."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from lmx.kernels import chunked
from lmx.kernels.attention import attention
from lmx.kernels.masks import Mask

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 6, 8, 4, 2, 4


def inputs(queries: int, rows: int) -> dict:
    rng = np.random.default_rng(queries)
    shapes = {"q": (BATCH, queries, HEADS, DIM), "k": (BATCH, KEYS, KV_HEADS, DIM), "v": (BATCH, KEYS, KV_HEADS, DIM)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in (shapes | {"bias": (rows, HEADS, queries, KEYS)}).items()}


def mask(queries: int, *, causal: bool) -> Mask:
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    keys = np.tile(np.arange(KEYS, dtype=np.int32), (BATCH, 1))
    late = slice(KEYS - queries - 1, KEYS - 1)
    return Mask(
        causal=causal,
        order="positions",
        query_positions=keys[:, late],
        key_positions=keys,
        query_segments=segments[:, late],
        key_segments=segments,
    )


def loop(q, k, v, bias, mask: Mask) -> np.ndarray:
    """Vaswani et al. (2017), equation 1, with something added to each score, for each row, head and query by itself."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(KEYS) if mask.query_segments[b, i] == mask.key_segments[b, j] != 0]
        seen = [j for j in seen if not mask.causal or mask.key_positions[b, j] <= mask.query_positions[b, i]]
        weights = [math.exp(q[b, i, h] @ k[b, j, h // 2] / math.sqrt(DIM) + bias[b % len(bias), h, i, j]) for j in seen]
        for weight, j in zip(weights, seen, strict=True):
            out[b, i, h] += weight / sum(weights) * v[b, j, h // 2]
    return out


@partial(jax.jit, static_argnames="implementation")
def value_and_pullback(q, k, v, bias, mask, cotangent, *, implementation):
    out, pullback = jax.vjp(lambda q, k, v, bias: attention(q, k, v, mask, bias=bias, implementation=implementation), q, k, v, bias)
    return out, pullback(cotangent)


@pytest.mark.parametrize("rows", [BATCH, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("implementation", "queries"), [("reference", 6), ("dense", 6), ("chunked", 6), ("single", 1)])
def test_a_bias_and_its_gradient_are_those_of_a_loop(implementation, queries, causal, rows, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 4)  # tiles of 3 queries and 4 keys
    given, where = inputs(queries, rows), mask(queries, causal=causal)
    cotangent = np.random.default_rng(9).normal(size=given["q"].shape).astype(np.float32)
    found, gradients = jax.device_get(value_and_pullback(**given, mask=where, cotangent=cotangent, implementation=implementation))
    wide = {n: a.astype(np.float64) for n, a in given.items()}
    expected = loop(**wide, mask=where)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    rng, step = np.random.default_rng(1), 1e-6
    for name, gradient in zip(given, gradients, strict=True):
        assert gradient.shape == given[name].shape
        direction = rng.normal(size=gradient.shape)
        up, down = (loop(**wide | {name: wide[name] + sign * step * direction}, mask=where) for sign in (1, -1))
        slope = float((cotangent * (up - down)).sum()) / (2 * step)
        size = float(np.abs(gradient * direction).sum())
        assert abs(float((gradient * direction).sum()) - slope) <= 1e-5 * size + 1e-7, name


def test_cudnn_takes_none():
    given = {n: a.astype("bfloat16") for n, a in inputs(8, 1).items()}
    q, k, v = (np.concatenate([given[n]] * 2, -1) for n in "qkv")
    with pytest.raises(ValueError, match="takes no learned bias"):
        attention(q, k, v, Mask(), bias=given["bias"], implementation="cudnn")
