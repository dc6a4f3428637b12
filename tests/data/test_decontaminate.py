"""Decontamination: what shares an n-gram with a benchmark item by brute force, and what is left after the passage is cut."""

import pickle
import random

import pytest
from duplicate_cases import documents, passages

from lmx.data.clean.decontaminate import Decontaminate, numbered
from lmx.data.clean.hashing import fold
from lmx.data.clean.step import Change, Drop


def grams(text, length):
    words = fold(text).split()
    return {tuple(words[k : k + length]) for k in range(len(words) - length + 1)}


def shared(text, items, ngram, shortest):
    """Items that a text shares an n-gram with, or of which it has all words. By brute force."""
    found = []
    for task, name, item in items:
        length = min(ngram, len(fold(item).split()))
        if length >= shortest and grams(text, length) & grams(item, length):
            found.append(f"{task}/{name}")
    return ", ".join(found)


@pytest.mark.parametrize(("ngram", "shortest"), [(13, 8), (8, 8), (13, 3), (5, 1)])
def test_what_is_dropped_is_what_brute_force_drops(ngram, shortest):
    """Questions made of passages: some verbatim, some with a word exchanged every ten, some in capitals; of 2 to 40 words."""
    chance = random.Random(0)
    texts = passages()[:120]
    items = []
    for number in range(60):
        words = chance.choice(texts[:60]).split()
        first, size = chance.randrange(len(words) - 40), chance.randrange(2, 41)
        words = words[first : first + size]
        if number % 3 == 1:
            words[::10] = ["other"] * len(words[::10])
        items.append(("task" if number % 2 else "exam", str(number), " ".join(words).upper() if number % 3 == 2 else " ".join(words)))
    step = Decontaminate(iter(items), ngram=ngram, shortest=shortest)
    assert step == pickle.loads(pickle.dumps(step))
    assert {item[1] for item in step.unsearched} == {name for _, name, text in items if len(fold(text).split()) < shortest}
    found = 0
    for document in documents(texts):
        verdict, expected = step(document), shared(document.text, items, ngram, shortest)
        assert verdict == (Drop("contaminated", expected) if expected else None)
        found += bool(expected)
    assert found >= 10


def test_passages_are_cut_with_their_surroundings():
    question = "Which of the five moons that were seen in March is the one with the longest shadow?"
    before, after = "b" * 300, "“ä” " * 100
    text = f"{before} {question.upper()} {after}"
    step = Decontaminate(numbered({"moons": ["short one", question]}), cut=True, margin=50)
    (document,) = documents([text])
    verdict = step(document)
    start = text.index("WHICH")
    assert verdict == Change(
        text[: start - 50] + "\n\n" + text[start + len(question) - 1 + 50 :], {"contaminated": 1}, {"contamination": [["moons", "1"]]}
    )
    assert step.unsearched == [("moons", "0", "short one")]
    # All 13-grams of the question are one passage; what is left between two is too short to stay.
    twice, near, far = documents([f"{text} {text}", f"{question} {'c' * 120} {question}", f"{question} {'c' * 160} {question}"])
    assert step(twice).counts == {"contaminated": 2}
    assert step(near) == Drop("contaminated", "moons/1")
    assert step(far) == Change("c" * 63, {"contaminated": 2}, {"contamination": [["moons", "1"]]})
    assert Decontaminate(step.items, cut=True, passages=1)(twice) == Drop("contaminated", "moons/1")


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="shortest=9"):
        Decontaminate((), ngram=8, shortest=9)
    assert Decontaminate(())(documents(["a b c " * 20])[0]) is None
