"""Counts of identity terms, and who loses: against plain counting and scipy's statistics."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmx.data.clean.bias import TermCounts, count_terms, lower_tail, which_lose, wilson
from lmx.data.clean.identity_terms import TERMS

FEW = {
    "gender": ("woman|women", "man|men"),
    "ethnicity": ("black people|black woman|black man", "woman of colour"),
    "dialect": ("aae: ain't|aint", "aae: he be"),
}


def plainly(texts):
    """By one regular expression a form."""
    having, mentions = Counter(), Counter()
    for text in texts:
        found = Counter()
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text.lower().replace("\u2019", "'"))
        for group, entries in FEW.items():
            for entry in entries:
                forms = entry.split(": ")[-1].split("|")
                name = f"{group}/{entry.split('|')[0]}"
                for form in forms:
                    pattern = form.replace(" ", r"[\s\-\u2014]+")
                    times = len(re.findall(rf"(?<![\w']){pattern}(?![\w'])", text))
                    found[name] += times
                    found[group] += times
        found = +found
        having.update(found.keys())
        mentions.update(found)
    return TermCounts(len(texts), dict(having), dict(mentions))


PIECES = [
    "woman",
    "Women",
    "man",
    "a",
    "black",
    "people",
    "BLACK",
    "of",
    "colour",
    "ain't",
    "Ain\u2019t",
    "aint",
    "he",
    "be",
    "human",
    "woman's",
    "'man'",
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([" ", " ", "-", ", ", ". ", "\n", "\u2014"])), max_size=12), max_size=5
    )
)
def test_counts_equal_plain_ones_and_add_up(texts):
    texts = ["".join(word + apart for word, apart in text) for text in texts]
    counts = count_terms(texts, FEW)
    assert counts == plainly(texts)
    half = len(texts) // 2
    assert count_terms(texts[:half], FEW) + count_terms(texts[half:], FEW) == counts
    assert sum((count_terms([text], FEW) for text in texts), TermCounts()) == counts


def test_the_terms_of_the_literature():
    counts = count_terms(
        ["He be working late, y'all ain't finna go.", "An African-American woman and black men", "Straight on, the old black cat"]
    )
    assert counts.having == {
        "dialect": 1, "dialect/aae: he be": 1, "dialect/aae: y'all": 1, "dialect/aae: ain't": 1, "dialect/aae: finna": 1,
        "gender": 2, "gender/he": 1, "gender/woman": 1, "gender/man": 1,
        "ethnicity": 1, "ethnicity/african american": 1, "ethnicity/african": 1, "ethnicity/black people": 1,
            "nationality": 1, "nationality/american": 1,
    }  # fmt: skip
    for group in ("gender", "orientation", "religion", "ethnicity", "nationality", "disability", "age", "dialect"):
        for entry in TERMS[group]:
            name, form = f"{group}/{entry.split('|')[0]}", entry.split(": ")[-1].split("|")[-1]
            assert count_terms([f"Some {form.upper()}, then."]).mentions[name] == 1


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a": ("One",)}, "expected forms in lower case"),
        ({"a": ("one|",)}, "of words alone"),
        ({"a": ("one", "two|one")}, "'one' twice, in 'a/one' and 'a/two'"),
    ],
)
def test_terms_that_are_none(terms, message):
    with pytest.raises(ValueError, match=message):
        count_terms([], terms)


def test_intervals_and_tails_are_those_of_scipy():
    draw = random.Random(0)
    for _ in range(200):
        total = draw.choice([5, 40, 3000, 10**6])
        draws, marked = draw.randint(0, total), draw.randint(0, total)
        hits = draw.randint(max(0, draws + marked - total), min(draws, marked))
        hits = draw.choice([hits, int(stats.hypergeom.median(total, marked, draws))])
        expected = stats.hypergeom.cdf(hits, total, marked, draws)
        assert lower_tail(hits, draws, marked, total) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if draws:
            for level in (0.05, 0.01):
                low, high = stats.binomtest(hits, draws).proportion_ci(1 - level, "wilson")
                assert wilson(hits, draws, level) == pytest.approx((low, high), abs=1e-9)
    table = [[3, 17], [60, 40]]
    assert lower_tail(3, 20, 63, 120) == pytest.approx(stats.fisher_exact(table, "less").pvalue)


def thinned(seed, *, keep, keep_a=None, terms=40, documents=3000):
    """Counts before and after documents were dropped at random, those with term a more often."""
    draw = np.random.default_rng(seed)
    has = draw.random((documents, terms)) < np.linspace(0.3, 0.01, terms)
    chance = np.where(has[:, 0], keep if keep_a is None else keep_a, keep)
    stays = draw.random(documents) < chance
    names = [f"g/{i}" for i in range(terms)]
    return tuple(TermCounts(len(rows), dict(zip(names, rows.sum(0).tolist(), strict=True))) for rows in (has, has[stays]))


def test_who_loses_is_found_and_nobody_else_is_accused():
    accused = [len(which_lose(*thinned(seed, keep=0.6)).losing) > 0 for seed in range(200)]
    assert np.mean(accused) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)  # any of 40 terms, in 5 of 100 corpora at most
    for seed in range(20):
        losses = which_lose(*thinned(seed, keep=0.6, keep_a=0.48))
        assert losses.losing[0].term == "g/0" == losses.terms[0].term
        low, high = losses.terms[0].low, losses.terms[0].high
        assert low < losses.terms[0].rate < high < 0.56


def test_the_correction_is_holms():
    before, after = thinned(0, keep=0.6, keep_a=0.55)
    losses = which_lose(before, after)
    raw = {}
    for term, had in before.having.items():
        has = after.having.get(term, 0)
        raw[term] = stats.fisher_exact(
            [[has, had - has], [after.documents - has, before.documents - had - after.documents + has]], "less"
        ).pvalue
    order = sorted(raw, key=raw.get)
    adjusted = {term: max(min(1, raw[other] * (len(raw) - j)) for j, other in enumerate(order[: i + 1])) for i, term in enumerate(order)}
    assert {kept.term: pytest.approx(kept.p, rel=1e-6) for kept in losses.terms} == adjusted


def test_the_table_and_what_is_refused():
    before = TermCounts(1000, {"g/a": 100, "g/b": 50})
    losses = which_lose(before, TermCounts(800, {"g/a": 50, "g/b": 40}))
    lines = str(losses).splitlines()
    assert lines[0] == "800 of 1,000 documents kept, 80.0%; * loses more than the others (p < 0.05)"
    assert re.fullmatch(r"g/a +100 +50 +50\.0%\* +40\.4% to 59\.6%", lines[2])
    assert re.fullmatch(r"g/b +50 +40 +80\.0%  +67\.0% to 88\.8%", lines[3])
    assert which_lose(TermCounts(), TermCounts()).terms == ()
    with pytest.raises(ValueError, match="g/c: 1 documents after and 0 before"):
        which_lose(before, TermCounts(800, {"g/c": 1}))
    with pytest.raises(ValueError, match="all: 1001 documents after and 1000 before"):
        which_lose(before, TermCounts(1001, {}))
    with pytest.raises(ValueError, match="level=5 must be between 0 and 1"):
        which_lose(before, before, level=5)
