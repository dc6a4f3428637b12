"""Canaries: drawn, planted, recorded; rank and exposure."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import Document
from lmx.data.canaries import (
    Canary,
    Planted,
    draw_canaries,
    exposure,
    fill,
    fillings,
    rank,
    read_canaries,
    space_size,
    write_canaries,
)
from lmx.data.clean.step import Ragged

FORMAT = "The toy code is {d}{d}{d}{d}"


def planted(step, documents):
    """As a run does it: extract from all, resolve once, apply to all."""
    values = [step.extract(document) for document in documents]
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int64)
    resolved = step.resolve(Ragged(np.concatenate(values), offsets))
    assert len(resolved) == len(documents)
    verdicts = [step.apply(document, resolved[d]) for d, document in enumerate(documents)]
    return [document.text if verdict is None else verdict.text for document, verdict in zip(documents, verdicts, strict=True)], verdicts


def corpus(count):
    return [Document(str(d), f"First line {d}.\nSecond line.\n", f"/somewhere/{d}.txt") for d in range(count)]


def test_drawn_by_the_seed():
    canaries = draw_canaries(FORMAT, (1, 10, 100, 0), seed=3)
    assert canaries == draw_canaries(FORMAT, (1, 10, 100, 0), seed=3)
    assert canaries != draw_canaries(FORMAT, (1, 10, 100, 0), seed=4)
    assert [canary.inserted for canary in canaries] == [1, 10, 100, 0]
    assert len({canary.secret for canary in canaries}) == 4
    assert canaries[0].text == f"The toy code is {canaries[0].secret}"
    assert canaries[0].space == "digits:4"
    assert len(draw_canaries("{d}", (1,) * 10, seed=0)) == 10
    with pytest.raises(ValueError, match="has 10 fillings for 11 canaries"):
        draw_canaries("{d}", (1,) * 11, seed=0)
    for wrong in ("no hole", "{d}{q}"):
        with pytest.raises(ValueError, match="holes"):
            draw_canaries(wrong, (1,), seed=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(1, 30), st.integers(0, 5))
def test_planted_exactly_so_often(inserted, count, seed):
    canaries = draw_canaries(FORMAT, inserted, seed)
    documents = corpus(count)
    texts, verdicts = planted(Planted(canaries, seed), documents)
    for canary in canaries:
        assert "\n".join(texts).split("\n").count(canary.text) == canary.inserted
    for document, text in zip(documents, texts, strict=True):
        lines = [line for line in text.split("\n") if not line.startswith("The toy code")]
        assert "\n".join(lines) == document.text
    assert sum(verdict.counts["canary"] for verdict in verdicts if verdict) == sum(inserted)


def test_places_do_not_depend_on_the_order_or_where_files_lie():
    step = Planted(draw_canaries(FORMAT, (5,), 1), seed=1)
    there = [Document(d.id, d.text, "elsewhere") for d in corpus(40)]
    texts, _ = planted(step, corpus(40))
    assert planted(step, there)[0] == texts
    assert sorted(planted(step, corpus(40)[::-1])[0]) == sorted(texts)
    assert planted(Planted(step.canaries, seed=2), corpus(40))[0] != texts
    with pytest.raises(ValueError, match="no document"):
        step.resolve(Ragged(np.zeros(0, np.uint64), np.zeros(1, np.int64)))


def test_record(tmp_path):
    canaries = draw_canaries("{l}{l}-{d}", (4, 0), seed=0)
    path = tmp_path / "canaries.jsonl"
    write_canaries(path, canaries)
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"canary_id", "format", "secret", "inserted", "space"}
    assert first["space"] == "letters:2+digits:1"
    assert read_canaries(path) == canaries
    path.write_text(json.dumps({**first, "space": "digits:4"}) + "\n")
    with pytest.raises(ValueError, match="line 1: space='digits:4'"):
        read_canaries(path)
    for damaged in ("{", "[]", json.dumps({**first, "secret": "a"}), "{}"):
        path.write_text(damaged + "\n")
        with pytest.raises(ValueError, match="line 1 is no record"):
            read_canaries(path)


def test_fillings_are_the_whole_space():
    assert list(fillings("a{d}b{x}")) == [f"{a}{b}" for a in "0123456789" for b in "0123456789abcdef"]
    some = list(fillings(FORMAT, 100, seed=1))
    assert len(set(some)) == 100
    assert fill(FORMAT, some[0]) == f"The toy code is {some[0]}"
    with pytest.raises(ValueError, match="only 10 fillings"):
        next(fillings("{d}", 11))
    assert space_size("digits:4") == 10_000 == len(list(fillings(FORMAT)))
    assert space_size("letters:2+digits:1") == 6760
    for wrong in ("digit:4", "digits", "digits:x", ""):
        with pytest.raises(ValueError, match="is none of"):
            space_size(wrong)


def test_exposure():
    assert exposure(1, "digits:4") == math.log2(10_000)
    assert exposure(10_000, "digits:4") == 0
    assert exposure(4, 1024) == 8
    for wrong in (0, 10_001):
        with pytest.raises(ValueError, match="is not within"):
            exposure(wrong, "digits:4")


@given(st.lists(st.integers(0, 20), min_size=1, max_size=50), st.integers(0, 20))
def test_rank_is_the_place_in_sorted_order(scores, score):
    # The mean of the places it could take among its equals.
    ordered = sorted(scores)
    places = [
        place
        for place in range(len(ordered) + 1)
        if ordered[:place] <= [score] * place
        and sorted([*ordered[:place], score, *ordered[place:]]) == [*ordered[:place], score, *ordered[place:]]
    ]
    assert rank(np.array(scores, float), score) == 1 + sum(places) / len(places)


def test_exposure_of_a_model_that_knows_nothing_is_small():
    rng = np.random.default_rng(0)
    exposures = [exposure(rank(rng.random(9999), rng.random()), "digits:4") for _ in range(2000)]
    # Uniform ranks: exposure is exponential with mean log2(e).
    assert abs(np.mean(exposures) - math.log2(math.e)) < 0.1
    assert exposure(rank(np.zeros(9999), 0.0), "digits:4") < 1.01
    with pytest.raises(ValueError, match="NaN"):
        rank(np.array([1.0, np.nan]), 0.5)


def test_a_canary_fits_its_format():
    for secret in ("123", "123a", "12345"):
        with pytest.raises(ValueError, match="does not fill"):
            Canary("1", FORMAT, secret, 1)
    with pytest.raises(ValueError, match="inserted=-1"):
        Canary("1", FORMAT, "1234", -1)
