"""Positions: what makes each kind what its paper says, beside the values that the NumPy transformer checks."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.models.positions import alibi_slopes, sinusoids
from lmx.models.rope import rope_table, rotate

RNG = np.random.default_rng(0)


def test_rope_makes_scores_depend_on_the_distance_alone():
    query, key = RNG.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at_query: int, at_key: int) -> float:
        turned = [rotate(x, rope_table(np.array([[at]]), 8, 10_000.0)) for x, at in ((query, at_query), (key, at_key))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(5, 5) == pytest.approx(float((query * key).sum()), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rope_keeps_lengths_and_leaves_the_first_position_alone():
    x = RNG.normal(size=(1, 3, 2, 6)).astype(np.float32)
    turned = np.asarray(rotate(x, rope_table(np.array([[0, 5, 900]]), 6, 10_000.0)))
    np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-7)
    np.testing.assert_allclose((turned**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    assert rotate(jnp.asarray(x, jnp.bfloat16), rope_table(np.array([[0, 5, 900]]), 6, 10_000.0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2.0**-8]),
        (4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]),
        (8, [2.0**-i for i in range(1, 9)]),
        # Twelve heads in the paper's released code: the eight of eight, then every other one of sixteen's.
        (12, [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]),
    ],
)
def test_alibi_slopes_are_those_of_the_paper(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes, rtol=1e-6)


@pytest.mark.parametrize("size", [8, 7])
def test_sinusoids_are_those_of_the_paper(size):
    found = np.asarray(sinusoids(np.array([[0, 3, 100]]), size))
    assert found.shape == (1, 3, size)
    for place, at in enumerate((0, 3, 100)):
        for i in range(size):
            angle = at / 10_000 ** ((i - i % 2) / size)
            assert found[0, place, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle), abs=2e-5)
