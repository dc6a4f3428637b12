"""Logits to tokens, against the distribution that they say."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.infer.sampling import BIASES, KINDS, History, Sampling, begun, blank, check, draw, extended, knobs, likeliest, log_probs, row_keys

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.9, -0.4, 1.9, -6.0, 0.1, -0.2, 0.5], np.float32)
VOCAB, DRAWS = len(LOGITS), 4096
READ, WROTE = [1, 2, 2], [6, 6, 6, 4]  # a prompt, and what followed it
FULL = Sampling(0.8, 6, 0.9, 0.05, 1.3, 0.4, 0.2, ((3, 1.5), (6, -math.inf), (0, 0.25)))

ROWS = 16
drawing = jax.jit(draw, static_argnames="top")
telling = jax.jit(log_probs, static_argnames="kind")


def distribution(sampling: Sampling, kind="truncated", logits=LOGITS, read=READ, wrote=WROTE) -> np.ndarray:
    """Probabilities, token by token, with a sort."""
    scores = [float(logit) for logit in logits]
    if kind != "raw":
        for token, value in sampling.logit_bias:
            scores[token] += value
        for token in {*read, *wrote}:
            scores[token] = (
                scores[token] / sampling.repetition_penalty if scores[token] > 0 else scores[token] * sampling.repetition_penalty
            )
        for token in set(wrote):
            scores[token] -= wrote.count(token) * sampling.frequency_penalty + sampling.presence_penalty
        if sampling.temperature == 0:
            return np.eye(len(scores))[scores.index(max(scores))]
        scores = [score / sampling.temperature for score in scores]
    shares = np.exp(np.array(scores) - max(scores))
    if kind == "truncated":
        order = sorted(range(len(scores)), key=lambda token: -shares[token])[: sampling.top_k or None]
        total, found, kept = sum(shares[order]), 0.0, []
        for token in order:
            if found < sampling.top_p * total or sampling.top_p == 1:
                kept.append(token)
            found += shares[token]
        shares = np.array([s if t in kept and s >= sampling.min_p * shares[order[0]] else 0.0 for t, s in enumerate(shares)])
    return shares / shares.sum()


def history(rows: int, read=READ, wrote=WROTE) -> History:
    tokens, written = np.array([*read, *wrote, -1, VOCAB]), np.array([False] * len(read) + [True] * (len(wrote) + 2))
    one = begun(blank(1, VOCAB), 0, tokens, written)
    return jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), one)


def drawn_by(logits, wishes, keys, past=None):
    """`draw` of at most 16 rows, which it is given in one shape, so that one program is compiled."""
    spare = ROWS - len(wishes)
    logits = np.concatenate([logits, np.zeros((spare, VOCAB), np.float32)])
    past = blank(ROWS, VOCAB) if past is None else jax.tree.map(lambda a: jnp.pad(a, ((0, spare), (0, 0))), past)
    keys = jax.random.wrap_key_data(np.pad(jax.random.key_data(keys), ((0, spare), (0, 0))))
    return jax.tree.map(
        lambda a: np.asarray(a)[: len(wishes)], drawing(logits, knobs([*wishes, *[None] * spare], VOCAB), keys, past, top=3)
    )


def chi_squared(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    expected, found = len(tokens) * probabilities, np.bincount(tokens, minlength=VOCAB)
    assert not found[expected == 0].any()
    return float(((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum())


WISHES = {
    "nothing": Sampling(),
    "hot": Sampling(temperature=2.5),
    "cold": Sampling(temperature=0.5),
    "k": Sampling(top_k=3),
    "k of all": Sampling(top_k=100),
    "k 1": Sampling(top_k=1),
    "p": Sampling(top_p=0.7),
    "hot p": Sampling(temperature=2.0, top_p=0.7),
    "tiny p": Sampling(top_p=1e-42),
    "k p": Sampling(top_k=3, top_p=0.75),
    "min p": Sampling(min_p=0.2),
    "repetition": Sampling(repetition_penalty=1.8),
    "reward": Sampling(repetition_penalty=0.6),
    "presence": Sampling(presence_penalty=0.9),
    "frequency": Sampling(frequency_penalty=0.5),
    "wanted": Sampling(frequency_penalty=-0.4, presence_penalty=-0.1),
    "bias": Sampling(logit_bias=((2, 3.0), (1, -math.inf), (7, 4.0))),
    "greedy": Sampling(temperature=0.0, top_k=3, top_p=0.2),
    "greedy, repetition": Sampling(temperature=0.0, repetition_penalty=2.0),
    "all": FULL,
}


@pytest.mark.parametrize("name", WISHES)
def test_tokens_are_drawn_as_often_as_their_probability_says(name):
    """Rows of each wish beside rows of all others, so that a row's wish is its own."""
    names = list(WISHES)
    mixed = [names[i // 2 % len(names)] if i % 2 else name for i in range(DRAWS)]
    which = np.array([names.index(n) for n in mixed])
    wishes = jax.tree.map(lambda a: a[which], knobs([WISHES[n] for n in names], VOCAB))
    keys = jax.random.split(jax.random.key(names.index(name)), DRAWS)
    tokens = np.asarray(drawing(jnp.tile(LOGITS, (DRAWS, 1)), wishes, keys, history(DRAWS)).tokens)
    # The 0.9999 quantile of chi-squared with ten degrees of freedom is 35.6, and less with fewer.
    assert chi_squared(tokens[which == names.index(name)], distribution(WISHES[name])) < 35.6


def test_the_wishes_make_a_difference():
    """Else the tests of frequencies could not fail: pairs of distributions that must not be taken for one another."""
    tokens = np.random.default_rng(0).choice(VOCAB, DRAWS // 2, p=distribution(Sampling()))
    for name in ("hot", "cold", "repetition", "presence", "frequency", "wanted"):
        assert chi_squared(tokens, distribution(WISHES[name])) > 60, name
    # Of three tokens alone, the first two reach 0.75; of all, they do not.
    assert (distribution(WISHES["k p"]) > 0).sum() == 2 < (distribution(Sampling(top_p=0.75)) > 0).sum()


def test_tokens_of_many_blocks_are_drawn_as_often_as_their_probability_says():
    logits = np.random.default_rng(0).normal(size=700).astype(np.float32) * 2
    logits[300:420] = -np.inf  # whole blocks of nothing
    keys = jax.random.split(jax.random.key(1), 20_000)
    wishes = jax.tree.map(lambda a: np.repeat(a, len(keys), 0), knobs([Sampling()], 700))
    tokens = np.asarray(jax.jit(draw)(jnp.tile(logits, (len(keys), 1)), wishes, keys).tokens)
    expected = len(keys) * np.exp(logits - np.logaddexp.reduce(logits.astype(np.float64)))
    found = np.bincount(tokens, minlength=700)
    assert not found[300:420].any()
    rare = expected < 5
    found, expected = np.append(found[~rare], found[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    cells = len(found) - 1
    # Beyond five standard deviations of chi-squared.
    assert ((found - expected) ** 2 / expected).sum() < cells + 5 * math.sqrt(2 * cells)


numbers = st.floats(-8, 8, width=32)


@st.composite
def samplings(draw):
    bias = draw(st.dictionaries(st.integers(0, VOCAB - 1), numbers | st.just(-math.inf), max_size=4))
    return Sampling(
        temperature=draw(st.just(0.0) | st.floats(0.1, 5)),
        top_k=draw(st.integers(0, VOCAB)),
        top_p=draw(st.just(1.0) | st.floats(0.05, 0.99)),
        min_p=draw(st.just(0.0) | st.floats(0.01, 1)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.3, 3)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=tuple(bias.items()),
    )


def clear(sampling: Sampling, logits, read, wrote) -> bool:
    """Whether no token is so near to a threshold, or to another token, that fp32 may see it on the other side."""
    nudged = [
        Sampling(**{**vars(sampling), "top_p": min(1.0, sampling.top_p * (1 + e)), "min_p": min(1.0, sampling.min_p * (1 + e))})
        for e in (-1e-4, 1e-4)
    ]
    kept = [distribution(s, "truncated", logits, read, wrote) > 0 for s in nudged]
    tempered = distribution(Sampling(**{**vars(sampling), "temperature": 1.0}), "tempered", logits, read, wrote)
    some = np.sort(np.log(tempered[tempered > 0]))
    return np.array_equal(*kept) and (np.diff(some) > 1e-4).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_kind_of_log_probability_is_that_of_float64_with_a_sort(data):
    tokens = st.lists(st.integers(0, VOCAB - 1), max_size=4)
    rows = [
        (
            data.draw(samplings()),
            data.draw(st.lists(numbers, min_size=VOCAB, max_size=VOCAB, unique=True)),
            data.draw(tokens),
            data.draw(tokens),
        )
        for _ in range(2)
    ]
    logits = np.array([row[1] for row in rows], np.float32)
    past = jax.tree.map(lambda *a: jnp.concatenate(a), *(padded(read, wrote) for _, _, read, wrote in rows))
    for kind in KINDS:
        found = np.exp(np.asarray(telling(logits, knobs([row[0] for row in rows], VOCAB), past, kind=kind)).astype(np.float64))
        for row, (sampling, _, read, wrote) in enumerate(rows):
            if clear(sampling, logits[row], read, wrote):
                np.testing.assert_allclose(found[row], distribution(sampling, kind, logits[row], read, wrote), rtol=2e-4, atol=1e-6)


def padded(read: list[int], wrote: list[int]) -> History:
    tokens = np.full(8, -1, np.int32)
    tokens[: len(read)], tokens[4 : 4 + len(wrote)] = read, wrote
    return begun(blank(1, VOCAB), 0, tokens, np.arange(8) >= 4)


def test_it_is_what_transformers_logits_processors_make():
    cases = json.loads((Path(__file__).parent / "transformers_sampling.json").read_text())["cases"]
    vocab = len(cases[0]["logits"])
    seen = np.array([np.isin(np.arange(vocab), case["tokens"]) for case in cases])
    past = History(seen, np.zeros(seen.shape, np.int32))
    wishes = [Sampling(**case["sampling"] | {"logit_bias": tuple(map(tuple, case["sampling"].get("logit_bias", ())))}) for case in cases]
    found = telling(np.array([case["logits"] for case in cases], np.float32), knobs(wishes, vocab), past, kind="truncated")
    expected = [[-np.inf if value is None else value for value in case["log_probs"]] for case in cases]
    assert len({json.dumps(sorted(case["sampling"])) for case in cases}) > 8
    np.testing.assert_allclose(found, expected, atol=5e-6)


def mixed():
    wishes = [None, *list(WISHES.values())[-ROWS + 1 :]]
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    return logits, wishes, np.arange(ROWS, dtype=np.uint32) + 7, np.arange(ROWS) % 5


def test_a_rows_draw_depends_on_its_own_logits_wishes_and_key_alone():
    logits, wishes, seeds, drawn = mixed()
    keys, past = row_keys(seeds, drawn), history(ROWS)
    whole = drawn_by(logits, wishes, keys, past).tokens
    assert len(set(whole.tolist())) > 4
    for rows in ([5], [3, 1], list(range(15, -1, -1)), [0, 5, 5, 9]):
        some = jax.tree.map(lambda a, rows=np.array(rows): a[rows], (logits, keys, past))
        assert np.array_equal(drawn_by(some[0], [wishes[row] for row in rows], *some[1:]).tokens, whole[rows])
    # Nor on how many rows there are.
    some = jax.tree.map(lambda a: a[3:8], (logits, keys, past))
    assert np.array_equal(drawing(some[0], knobs(wishes[3:8], VOCAB), *some[1:]).tokens, whole[3:8])


def test_a_key_is_of_the_seed_and_of_how_many_tokens_were_drawn():
    keys = row_keys(np.array([3, 2**32 - 1], np.uint32), np.array([0, 9]))
    for found, seed, count in zip(keys, (3, 2**32 - 1), (0, 9), strict=True):
        assert np.array_equal(jax.random.key_data(found), jax.random.key_data(jax.random.fold_in(jax.random.key(seed), count)))


def test_one_program_serves_any_mix_and_another_the_likeliest_alone():
    logits, wishes, seeds, drawn = mixed()
    run = jax.jit(lambda *args: draw(*args, top=3))  # a function of its own: programs of one are counted together
    for some in (wishes, [None] * ROWS, [Sampling(log_probs="raw")] * ROWS, wishes[::-1], [FULL] * ROWS, [Sampling(0.0)] * ROWS):
        run(logits, knobs(some, VOCAB), row_keys(seeds, drawn), history(ROWS))
    assert run._cache_size() == 2


def test_the_likeliest_alone_is_drawn_without_a_branch():
    """A GPU waits for the host at each."""
    logits, _, seeds, drawn = mixed()
    plain, allowed = knobs([Sampling(0.0), None] * ROWS, VOCAB), (np.arange(VOCAB) % 3 > 0)[None]
    plain = jax.tree.map(lambda a: a[:ROWS], plain)
    assert plain.plain
    for other in ({"repetition_penalty": 2.0}, {"logit_bias": ((1, 1.0),)}, {"log_probs": "raw"}, {"temperature": 1.0}):
        assert not knobs([None, Sampling(**{"temperature": 0.0} | other)], VOCAB).plain
    for among in (None, allowed):
        args = row_keys(seeds, drawn), history(ROWS)
        found, told = (drawing(logits, k, *args, allowed=among, top=2) for k in (plain, plain.replace(plain=False)))
        jax.tree.map(np.testing.assert_array_equal, found, told)
        text = str(jax.make_jaxpr(lambda *a, among=among: draw(*a, allowed=among))(logits, plain, *args))
        assert "cond" not in text
        assert "while" not in text


def test_what_no_row_wishes_is_not_computed():
    """Bisection, noise and penalties stand in branches of the program: outside of them it has neither loops nor random bits."""
    logits, wishes, seeds, drawn = mixed()
    text = str(jax.make_jaxpr(lambda *a: draw(*a, top=3))(logits, knobs(wishes, VOCAB), row_keys(seeds, drawn), history(ROWS)).eqns)
    assert "while" in text
    names = {e.primitive.name for e in jax.make_jaxpr(lambda *a: draw(*a))(logits, knobs(wishes, VOCAB), row_keys(seeds, drawn)).eqns}
    assert "cond" in names
    assert not names & {"while", "sort", "top_k", "random_bits", "random_split", "exp", "scatter-add"}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_draws_are_those_of_the_one_function(kind):
    logits, wishes, seeds, drawn = mixed()
    wishes = [wish and Sampling(**{**vars(wish), "log_probs": kind if row % 3 else None}) for row, wish in enumerate(wishes)]
    past = history(ROWS)
    found = drawn_by(logits, wishes, row_keys(seeds, drawn), past)
    whole = np.asarray(telling(logits, knobs(wishes, VOCAB), past, kind=kind))
    if kind == "raw":
        np.testing.assert_allclose(whole, logits - np.logaddexp.reduce(logits.astype(np.float64), -1)[:, None], atol=1e-6)
    for row, wish in enumerate(wishes):
        asked = wish is not None and wish.log_probs is not None
        np.testing.assert_allclose(found.log_probs[row], whole[row, found.tokens[row]] if asked else 0.0, atol=1e-6)
        if asked:
            np.testing.assert_allclose(found.top_log_probs[row], np.sort(whole[row])[:-4:-1], atol=1e-6)
            np.testing.assert_allclose(whole[row, found.top_tokens[row]], found.top_log_probs[row], atol=1e-6)


def test_without_temperature_it_is_the_likeliest_token_whatever_the_key():
    rows = np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32)
    for seed in (0, 1):
        found = drawn_by(rows, [Sampling(0.0)] * 5, jax.random.split(jax.random.key(seed), 5)).tokens
        assert found.dtype == jnp.int32
        assert np.array_equal(found, rows.argmax(-1))
    told = telling(rows, knobs([Sampling(0.0)] * 5, VOCAB), kind="tempered")
    assert np.array_equal(told, np.where(np.arange(VOCAB) == rows.argmax(-1)[:, None], 0, -np.inf))


def test_a_temperature_may_be_as_small_as_it_likes():
    rows = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    found = drawn_by(rows, [Sampling(1e-12), Sampling(1e-39), Sampling(1e-300)], jax.random.split(jax.random.key(0), 3))
    assert np.array_equal(found.tokens, rows.argmax(-1))


def test_the_likeliest_is_the_first_of_equals_and_always_a_token():
    rows = np.array([[1, 3, 3, 0], [-np.inf, -np.inf, -2, -np.inf], [0, np.nan, 0, 0], [np.inf, 0, np.inf, 1]], np.float32)
    assert likeliest(rows).tolist() == [1, 2, 3, 0]


def test_only_what_is_allowed_is_drawn_and_the_models_own_log_probabilities_stay():
    allowed = np.zeros((1, VOCAB), bool)
    allowed[0, [2, 7]] = True
    wishes = knobs([Sampling(temperature=3.0, log_probs="raw")] * 64, VOCAB)
    logits = jnp.tile(LOGITS, (64, 1))
    found = drawing(logits, wishes, jax.random.split(jax.random.key(0), 64), allowed=allowed)
    assert set(found.tokens.tolist()) == {2, 7}
    raw = telling(logits, wishes, kind="raw")
    np.testing.assert_allclose(found.log_probs, np.asarray(raw)[np.arange(64), found.tokens], atol=1e-6)
    told = np.asarray(telling(logits, wishes, kind="truncated", allowed=allowed))
    assert np.isinf(told[0]).sum() == VOCAB - 2


def test_a_history_grows_by_the_tokens_of_rows_that_go_on_and_begins_anew():
    past = extended(extended(history(2), np.array([9, 9]), np.array([True, False])), np.array([9, 1]), np.array([True, True]))
    assert past.counts[0].tolist() == [WROTE.count(t) + 2 * (t == 9) for t in range(VOCAB)]
    assert past.counts[1].tolist() == [WROTE.count(t) + (t == 1) for t in range(VOCAB)]
    assert past.seen[1].tolist() == [t in (*READ, *WROTE) for t in range(VOCAB)]
    again = begun(past, 0, np.array([5, -1]), np.array([False, False]))
    assert np.flatnonzero(again.seen[0]).tolist() == [5]
    assert not again.counts[0].any()
    assert np.array_equal(again.counts[1], past.counts[1])


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0 .* and finite"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf must be finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be finite"),
        ({"seed": -1}, "seed=-1 must be at least 0 and below"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"log_probs": "cooked"}, "log_probs='cooked' must be one of raw, tempered, truncated"),
        ({"logit_bias": ((3, float("inf")),)}, "logit_bias of token 3 is inf"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "names a token twice"),
        ({"logit_bias": tuple((i, 1.0) for i in range(BIASES + 1))}, "logit_bias has 65 tokens; at most 64"),
    ],
)
def test_impossible_wishes_are_refused_by_value(wishes, said):
    with pytest.raises(ValueError, match=said) as error:
        Sampling(**wishes)
    assert "\n" not in str(error.value)


def test_wishes_that_a_vocabulary_cannot_meet_are_refused():
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"logit_bias has token {token}, outside the vocabulary of {VOCAB}"):
            knobs([None, Sampling(logit_bias=((token, 1.0),))], VOCAB)
    with pytest.raises(ValueError, match="bans each of the 2 tokens"):
        check(Sampling(logit_bias=((0, -math.inf), (1, -math.inf))), 2)
    with pytest.raises(ValueError, match="kind='cooked' must be one of"):
        log_probs(LOGITS[None], knobs([None], VOCAB), kind="cooked")
