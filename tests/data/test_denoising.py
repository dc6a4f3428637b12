"""Denoising objectives: what is corrupted can be filled again, and every text is what an independent NumPy version says."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from denoising_cases import BEGIN, CASES, END, EOS, ID, MASK, PIECE, SEED, SENTINELS, START, STOPS, TEXT, VOCAB, WORDS, R, S, X, case, make
from lmx.data import (
    BlankInfilling,
    Denoiser,
    MaskedLM,
    Mixture,
    PrefixLM,
    SpanCorruption,
    TextInfilling,
    ul2,
)
from lmx.data.corruption import Draws, composition, corrupt, poisson

# Filling: the original text from a row alone.


def pairs(row):
    """Source and target of each segment, as a reader of the row alone sees them."""
    for segment in range(1, row["segments"].max() + 1):
        at = row["segments"] == segment
        if "decoder_tokens" in row:
            yield row["tokens"][at].tolist(), row["targets"][row["decoder_segments"] == segment].tolist()
        else:
            known = row["tokens"][at & (row["prefix"] == 1)].tolist()
            yield known, row["targets"][at & (row["weights"] == 1)].tolist()


def without(line, before, after):
    assert before is None or line[0] == before
    assert after is None or line[-1] == after
    return line[before is not None : len(line) - (after is not None)]


def fill_sentinels(source, target):
    answers = {}
    for token in target:
        if token in SENTINELS:
            answers[last := token] = []
        else:
            answers[last].append(token)
    filled = []
    for token in source:
        filled += answers.pop(token) if token in SENTINELS else [token]
    assert not answers
    return filled


def fits_pattern(source, text):
    """Whether replacing each mask by some tokens turns the source into the text: matching of patterns with stars."""
    ends = {0}
    for token in source:
        if token == MASK:
            ends = set(range(min(ends), len(text) + 1)) if ends else ends
        else:
            ends = {end + 1 for end in ends if end < len(text) and text[end] == token}
    return len(text) in ends


def fill(objective, row):
    """The texts that a row was made of."""
    match objective:
        case MaskedLM():
            for segment in range(1, row["segments"].max() + 1):
                at = row["segments"] == segment
                yield without(np.where(row["weights"] == 1, row["targets"], row["tokens"])[at].tolist(), objective.begin, objective.eos)
        case BlankInfilling():
            for segment in range(1, row["segments"].max() + 1):
                at = row["segments"] == segment
                spans, text = {}, []
                for token, target, place, block in zip(
                    *(row[field][at].tolist() for field in ("tokens", "targets", "positions", "block_positions")), strict=True
                ):
                    if not block:
                        text.append(token)
                        continue
                    known = spans.setdefault(place, [])
                    assert block == len(known) + 1
                    assert token == (known[-1] if known else PIECE)
                    known.append(target)
                assert sorted(spans) == [i for i, token in enumerate(text) if token == MASK]
                yield [token for i, other in enumerate(text) for token in (without(spans[i], None, END) if i in spans else [other])]
        case _:
            source_end = objective.eos if objective.form == "encoder_decoder" else None
            for source, target in pairs(row):
                begin = objective.begin if isinstance(objective, TextInfilling) else None
                source, target = without(source, begin, source_end), without(target, begin, objective.eos)
                if isinstance(objective, TextInfilling):
                    yield target
                    continue
                if isinstance(objective, Mixture):
                    assert source[0] in (R, S, X)
                    mode, source = source[0], source[1:]
                    assert (mode == S) == (target[0] not in SENTINELS)
                yield fill_sentinels(source, target) if target[0] in SENTINELS else source + target


@case
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), example_id=ID, seed=SEED)
def test_corrupt_then_fill_gives_the_text(name, texts, example_id, seed):
    """And packing several texts changes nothing: each is alone in its segment."""
    row = make(name, texts, example_id, seed)
    assert list(fill(CASES[name], row)) == [text.tolist() for text in texts]


@settings(deadline=None, max_examples=60)
@given(text=TEXT, example_id=ID)
def test_infilled_source_is_the_permuted_text_with_spans_left_out(text, example_id):
    source, _ = next(pairs(make("infilling", [text], example_id)))
    source = without(source, BEGIN, EOS)
    objective = CASES["infilling"]
    masked, most = objective.counts(len(text))
    masks = source.count(MASK)
    assert len(source) == len(text) - masked + masks
    assert 1 <= masks <= most
    assert not any(a == b == MASK for a, b in pairwise(source))
    # no more of any token than the text has, and the masks stand for exactly the rest
    assert Counter(token for token in source if token != MASK) <= Counter(text.tolist())
    order = Draws(0, example_id).permutation(len(sentences(text)))
    assert fits_pattern(source, [token for i in order for token in sentences(text)[i]])


def sentences(text):
    parts = [[]]
    for token in text.tolist():
        parts[-1].append(token)
        if token in STOPS:
            parts.append([])
    return [part for part in parts if part]


# Independent versions: loops over lists, from the same raw random numbers.


def raw(example_id, seed=0, nth=0):
    """The generator from its definition: 64 random bits at a time."""
    bits = np.random.Philox(key=np.array([seed, example_id], np.uint64), counter=np.array([0, 0, nth, 2], np.uint64))
    return lambda count: [int(x) for x in bits.random_raw(count)]


def unit(x):
    return (x >> 11) / 2**53


def order_of(numbers):
    return [i for _, i in sorted((x, i) for i, x in enumerate(numbers))]


def segment_lengths(total, parts, bits):
    """T5's random segmentation: which of the items after the first begin a part."""
    begins = set(order_of(bits(total - 1))[: parts - 1])
    lengths = [1]
    for i in range(total - 1):
        if i in begins:
            lengths.append(1)
        else:
            lengths[-1] += 1
    return lengths


def reference_spans(text, density, mean, bits):
    n = len(text)
    noise = min(max(int(np.round(n * density)), 1), n - 1)
    spans = min(max(int(np.round(noise / mean)), 1), noise, n - noise)
    noise_lengths = segment_lengths(noise, spans, bits)
    kept_lengths = segment_lengths(n - noise, spans, bits)
    source, target, rest = [], [], text.tolist()
    for sentinel, kept, taken in zip(SENTINELS, kept_lengths, noise_lengths, strict=False):
        source += [*rest[:kept], sentinel]
        target += [sentinel, *rest[kept : kept + taken]]
        rest = rest[kept + taken :]
    assert not rest
    return source, target


def reference_poisson(mean, least, u):
    """The smallest k whose distribution function exceeds u, by summing the textbook's formula."""
    terms = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(200)]
    mass = 1 - sum(terms[:least])
    total = 0.0
    for k in range(least, 200):
        total += terms[k] / mass
        if u < total:
            return k
    raise AssertionError(u)


def reference_gaps(n, rate, mean, least, bits):
    """For each gap between kept tokens the length of its span, and how many tokens are kept."""
    masked = min(max(int(np.round(n * rate)), 1), n - 1)
    most = min(masked, n - masked + 1, int((masked + 3 * masked**0.5) / mean) + 2)
    lengths = []
    for x in bits(most):
        lengths.append(min(reference_poisson(mean, least, unit(x)), masked - sum(lengths)))
        if sum(lengths) == masked:
            break
    lengths[-1] += masked - sum(lengths)
    gaps = sorted(order_of(bits(n - masked + 1))[: len(lengths)])
    return dict(zip(gaps, lengths, strict=True)), n - masked


def reference_walk(text, spans, kept):
    """The text with masks, and the tokens of each span by its mask's place."""
    rest, known, taken = list(text), [], {}
    for gap in range(kept + 1):
        if gap in spans:
            taken[len(known)] = rest[: spans[gap]]
            known.append(MASK)
            rest = rest[spans[gap] :]
        if gap < kept:
            known.append(rest.pop(0))
    assert not rest
    return known, taken


@settings(deadline=None, max_examples=100)
@given(text=TEXT, example_id=ID, density=st.sampled_from([0.05, 0.15, 0.5, 0.8]), mean=st.sampled_from([1, 2.5, 3, 64]))
def test_span_corruption_is_t5s(text, example_id, density, mean):
    objective = SpanCorruption(SENTINELS, EOS, START, density, mean)
    source, target = reference_spans(text, density, mean, raw(example_id))
    columns = corrupt(objective, text, Draws(0, example_id))
    assert columns["tokens"].tolist() == [*source, EOS]
    assert columns["targets"].tolist() == [*target, EOS]
    assert columns["decoder_tokens"].tolist() == [START, *target]
    assert (len(source) + 1, len(target) + 1) == objective.sizes(len(text))
    line = [*source, *target, EOS]
    columns = corrupt(SpanCorruption(SENTINELS, EOS, None, density, mean, "prefix"), text, Draws(0, example_id))
    assert columns["tokens"].tolist() == line[:-1]
    assert columns["targets"].tolist() == line[1:]
    assert columns["prefix"].tolist() == [1] * len(source) + [0] * len(target)
    assert columns["weights"].tolist() == [0] * (len(source) - 1) + [1] * (len(target) + 1)


@settings(deadline=None, max_examples=60)
@given(text=TEXT, example_id=ID, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_prefix_lm(text, example_id, shares):
    n, (least, most) = len(text), shares
    allowed = [p for p in range(1, n) if math.floor(least * n) <= p <= most * n] or [min(max(math.floor(least * n), 1), n - 1)]
    cut = allowed[int(unit(raw(example_id)(1)[0]) * len(allowed))]
    columns = corrupt(PrefixLM(least=least, most=most), text, Draws(0, example_id))
    assert columns["tokens"].tolist() == text[:-1].tolist()
    assert columns["targets"].tolist() == text[1:].tolist()
    assert columns["prefix"].tolist() == [int(i < cut) for i in range(n - 1)]
    assert columns["weights"].tolist() == [int(i + 1 >= cut) for i in range(n - 1)]
    columns = corrupt(PrefixLM("encoder_decoder", least, most, None, START), text, Draws(0, example_id))
    assert columns["tokens"].tolist() == text[:cut].tolist()
    assert columns["decoder_tokens"].tolist() == [START, *text[cut:-1].tolist()]
    assert columns["targets"].tolist() == text[cut:].tolist()


@settings(deadline=None, max_examples=100)
@given(text=TEXT, example_id=ID, whole=st.booleans(), rate=st.sampled_from([0.01, 0.15, 0.6]))
def test_masked_lm(text, example_id, whole, rate):
    words = []
    for i, token in enumerate(text.tolist()):
        if i and whole and not WORDS[token]:
            words[-1].append(i)
        else:
            words.append([i])
    bits, budget, chosen = raw(example_id), max(int(np.round(rate * len(text))), 1), []
    order = order_of(bits(len(words)))
    for w in order:
        if len(chosen) + len(words[w]) <= budget:
            chosen += words[w]
    chosen = sorted(chosen or words[order[0]])
    expected = text.tolist()
    for i, fate, other in zip(chosen, bits(len(chosen)), bits(len(chosen)), strict=True):
        if unit(fate) < 0.1:
            expected[i] = int(unit(other) * VOCAB)
        elif unit(fate) >= 0.2:
            expected[i] = MASK
    objective = MaskedLM(MASK, VOCAB, rate, whole_word=whole, begin=BEGIN, eos=EOS)
    columns = corrupt(objective, text, Draws(0, example_id), words=WORDS)
    assert columns["tokens"].tolist() == [BEGIN, *expected, EOS]
    assert columns["targets"].tolist() == [BEGIN, *text.tolist(), EOS]
    assert np.flatnonzero(columns["weights"]).tolist() == [i + 1 for i in chosen]


@settings(deadline=None, max_examples=100)
@given(text=TEXT, example_id=ID, rate=st.sampled_from([0.05, 0.3, 0.8]), mean=st.sampled_from([1, 3, 8.5]))
def test_text_infilling(text, example_id, rate, mean):
    bits, parts = raw(example_id), sentences(text)
    permuted = [token for i in order_of(bits(len(parts))) for token in parts[i]]
    source, _ = reference_walk(permuted, *reference_gaps(len(text), rate, mean, 0, bits))
    columns = corrupt(TextInfilling(MASK, EOS, START, BEGIN, STOPS, rate, mean), text, Draws(0, example_id))
    assert columns["tokens"].tolist() == [BEGIN, *source, EOS]
    assert columns["targets"].tolist() == [BEGIN, *text.tolist(), EOS]
    assert columns["decoder_tokens"].tolist() == [START, BEGIN, *text.tolist()]


@settings(deadline=None, max_examples=100)
@given(text=TEXT, example_id=ID, rate=st.sampled_from([0.05, 0.15, 0.8]), mean=st.sampled_from([1, 3, 8.5]))
def test_blank_infilling(text, example_id, rate, mean):
    bits = raw(example_id)
    known, taken = reference_walk(text.tolist(), *reference_gaps(len(text), rate, mean, 1, bits))
    expected = [(token, 0, 0, place, 0, 1) for place, token in enumerate(known)]
    places = sorted(taken)
    for i in order_of(bits(len(places))):
        span, place = taken[places[i]], places[i]
        expected += [(a, b, 1, place, block, 0) for block, (a, b) in enumerate(zip([PIECE, *span], [*span, END], strict=True), 1)]
    columns = corrupt(BlankInfilling(MASK, PIECE, END, rate, mean), text, Draws(0, example_id))
    fields = ("tokens", "targets", "weights", "positions", "block_positions", "prefix")
    assert list(zip(*(columns[field].tolist() for field in fields), strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(text=TEXT, example_id=ID)
def test_mixture_is_one_of_its_denoisers(text, example_id):
    parts = (
        Denoiser(SpanCorruption(SENTINELS, EOS, START), R, rate=1),
        Denoiser(PrefixLM("encoder_decoder", 0.5, 1, EOS, START), None, rate=2),
        Denoiser(SpanCorruption(SENTINELS, EOS, START, 0.5, 8), X, rate=5),
    )
    draws = Draws(0, example_id)
    which = (np.arange(8) >= np.array([1, 3])[:, None]).sum(0)[int(draws.uniform(1)[0] * 8)]
    alone = corrupt(parts[which].objective, text, draws)
    mixed = corrupt(Mixture(parts), text, Draws(0, example_id))
    mode = [] if parts[which].mode is None else [parts[which].mode]
    assert mixed["tokens"].tolist() == mode + alone["tokens"].tolist()
    assert mixed["positions"].tolist() == list(range(len(mixed["tokens"])))
    for field in ("targets", "decoder_tokens", "weights"):
        assert np.array_equal(mixed[field], alone[field])


# Statistics


def test_shares_of_masked_lm():
    objective, n, rows = MaskedLM(MASK, VOCAB), 200, 600
    text = np.full(n, 300)
    fates, places = Counter(), np.zeros(n)
    for i in range(rows):
        columns = corrupt(objective, text, Draws(1, i))
        masked = columns["weights"] > 0
        assert masked.sum() == 30
        places += masked
        fates.update("mask" if t == MASK else "same" if t == 300 else "other" for t in columns["tokens"][masked])
    total = 30 * rows
    for fate, share in (("mask", 0.8), ("same", 0.1 + 0.1 / VOCAB), ("other", 0.1 - 0.1 / VOCAB)):
        share += {"mask": 0.1 / VOCAB}.get(fate, -0.1 / VOCAB if fate == "other" else 0)  # a random token may be the mask
        assert abs(fates[fate] - share * total) < 5 * math.sqrt(share * (1 - share) * total)
    # every place is as likely as any other: chi squared with n - 1 degrees of freedom, thinned
    expected = rows * 0.15
    assert abs(((places - expected) ** 2 / (expected * 0.85)).sum() - n) < 6 * math.sqrt(2 * n)


def test_t5s_spans():
    objective, n = SpanCorruption(tuple(range(1000, 1100)), 0, 0), 568
    assert objective.counts(n) == (85, 28)
    lengths, kept = Counter(), np.zeros(n)
    for i in range(400):
        columns = corrupt(objective, np.arange(n), Draws(0, i))
        target = columns["targets"][:-1]
        spans = np.diff(np.flatnonzero(target >= 1000), append=len(target)) - 1
        lengths.update(spans.tolist())
        kept[columns["tokens"][columns["tokens"] < n]] += 1
    assert sum(k * v for k, v in lengths.items()) / sum(lengths.values()) == 85 / 28
    # a part of a random composition of 85 into 28 is 1 with probability 27 / 84
    share, total = 27 / 84, 400 * 28
    assert abs(lengths[1] - share * total) < 5 * math.sqrt(share * (1 - share) * total)
    assert abs(kept[100:500].mean() / 400 - (1 - 85 / 568)) < 0.01


def test_compositions_are_uniform():
    seen = Counter(tuple(composition(6, 3, Draws(0, i)).tolist()) for i in range(5000))
    assert len(seen) == math.comb(5, 2)
    assert all(sum(parts) == 6 and min(parts) > 0 for parts in seen)
    assert sum((count - 500) ** 2 / 500 for count in seen.values()) < 30  # chi squared with 9 degrees of freedom


@pytest.mark.parametrize(("mean", "least"), [(3.0, 0), (3.0, 1), (1.0, 1), (64.0, 0), (900.0, 0)])
def test_poisson(mean, least):
    numbers = poisson(mean, least, Draws(0, 0).uniform(40_000))
    mass = 1 - math.exp(-mean) if least else 1
    expected = mean / mass
    variance = (mean + mean**2) / mass - expected**2
    assert numbers.min() >= least
    assert abs(numbers.mean() - expected) < 5 * math.sqrt(variance / 40_000)
    assert abs(numbers.var() / variance - 1) < 0.05


def test_spans_of_infilling():
    """Of BART: 30% masked, a mask for 3 tokens on average, 1 in 20 for none; of GLM: 15%, 3 / (1 - exp(-3)) tokens."""
    text = np.arange(1000, 1600)
    masks, empty = 0, 0
    for i in range(200):
        source = corrupt(TextInfilling(MASK, start=0), text, Draws(0, i))["tokens"]
        assert (source != MASK).sum() == 420
        at = np.flatnonzero(source == MASK)
        masks += len(at)
        before, after = np.append(999, source)[at], np.append(source, 1600)[at + 1]
        empty += (after == before + 1).sum()
    assert abs(180 * 200 / masks - 3) < 0.1
    assert abs(empty / masks - math.exp(-3)) < 0.01
    pieces = [corrupt(BlankInfilling(MASK, PIECE, END), text, Draws(0, i)) for i in range(200)]
    spans = sum((columns["tokens"] == PIECE).sum() for columns in pieces)
    assert {int(columns["weights"].sum() - (columns["tokens"] == PIECE).sum()) for columns in pieces} == {90}
    assert abs(90 * 200 / spans - 3 / (1 - math.exp(-3))) < 0.1


def test_prefixes_are_uniform():
    cuts = Counter(int(corrupt(PrefixLM(), np.arange(11), Draws(0, i))["prefix"].sum()) for i in range(5000))
    assert sorted(cuts) == list(range(1, 11))
    assert sum((count - 500) ** 2 / 500 for count in cuts.values()) < 30


def test_ul2_uses_its_denoisers_equally():
    objective = ul2(sentinels=tuple(range(1000, 1200)), modes=(R, S, X), eos=EOS, start=START)
    modes = Counter(int(corrupt(objective, np.arange(200, 400), Draws(0, i))["tokens"][0]) for i in range(2100))
    for mode, count in ((R, 600), (S, 300), (X, 1200)):
        assert abs(modes[mode] - count) < 5 * math.sqrt(count)
