"""One forward: however the engine computes a text, its tokens and log-probabilities are those of the plain forward over the same weights."""

from dataclasses import replace

import numpy as np
import pytest

from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from plain import SMALL, Plain, prompts_of, weights

NEW = 10
TOLD = Sampling(temperature=0, log_probs="raw")
BEGINNING = [5, 3, 8, 1, 9, 2, 2, 7, 11, 4, 6, 0]
PROMPTS = [BEGINNING, *prompts_of(4), [*BEGINNING, 1, 2, 3], [*BEGINNING[:9], 20, 21], BEGINNING]


@pytest.fixture(scope="module")
def params():
    return weights(SMALL)


@pytest.fixture(scope="module")
def plain(params):
    return Plain(SMALL, params, length=32)


@pytest.fixture(scope="module")
def wanted(plain):
    new = plain.greedy(PROMPTS, NEW)
    return new, plain.log_probs(PROMPTS, new)


SIZES = {"rows": 4, "page": 4, "chunk": 16, "longest": 32}
WAYS = {
    "all at once": {},
    "no reuse": {"reuse": False},
    "chunked prefill, pages of 7": {"chunk": 3, "page": 7},
    "preempted, recomputed": {"pages": 11},
    "preempted, swapped": {"pages": 11, "host_pages": 20},
    "preempted, little room on the host": {"pages": 11, "host_pages": 5},
    "batch of one, pages longer than texts": {"rows": 1, "page": 48},
    "batch of 64, pages of one": {"rows": 64, "page": 1, "prompts": 64, "chunk": 1024},
}


def told(completions):
    return [one.tokens for (one,) in completions], [one.log_probs for (one,) in completions]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_text_gives_the_plain_forwards_tokens_and_log_probs(way, params, wanted):
    engine = Engine(SMALL, params, **SIZES | WAYS[way], trace=True)
    repeats = 8 if engine._sizes.rows == 64 else 1
    tokens, log_probs = told(engine.generate(PROMPTS * repeats, max_new_tokens=NEW, sampling=TOLD))
    assert tokens == wanted[0] * repeats
    np.testing.assert_allclose(log_probs, wanted[1] * repeats, atol=1e-5)
    # The way was gone.
    moments = engine.timeline
    assert any(moment.preempted for moment in moments) == way.startswith("preempted")
    if way.startswith("chunked"):
        assert max(sum(n for _, n in moment.read) for moment in moments) == 3
    assert max(len(moment.decoded) for moment in moments) == engine._sizes.rows or way.startswith("preempted")
    assert (engine.statistics.hit_rate > 0) == (way not in ("no reuse", *list(WAYS)[-2:]))
    assert engine.statistics.in_use == 0
    engine.pages.check()


def test_a_second_time_the_beginning_is_found_and_all_stays_the_same(params, wanted):
    engine = Engine(SMALL, params, **SIZES, trace=True)
    engine.generate([BEGINNING], max_new_tokens=NEW)
    before = len(engine.timeline)
    tokens, log_probs = told(engine.generate([BEGINNING], max_new_tokens=NEW, sampling=TOLD))
    assert sum(n for moment in engine.timeline[before:] for _, n in moment.read) == 4  # of 12: two pages of four are there
    assert tokens == wanted[0][:1]
    np.testing.assert_allclose(log_probs, wanted[1][:1], atol=1e-5)


def test_where_all_layers_have_a_window_pages_behind_it_are_given_up_and_numbers_stay():
    model = replace(SMALL, pattern=("local",), window=6)
    params = weights(model)
    plain = Plain(model, params, length=32)
    prompts = [*PROMPTS[:3], *prompts_of(8, high=4, seed=2)]  # who begins short grows to three pages
    new = plain.greedy(prompts, NEW)
    for host in (0, 12):
        engine = Engine(model, params, **SIZES | {"chunk": 3, "pages": 8, "host_pages": host}, trace=True)
        tokens, log_probs = told(engine.generate(prompts, max_new_tokens=NEW, sampling=TOLD))
        assert tokens == new
        np.testing.assert_allclose(log_probs, plain.log_probs(prompts, new), atol=1e-5)
        assert max(moment.pages for moment in engine.timeline) < 8
        assert any(moment.preempted for moment in engine.timeline)
        engine.pages.check()


def test_int8_keys_and_values_cost_little(params, plain, wanted):
    """Each number of a key or value is off by at most 1/254 of the largest of its vector. Here the logits' spread is 1.2, and log-probabilities
    are then off by 0.009 on average and 0.09 at most (measured); bounds are less than twice that. A wrong scale, or a page without its own, is
    off by the spread. Whatever way a text is computed, its K and V are rounded alike: the ways agree as in float32."""
    found = []
    for sizes in ({"host_pages": 20}, {"reuse": False}):
        engine = Engine(SMALL, params, **SIZES | {"pages": 11} | sizes, cache="int8")
        found.append(told(engine.generate(PROMPTS, max_new_tokens=NEW, sampling=TOLD)))
    tokens, log_probs = found[0]
    off = np.abs(np.array(log_probs) - np.array(plain.log_probs(PROMPTS, tokens)))
    assert 1e-5 < off.max() < 0.15
    assert off.mean() < 0.015
    for other in found[1:]:
        assert other[0] == tokens
        np.testing.assert_allclose(other[1], log_probs, atol=1e-4)
