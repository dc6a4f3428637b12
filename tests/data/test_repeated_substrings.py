"""Repeated substrings: what a brute force over all windows of tokens finds, to the byte, however the corpus is cut."""

import random
from itertools import pairwise

import numpy as np
import pytest
from duplicate_cases import documents, passages, ragged, verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data.clean import groups, runs
from lmx.data.clean.runs import repeated_runs
from lmx.data.clean.step import Change, Drop
from lmx.data.clean.substrings import PIECE, Substrings, tokens


def cut(corpus, length):
    """Of each document which of its items are in a window that occurred before and not in that first occurrence. By brute force."""
    seen, result = {}, []
    for document, items in enumerate(corpus):
        gone = [False] * len(items)
        for start in range(len(items) - length + 1):
            where, first = seen.setdefault(tuple(items[start : start + length]), (document, start))
            if (where, first) != (document, start):
                for place in range(max(start, first + length if where == document else 0), start + length):
                    gone[place] = True
        result.append(gone)
    return result


def as_mask(resolved, size):
    gone = [False] * size
    last = -1
    for first, end, _ in resolved.reshape(-1, 3).tolist():
        assert last < first < end <= size
        gone[first:end] = [True] * (end - first)
        last = end
    return gone


corpora = st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=8)


@given(corpora, st.integers(1, 6), st.integers(3, 9), st.integers(1, 30), st.booleans())
@settings(max_examples=150, deadline=None)
def test_runs_are_those_of_a_brute_force_whatever_fits_in_memory(corpus, length, block, bucket, collide):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "BLOCK", block)
        patch.setattr(groups, "BUCKET", bucket)
        patch.setattr(groups, "SCRATCH", 1)
        if collide:
            hashed = runs.windows
            patch.setattr(runs, "windows", lambda hashes, length: hashed(hashes, length) & np.uint64(3 << 61))
        found = repeated_runs(ragged(corpus), length)
    assert [as_mask(found[k], len(items)) for k, items in enumerate(corpus)] == cut(corpus, length)
    for k in range(len(corpus)):
        for first, _, source in found[k].reshape(-1, 3).tolist():
            window = corpus[k][first : first + length]
            assert source <= k
            assert source == k or any(corpus[source][at : at + len(window)] == window for at in range(len(corpus[source])))


@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" \n\0aé中“’😀")))
@settings(max_examples=300)
def test_tokens_are_the_text_and_equal_tokens_equal_bytes(text):
    data = text.encode()
    hashes, begins = tokens(data)
    pieces = [data[a:b] for a, b in pairwise([*begins, len(data)])] if data else []
    assert b"".join(pieces) == data
    assert all(1 <= len(piece) <= PIECE for piece in pieces)
    assert hashes.tolist() == [len(piece) << 56 | int.from_bytes(piece, "little") for piece in pieces]


def test_tokens():
    text = "Don’t say “naïve”, 中文 internationalisation!!\n\n  Привет"
    begins = [*tokens(text.encode())[1].tolist(), len(text.encode())]
    pieces = [text.encode()[a:b].decode(errors="replace") for a, b in pairwise(begins)]
    assert pieces == [
        "Don",
        "’",
        "t",
        " say",
        " “",
        "naïve",
        "”",
        ",",
        " 中",
        "文",
        " intern",
        "ational",
        "isation",
        "!",
        "!",
        "\n\n  П\ufffd",
        "\ufffdиве",
        "т",
    ]


def test_planted_passages_are_found_in_real_text_and_nothing_else():
    """Of plays: what is repeated in them as it is, is what the brute force says; then every plant and no other byte."""
    chance = random.Random(0)
    step = Substrings()
    texts = passages()
    plain = verdicts(step, texts)
    items = [step.extract(document).tolist() for document in documents(texts)]
    expected = cut(items, 50)
    resolved = step.resolve(ragged(items))
    assert [as_mask(resolved[k], len(line)) for k, line in enumerate(items)] == expected
    texts = [text for text, verdict in zip(texts, plain, strict=True) if verdict is None]
    plants, changed = {}, list(texts)
    for target in chance.sample(range(len(texts) // 2, len(texts)), 20):
        source = chance.randrange(len(texts) // 2)
        begins = tokens(texts[source].encode())[1]
        first = chance.randrange(len(begins) - 60)
        size = chance.choice([40, 49, 50, 51, 60])
        passage = texts[source].encode()[begins[first] : begins[first + size]].decode()
        place = chance.randrange(len(texts[target]))
        changed[target] = f"{texts[target][:place]}@{passage}\x01{texts[target][place:]}"  # signs, so that it is no longer than it is
        plants[target] = size >= 50
    for number, verdict in enumerate(verdicts(step, changed)):
        if not plants.get(number):
            assert verdict is None
        else:
            assert verdict.text.replace("@\x01", "") == texts[number]
            assert verdict.counts == {"repeated_substrings": 1}


def test_whole_characters_are_cut_and_what_is_empty_is_dropped():
    passage = "Жизнеописание"  # 26 bytes: pieces of seven end inside of letters
    assert verdicts(Substrings(length=3), [passage + " а", f"{passage}{passage[-1]} б", passage, "а " + passage]) == [
        None,
        Change("ниее б", {"repeated_substrings": 1}),
        Drop("repeated_substrings", 0),
        None,
    ]
    assert verdicts(Substrings(length=3), [passage, "Ц" + passage[1:]])[1] == Change("Цизн", {"repeated_substrings": 1})
    assert verdicts(Substrings(length=4, shortest=10), ["a b c d e f", "a b c d e and", "x"]) == [
        None,
        Drop("repeated_substrings", 0),
        None,
    ]
    odd = "\ud800 lone " * 3
    assert verdicts(Substrings(length=2), [odd, "1 " + odd])[1] == Change("1", {"repeated_substrings": 1})
    with pytest.raises(ValueError, match="length=0"):
        Substrings(length=0)
    assert len(Substrings().resolve(ragged([]))) == 0
