"""Thresholds found by halving, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lmx.infer import truncation

ROWS, VOCAB = 3, 23
top_k, top_p = jax.jit(truncation.of_top_k), jax.jit(truncation.of_top_p)
FLOATS = st.floats(-60, 60, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -np.inf, 1e30, -1e30])


def rows(elements=FLOATS):
    return arrays.arrays(np.float32, (ROWS, VOCAB), elements=elements).map(lambda a: np.where(a.max(-1, keepdims=True) > -np.inf, a, 1))


@settings(max_examples=150, deadline=None)
@given(rows(), st.lists(st.integers(0, VOCAB + 2), min_size=ROWS, max_size=ROWS))
def test_top_k_keeps_what_is_not_below_the_kth_of_the_sorted(scores, k):
    found = scores >= np.asarray(top_k(scores, np.array(k, np.int32)))[:, None]
    for row, count, kept in zip(scores, k, found, strict=True):
        least = np.sort(row)[::-1][count - 1] if 0 < count < VOCAB else -np.inf
        assert np.array_equal(kept, row >= least)


@settings(max_examples=150, deadline=None)
@given(rows(), st.lists(st.floats(0.01, 1), min_size=ROWS, max_size=ROWS), st.integers(1, VOCAB))
def test_top_p_keeps_a_token_while_those_likelier_have_not_reached_it(scores, p, k):
    floor = np.sort(scores, -1)[:, -k]
    found = scores >= np.asarray(top_p(scores, np.array(p, np.float32), floor))[:, None]
    for row, share, kept, least in zip(scores.astype(np.float64), p, found, floor, strict=True):
        shares = np.where(row >= least, np.exp(row - row.max()), 0)
        shares /= shares.sum()
        for token in range(VOCAB):
            before = shares[row > row[token]].sum()
            if row[token] < least:
                assert not kept[token]
            elif share >= 1 or before < share - 1e-5:
                assert kept[token]
            elif before > share + 1e-5:
                assert not kept[token]


def test_rows_of_a_real_vocabulary_and_every_scale():
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(8, 50257)) * 10.0 ** np.arange(-4, 4)[:, None]).astype(np.float32)
    k = np.array([1, 2, 50, 1000, 50256, 50257, 0, 40], np.int32)
    found = (scores >= np.asarray(top_k(scores, k))[:, None]).sum(-1)
    for row, count, kept in zip(scores, k, found, strict=True):
        assert kept == ((row >= np.sort(row)[-count]).sum() if 0 < count < 50257 else 50257)
    for share in (1e-30, 0.1, 0.9, 0.99):
        found = (scores >= np.asarray(top_p(scores, np.full(8, share, np.float32), np.full(8, -np.inf, np.float32)))[:, None]).sum(-1)
        for row, kept in zip(scores.astype(np.float64), found, strict=True):
            shares = np.sort(np.exp(row - row.max()))[::-1]
            cumulative = np.cumsum(shares) / shares.sum()
            # As many as the sorted ones say, but for what sums in fp32 cannot tell apart.
            assert np.searchsorted(cumulative, share - 1e-5) + 1 <= kept <= np.searchsorted(cumulative, share + 1e-5) + 1


def test_equal_logits_stay_together():
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert (scores >= np.asarray(top_k(scores, np.array([2], np.int32)))).tolist() == [[True, True, True, True, False]]
    nothing = np.array([-np.inf], np.float32)
    assert (scores >= np.asarray(top_p(scores, np.array([0.5], np.float32), nothing))).tolist() == [[True, True, True, True, False]]


def test_min_p_is_a_share_of_the_likeliest():
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    found = [(scores >= np.asarray(truncation.of_min_p(scores, jnp.array([p])))[:, None]).sum() for p in (0.0, 0.09, 0.2, 0.5, 1.0)]
    assert found == [4, 4, 3, 2, 1]
