"""Attention to keys and values in pages, against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import paged
from lmx.kernels.paged import View

POOL, SIZE, DIM = 40, 4, 8


def layout(rng, lengths, new, singles):
    """Pages of rows, in no order, a `View` of their last `new` tokens, and where those are: `(view, slots)`."""
    free = list(rng.permutation(np.arange(1, POOL)))
    pages = [[free.pop() for _ in range(-(-n // SIZE))] for n in lengths]
    first, queries = np.cumsum([0, *map(len, pages)]), np.cumsum([0, *(1 if r < singles else n for r, n in enumerate(new))])
    flat = [p for row in pages for p in row]
    view = View(*(jnp.asarray(a, jnp.int32) for a in (flat + [0] * (POOL - len(flat)), first, lengths, queries)), singles)
    slots = np.zeros(int(queries[-1]) + 3, np.int32)  # three tokens of padding behind
    for r, row in enumerate(pages):
        for i in range(new[r]):
            at = lengths[r] - new[r] + i
            slots[queries[r] + i] = row[at // SIZE] * SIZE + at % SIZE
    return view, slots


def reference(q, keys, values, view, *, scale, causal=True, window=None, softcap=None, slopes=None, bias=None):
    """Token by token, head by head."""
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    out, group = np.zeros(q.shape), q.shape[1] // keys.shape[1]
    for r, n in enumerate(np.asarray(view.lengths)):
        ids = np.asarray(view.pages)[view.first[r] : view.first[r + 1]]
        k, v = (np.concatenate([a[i].swapaxes(0, 1) for i in ids])[:n] if n else None for a in (keys, values))
        tokens = range(int(view.queries[r]), int(view.queries[r + 1])) if n else ()
        for i in tokens:
            at = n - (int(view.queries[r + 1]) - i)
            for h in range(q.shape[1]):
                last = at if view.prefix is None else max(at, int(view.prefix[r]) - 1)
                seen = [j for j in range(n) if (not causal or j <= last) and (window is None or at - j < window)]
                scores = np.array([scale * q[i, h] @ k[j, h // group] for j in seen])
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                scores = scores - (0 if slopes is None else np.array([slopes[h] * (at - j) for j in seen]))
                scores = scores + (0 if bias is None else np.array([bias[h, at - j] for j in seen]))
                weights = np.exp(scores - scores.max())
                out[i, h] = (weights / weights.sum()) @ np.array([v[j, h // group] for j in seen])
    return out


CASES = {
    "causal": {},
    "window": {"window": 3},
    "soft cap": {"softcap": 2.0},
    "ALiBi": {"slopes": np.array([0.5, 0.25, 0.1, 0.05])},
    "bias": {"bias": np.random.default_rng(7).normal(size=(4, 64))},
    "an encoder's": {"causal": False},
    "a prefix": {"prefix": [3, 0, 21, 0, 7, 14]},
    "a prefix and ALiBi": {"prefix": [5, 0, 2, 1, 9, 12], "slopes": np.array([0.5, 0.25, 0.1, 0.05])},
}


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    lengths, new = [5, 0, 21, 1, 9, 14], [1, 0, 1, 1, 9, 6]  # three rows that decode and one that is not there; two chunks
    view, slots = layout(rng, lengths, new, 4)
    count = len(slots)
    q = rng.normal(size=(count, 4, DIM)).astype(np.float32)
    keys, values = (rng.normal(size=(POOL, 2, SIZE, DIM)).astype(np.float32) for _ in range(2))
    return view, slots, q, keys, values


@pytest.mark.parametrize(("block", "tile"), [(8, 4), (64, 64)])
@pytest.mark.parametrize("case", CASES)
def test_every_token_sees_its_own_text_up_to_itself(setting, case, block, tile, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK", block)
    monkeypatch.setattr(paged, "TILE", tile)
    view, _, q, keys, values = setting
    asked = dict(CASES[case])
    if "prefix" in asked:
        view = view.replace(prefix=jnp.array(asked.pop("prefix")))
    wanted = reference(q, keys, values, view, scale=0.3, **asked)
    if "bias" in asked:
        positions = view.tokens(len(q))[1]
        table = jnp.asarray(asked["bias"], jnp.float32)

        def bias(index, keys):
            return jnp.moveaxis(table[:, jnp.clip(positions[index][:, :, None] - keys[:, None], 0, 63)], 0, 1)

        asked["bias"] = bias
    if "slopes" in asked:
        asked["slopes"] = jnp.asarray(asked["slopes"], jnp.float32)
    cache = {"key": jnp.asarray(keys), "value": jnp.asarray(values)}
    found = jax.jit(lambda q, cache, view: paged.attention(q, cache, view, scale=0.3, **asked))(q, cache, view)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not np.any(found[1])  # of a row that is not there
    assert not np.any(found[-3:])  # padding


def test_a_call_of_only_decoding_rows_or_only_chunks(setting):
    _, _, _, keys, values = setting
    rng, cache = np.random.default_rng(1), {"key": jnp.asarray(keys), "value": jnp.asarray(values)}
    for lengths, new, singles in (([3, 8], [1, 1], 2), ([3, 8], [3, 2], 0)):
        view, slots = layout(rng, lengths, new, singles)
        q = rng.normal(size=(singles or len(slots), 4, DIM)).astype(np.float32)
        np.testing.assert_allclose(
            paged.attention(jnp.asarray(q), cache, view, scale=0.3), reference(q, keys, values, view, scale=0.3), atol=1e-6
        )


@pytest.mark.parametrize("length", [1, 4, 12, 13, 16, 17, 29, 45, 46, 64, 77])
def test_what_is_left_of_a_block_is_read_in_parts(setting, length, monkeypatch):
    """Of blocks of 16 slots and parts of 4: up to three parts, and from there on a block."""
    monkeypatch.setattr(paged, "BLOCK", 16)
    monkeypatch.setattr(paged, "FEW", 4)
    _, _, _, keys, values = setting
    rng, cache = np.random.default_rng(length), {"key": jnp.asarray(keys), "value": jnp.asarray(values)}
    view, _ = layout(rng, [length], [1], 1)
    q = rng.normal(size=(1, 4, DIM)).astype(np.float32)
    found = paged.attention(jnp.asarray(q), cache, view, scale=0.3)
    np.testing.assert_allclose(found, reference(q, keys, values, view, scale=0.3), atol=1e-6)


def test_what_is_written_is_read_and_nothing_else_changes(setting):
    _, slots, _, keys, values = setting
    rng = np.random.default_rng(2)
    new = [rng.normal(size=(len(slots), 2, DIM)).astype(np.float32) for _ in range(2)]
    cache = paged.write({"key": jnp.asarray(keys), "value": jnp.asarray(values)}, *map(jnp.asarray, new), jnp.asarray(slots))
    for name, before, written in (("key", keys, new[0]), ("value", values, new[1])):
        wanted = before.copy()
        for i, slot in enumerate(slots):
            wanted[slot // SIZE, :, slot % SIZE] = written[i]
        np.testing.assert_array_equal(cache[name][1:], wanted[1:])  # page 0 is what padding writes to


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "int8"])
def test_a_value_beyond_the_pages_type_is_nan_to_who_sees_it_and_nothing_to_who_has_its_page_next(setting, dtype):
    view, _, q, keys, values = setting
    values, row = values.copy(), {0: 2, 4: 4}  # the third token of a row that decodes, the fifth of a chunk
    for r, at in row.items():
        values[np.asarray(view.pages)[view.first[r] + at // SIZE], 1, at % SIZE, 3] = np.inf if dtype in ("float32", "int8") else 1e6
    cache = {name: jnp.zeros((POOL, 2, SIZE, DIM), dtype) for name in ("key", "value")}
    if dtype == "int8":
        cache |= {f"{name}_scale": jnp.zeros((POOL, 2, SIZE)) for name in ("key", "value")}
    written = (jnp.asarray(a.swapaxes(1, 2).reshape(POOL * SIZE, 2, DIM)) for a in (keys, values))
    cache = paged.write(cache, *written, jnp.arange(POOL * SIZE))
    assert np.isfinite(np.asarray(cache["value"], np.float32)).all()
    found = np.isnan(paged.attention(jnp.asarray(q), cache, view, scale=0.3))
    wanted = np.zeros(found.shape, bool)
    for r, at in row.items():
        tokens = np.arange(view.queries[r], view.queries[r + 1])
        wanted[tokens[int(view.lengths[r]) - len(tokens) + np.arange(len(tokens)) >= at], 2:] = True  # of the heads that share the second's
    np.testing.assert_array_equal(found, wanted)


def test_int8_pages_are_off_by_no_more_than_half_a_step(setting):
    view, _, q, keys, values = setting
    empty = {name: jnp.zeros((POOL, 2, SIZE, DIM), jnp.int8) for name in ("key", "value")}
    empty |= {f"{name}_scale": jnp.zeros((POOL, 2, SIZE)) for name in ("key", "value")}
    everywhere = jnp.arange(POOL * SIZE)
    cache = paged.write(empty, *(jnp.asarray(a.swapaxes(1, 2).reshape(POOL * SIZE, 2, DIM)) for a in (keys, values)), everywhere)
    rounded = {n: np.asarray(cache[n] * cache[f"{n}_scale"][..., None]) for n in ("key", "value")}
    for name, exact in (("key", keys), ("value", values)):
        assert np.all(np.abs(rounded[name] - exact) <= np.abs(exact).max(-1, keepdims=True) / 254 * 1.001)
    found = paged.attention(jnp.asarray(q), cache, view, scale=0.3)
    np.testing.assert_allclose(found, reference(q, rounded["key"], rounded["value"], view, scale=0.3), atol=1e-6)
