"""Logits to tokens, against the distribution that they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.infer import Sampling, sample

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.9, -0.4, 1.9, -6.0], np.float32)
DRAWS = 8192


def probabilities(temperature: float = 1.0, kept=None) -> np.ndarray:
    shares = np.exp(LOGITS.astype(np.float64) / temperature)
    shares = shares if kept is None else np.where(np.isin(np.arange(8), list(kept)), shares, 0.0)
    return shares / shares.sum()


def likeliest(reaching: float, temperature: float = 1.0) -> set[int]:
    """The fewest likeliest tokens that together reach a probability."""
    shares = probabilities(temperature)
    found, total = set(), 0.0
    for token in sorted(range(8), key=lambda i: -shares[i]):
        if total >= reaching:
            break
        found.add(token)
        total += shares[token]
    return found


def draw(sampling: Sampling, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return np.asarray(jax.jit(sample, static_argnums=1)(jnp.tile(LOGITS, (DRAWS, 1)), sampling, keys))


@pytest.mark.parametrize(
    ("sampling", "kept", "temperature"),
    [
        (Sampling(), None, 1.0),
        (Sampling(temperature=2.5), None, 2.5),
        (Sampling(temperature=0.5), None, 0.5),
        (Sampling(top_k=3), {1, 6, 3}, 1.0),
        (Sampling(top_k=100), None, 1.0),
        (Sampling(top_p=0.7), likeliest(0.7), 1.0),
        (Sampling(temperature=2.0, top_p=0.7), likeliest(0.7, 2.0), 2.0),
        (Sampling(top_p=1e-6), {1}, 1.0),
        (Sampling(top_k=1), {1}, 1.0),
    ],
    ids=lambda value: str(value) if isinstance(value, Sampling) else "",
)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampling, kept, temperature):
    expected = DRAWS * probabilities(temperature, kept)
    found = np.bincount(draw(sampling), minlength=8)
    assert not found[expected == 0].any()
    cells = expected > 0
    # Every token that may come comes, but for the one that is hardly ever drawn.
    assert (found[expected > 20] > 0).all()
    chi_squared = float(((found - expected)[cells] ** 2 / expected[cells]).sum())
    # The 0.9999 quantile of chi-squared with seven degrees of freedom is 29.9, and more than with fewer.
    assert chi_squared < 29.9


def test_the_two_sets_of_top_p_are_not_the_same():
    assert likeliest(0.7) < likeliest(0.7, 2.0)
    assert len(likeliest(0.7)) == 3


def test_top_k_comes_before_top_p():
    # Of three tokens alone, the first two reach 0.75; of all eight, they do not.
    sampling = Sampling(top_k=3, top_p=0.75)
    shares = probabilities(kept={1, 6, 3})
    assert shares[1] + shares[6] >= 0.75 > probabilities()[1] + probabilities()[6]
    assert set(draw(sampling).tolist()) == {1, 6}


def test_without_temperature_it_is_the_likeliest_token():
    rows = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=3, top_p=0.5)):
        found = sample(rows, sampling, keys)
        assert found.dtype == jnp.int32
        assert np.array_equal(found, rows.argmax(-1))


def test_a_rows_draw_depends_on_its_own_logits_and_key_alone():
    rows = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    for sampling in (Sampling(), Sampling(top_k=5), Sampling(top_p=0.8)):
        whole = np.asarray(sample(rows, sampling, keys))
        order = np.array([2, 0, 3, 1])
        assert np.array_equal(sample(rows[order], sampling, keys[order]), whole[order])
        assert np.array_equal(sample(rows[1:3], sampling, keys[1:3]), whole[1:3])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_impossible_knobs_are_refused_by_value(knobs, said):
    with pytest.raises(ValueError, match=said) as error:
        Sampling(**knobs)
    assert "\n" not in str(error.value)
