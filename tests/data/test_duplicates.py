"""Duplicates: groups are what a graph search finds, signatures estimate Jaccard similarity, and what is found follows the curve."""

import pickle
import random
import re
import unicodedata
from itertools import combinations

import numpy as np
import pytest
from duplicate_cases import documents, passages, ragged, verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data.clean import groups
from lmx.data.clean.exact import Exact
from lmx.data.clean.hashing import _is_apart, fold, joined, mix, spans, windows, words
from lmx.data.clean.minhash import MinHash, draw_s_curve, optimum, s_curve
from lmx.data.clean.paragraphs import Paragraphs
from lmx.data.clean.step import Change, Drop

# Hashes.


def plain(text):
    """Words without marks and symbols, another way: by Unicode's classes, character by character."""
    return re.sub(r"[^\w\s]|_", " ", text.casefold()).split()


def test_words_of_real_text_are_those_of_a_plain_split_and_no_two_hashes_agree():
    text = "\n".join(passages())
    split = plain(text)
    hashes = words(fold(text)).tolist()
    assert len(hashes) == len(split) > 30_000
    assert len(set(zip(hashes, split, strict=True))) == len(set(split)) == len(set(hashes))
    for length in (1, 2, 5, 8, 9, 13):
        grams = windows(np.array(hashes, np.uint64), length).tolist()
        real = list(zip(*(split[k:] for k in range(length)), strict=False))
        assert len(set(zip(grams, real, strict=True))) == len(set(real)) == len(set(grams))


@given(st.text(), st.integers(1, 20))
def test_any_text_folds_to_words_whose_places_are_known(text, length):
    folded = fold(text)
    assert len(spans(text)) == len(words(folded)) == len(folded.split())
    assert all(fold(text[a:b]).split() == [word] for (a, b), word in zip(spans(text), folded.split(), strict=True))
    assert len(windows(words(folded), length)) == (max(1, len(words(folded)) - length + 1) if folded.split() else 0)


@pytest.mark.parametrize(("lowercase", "punctuation"), [(True, True), (False, True), (True, False)])
def test_every_character_folds_by_the_plain_rule(lowercase, punctuation):
    """The short cuts that `fold` takes for texts without marks that combine change nothing, whatever stands beside a character."""

    def plainly(text):
        text = text.casefold() if lowercase else text
        text = "".join(" " if c > "\x7f" and _is_apart(c, punctuation) else c for c in text)
        text = re.sub(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]", r" \g<0> ", text)
        folded = "".join(" " if c < "\x80" and _is_apart(c, punctuation) else c for c in unicodedata.normalize("NFC", text))
        return (re.sub("[A-Z]", lambda letter: letter[0].lower(), folded) if lowercase else folded).encode().split()

    for character in map(chr, [*range(0x3100), 0xFB01, 0x1D400, 0x1F600]):
        text = f"A{character}E\u00e9  x{character}"
        folded = fold(text, lowercase, punctuation)
        assert folded.split() == plainly(text), hex(ord(character))
        assert joined(folded) == b" ".join(folded.split())


def test_folding():
    assert fold("“Don’t” SHOUT — x_y\u00a0ß Cafe\u0301\n").decode().split() == ["don", "t", "shout", "x", "y", "ss", "caf\u00e9"]
    assert fold("हिन्दी 中文。", lowercase=False).decode().split() == ["हिन्दी", "中", "文"]
    assert fold("\ud800é").decode(errors="surrogatepass").split() == ["\ud800é"]
    assert fold("A+b\u2003C", lowercase=False, punctuation=False).split() == [b"A+b", b"C"]


def test_long_texts_are_hashed_block_by_block_to_the_same(monkeypatch):
    folded = fold("\n".join(passages()))
    whole = words(folded)
    grams = windows(whole, 50)
    monkeypatch.setattr("lmx.data.clean.hashing.BLOCK", 997)
    np.testing.assert_array_equal(words(folded), whole)
    np.testing.assert_array_equal(windows(whole, 50), grams)


def test_mixing_is_a_bijection_and_hashes_stay_what_they_are():
    """Signatures of one run must be those of another, on any machine."""
    assert len(np.unique(mix(np.arange(1 << 16, dtype=np.uint64)))) == 1 << 16
    assert mix(np.array([1], np.uint64))[0] == 0x5692161D100B05E5  # SplitMix64's for this state, from its reference program
    assert words(b"of words")[1] == 8961204718324238762
    assert windows(words(b"a b c"), 2)[1] == 12388722372816246063
    assert MinHash().signature("to be or not to be")[0] == 1650340766


# Groups.


@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))),
    st.randoms(),
)
def test_components_are_those_of_a_graph_search_in_any_order_and_parts(case, chance):
    count, pairs = case
    reach = {node: {node} for node in range(count)}
    for left, right in pairs:
        union = reach[left] | reach[right]
        for node in union:
            reach[node] = union
    expected = [min(reach[node]) for node in range(count)]
    chance.shuffle(pairs)
    array = np.array([p[:: chance.choice((1, -1))] for p in pairs], np.int64).reshape(-1, 2)
    cut = chance.randint(0, len(pairs))
    assert groups.components(count, *array.T).tolist() == expected
    part = groups.components(count, *array[:cut].T)
    assert groups.components(count, *array[cut:].T, part).tolist() == expected


def test_a_long_chain_in_bad_order_is_one_component():
    chain = np.random.default_rng(0).permutation(100_000)
    assert not groups.components(len(chain), chain[1:], chain[:-1]).any()


@given(st.lists(st.integers(0, 9)))
def test_edges_of_keys_one_by_one_and_all_at_once(keys):
    by_key = {}
    for document, key in enumerate(keys):
        by_key.setdefault(key, []).append(document)
    expected = {edge for members in by_key.values() for edge in groups.edges(reversed(members))}
    first, again = groups.shared(np.array(keys, np.uint64))
    assert set(zip(first.tolist(), again.tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40)
def test_first_occurrences_with_few_keys_in_memory_and_colliding_hashes(values, bucket, step):
    values = np.array(values, np.int64)
    keys = mix((values % 4).astype(np.uint64))  # values that differ by 4 collide
    parts = [(np.arange(len(values))[at : at + step], keys[at : at + step]) for at in range(0, len(values), step)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "BUCKET", bucket)
        patch.setattr(groups, "SCRATCH", 1)
        found = groups.firsts(parts, len(values), len(values), lambda a, b: values[a] == values[b])
        assert groups.gathered(iter([values, values])).tolist() == [*values, *values]
    seen = {}
    assert found.tolist() == [seen[v] + 1 if v in seen else seen.update({v: n}) or 0 for n, v in enumerate(values.tolist())]


# Exact.


def test_exact_duplicates():
    texts = ["One day.", "one, DAY!", "", "one day two", "...", "One  day", "two"]
    assert verdicts(Exact(), texts) == [None, Drop("duplicate", 0), None, None, None, Drop("duplicate", 0), None]
    assert verdicts(Exact(punctuation=False), texts) == [None] * 7
    assert verdicts(Exact(lowercase=False, punctuation=False), ["A b", "A\nb", "a b"]) == [None, Drop("duplicate", 0), None]


# MinHash.


def grams(text, n):
    split = plain(text)
    return {tuple(split[k : k + n]) for k in range(len(split) - n + 1)}


def jaccard(a, b, n=5):
    a, b = grams(a, n), grams(b, n)
    return len(a & b) / len(a | b)


def varied(text, rate, chance):
    """With that share of its words exchanged."""
    return " ".join(f"other{chance.randrange(10**6)}" if chance.random() < rate else word for word in text.split())


def test_signatures_estimate_jaccard_without_bias_and_with_the_variance_of_independent_draws():
    chance = random.Random(1)
    errors = []
    pairs = [(text, varied(text, 0.3 * k / 20, chance)) for k, text in enumerate(passages()[:20])]
    for seed in range(30):
        step = MinHash(seed=seed)
        for a, b in pairs:
            s = jaccard(a, b)
            spread = (s * (1 - s) / 112) ** 0.5
            errors.append((np.mean(step.signature(a) == step.signature(b)) - s) / spread if spread else 0.0)
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5
    assert np.std([e for e in errors if e]) == pytest.approx(1, abs=4 / (2 * len(errors)) ** 0.5)


def test_what_is_found_follows_the_curve():
    """Real passages with planted near duplicates; every pair of the corpus against brute force."""
    chance = random.Random(2)
    texts = passages()[:60]
    texts += [varied(text, rate, chance) for text in texts for rate in (0.02, 0.05, 0.1)]
    sets = [grams(text, 5) for text in texts]
    similarity = {(a, b): s for a, b in combinations(range(len(texts)), 2) if (s := len(sets[a] & sets[b]) / len(sets[a] | sets[b])) > 0.02}
    assert len(similarity) >= 360
    found, likely = np.zeros(10), np.zeros(10)
    spread, unlike = np.zeros(10), 0
    for seed in range(6):
        step = MinHash(seed=seed)
        bands = [step.extract(document) for document in documents(texts)]
        for (a, b), s in similarity.items():
            bin_ = min(int(s * 10), 9)
            p = s_curve(s, 14, 8)
            found[bin_] += bool((bands[a] == bands[b]).any())
            likely[bin_] += p
            spread[bin_] += p * (1 - p)
        unlike += sum((bands[a] == bands[b]).any() for a, b in combinations(range(len(texts)), 2) if (a, b) not in similarity)
    assert unlike == 0
    assert (np.abs(found - likely) <= 4 * np.sqrt(spread) + 1e-3).all()
    assert likely[:3].sum() < 1
    assert (spread > 1).sum() >= 4


def test_the_first_of_a_chain_stays():
    text = passages()[0]
    chain = [text, "something else entirely", text + " and one more", text + " and one more, and two"]
    assert verdicts(MinHash(), chain) == [None, None, Drop("near_duplicate", 0), Drop("near_duplicate", 0)]
    assert verdicts(MinHash(), ["", "a b", "A, b.", "!", "b a"]) == [None, None, Drop("near_duplicate", 1), None, None]


def test_the_order_of_a_corpus_changes_only_who_is_first():
    chance = random.Random(3)
    texts = passages()[:50]
    texts += [varied(text, 0.03, chance) for text in texts]
    order = list(range(len(texts)))
    chance.shuffle(order)

    def clusters(order):
        given = verdicts(MinHash(), [texts[k] for k in order])
        heads = [verdict.value if verdict else place for place, verdict in enumerate(given)]
        return {frozenset(order[place] for place, h in enumerate(heads) if h == head) for head in heads}

    assert clusters(order) == clusters(range(len(texts)))


def test_long_documents_are_signed_block_by_block(monkeypatch):
    text = "\n".join(passages()[:20])
    whole = MinHash().signature(text)
    monkeypatch.setattr("lmx.data.clean.minhash._STEP", 100)
    np.testing.assert_array_equal(MinHash().signature(text), whole)


def test_bands_for_a_threshold():
    # As datasketch 2.0.0 has them.
    assert [optimum(t) for t in (0.3, 0.5, 0.7, 0.8, 0.9)] == [(37, 3), (25, 5), (14, 9), (9, 13), (5, 25)]
    assert optimum(0.8, 128, false_positives=0.01) == (18, 7)
    assert optimum(0.72, 112) == (12, 9)
    with pytest.raises(ValueError, match="threshold=1"):
        optimum(1.0)
    with pytest.raises(ValueError, match="bands=0"):
        MinHash(bands=0)


def test_the_curve_is_drawn(tmp_path):
    draw_s_curve(MinHash(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# Paragraphs.


def test_paragraphs():
    menu, notice = "Home | About | Contact", "All rights reserved."
    bodies = passages()[:3]
    bodies = [" ".join(body.split()) for body in bodies]
    texts = [
        f"{menu}\n{bodies[0]}\n---\n{notice}",
        f"---\n{menu.upper()}\n\n{bodies[1]}\n{notice}\n***",
        f"{notice}\n{menu}",
        f"{bodies[2]}\n{notice}\n{bodies[2]}",
    ]
    given = verdicts(Paragraphs(), texts)
    assert given == [
        None,
        Change(bodies[1], {"repeated_paragraphs": 2}),
        Drop("repeated_paragraphs", 0),
        Change(bodies[2], {"repeated_paragraphs": 2}),
    ]
    # Two at a time: neither stands beside what it stood beside before, but in the third.
    assert verdicts(Paragraphs(span=2), [*texts, f"x\n{notice}\n{menu}"]) == [None, None, None, None, Drop("repeated_paragraphs", 2)]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=6), max_size=6))
def test_paragraphs_are_those_that_a_set_has_not_seen(corpus):
    seen, expected = set(), []
    for lines in corpus:
        expected.append([line for line in lines if not (line in seen or seen.add(line))])
    given = verdicts(Paragraphs(shortest=0), ["\n".join(lines) for lines in corpus])
    left = [("\n".join(lines) if v is None else v.text) for v, lines in zip(given, corpus, strict=True)]
    assert left == ["\n".join(lines) for lines in expected]


@pytest.mark.parametrize("step", [Exact(), MinHash(), Paragraphs()])
def test_steps_can_be_pickled_and_take_an_empty_corpus(step):
    assert pickle.loads(pickle.dumps(step)) == step
    assert len(step.resolve(ragged([]))) == 0
    assert verdicts(step, ["", "", "   "]) == [None, None, None]
