"""Denoising objectives: what is corrupted can be filled again, and every row is what an independent NumPy version says."""

import functools
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core import config
from lmx.data import (
    OBJECTIVES,
    BlankInfilling,
    ByteTokenizer,
    DenoisedBatches,
    Denoiser,
    Document,
    MaskedLM,
    Mixture,
    Objective,
    PrefixLM,
    SpanCorruption,
    TextInfilling,
    batch_hash,
    build_store,
    denoise,
    explain,
    iterate,
    ul2,
    word_starts,
)
from lmx.data.corruption import Draws, composition, corrupt, poisson
from lmx.data.denoised import plan_texts
from lmx.data.denoising import check, fit

VOCAB, FIRST = 400, 100  # ids from FIRST on are text
START, EOS, BEGIN, MASK, PIECE, END, R, S, X = range(1, 10)
STOPS = (101, 102)
SENTINELS = tuple(range(99, 19, -1))
WORDS = np.arange(VOCAB) % 3 != 0  # which ids begin a word

CASES = {
    "prefix": PrefixLM(),
    "prefix_eos": PrefixLM(eos=EOS, least=0.2, most=0.7),
    "prefix_two_sides": PrefixLM(form="encoder_decoder", eos=EOS, start=START),
    "masked": MaskedLM(mask=MASK, vocab=VOCAB),
    "masked_words": MaskedLM(mask=MASK, vocab=VOCAB, rate=0.3, whole_word=True, begin=BEGIN, eos=EOS),
    "spans": SpanCorruption(SENTINELS, EOS, START),
    "spans_dense": SpanCorruption(SENTINELS, EOS, START, density=0.5, mean_span=1.5),
    "spans_prefix": SpanCorruption(SENTINELS, EOS, density=0.3, mean_span=2, form="prefix"),
    "infilling": TextInfilling(MASK, EOS, EOS, BEGIN, STOPS),
    "infilling_prefix": TextInfilling(MASK, EOS, sentence_ends=STOPS, rate=0.6, mean_span=1.2, form="prefix"),
    "blanks": BlankInfilling(MASK, PIECE, END),
    "blanks_dense": BlankInfilling(MASK, PIECE, END, rate=0.7, mean_span=1),
    "ul2": ul2(sentinels=SENTINELS, modes=(R, S, X), eos=EOS, start=START),
    "ul2_prefix": ul2(sentinels=SENTINELS, modes=(R, S, X), eos=EOS, form="prefix"),
}
case = pytest.mark.parametrize("name", CASES)
TEXT = st.lists(st.integers(FIRST, FIRST + 30), min_size=2, max_size=80).map(np.array)
SEED, ID = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


def make(name, texts, example_id=3, seed=0, padding=0, **options):
    """A row that is as long as the objective says that its texts may need, and some padding."""
    objective = CASES[name]
    need = [objective.sizes(len(text)) for text in texts]
    sizes = {"length": sum(first for first, _ in need) + padding}
    if any(second for _, second in need):
        sizes["decoder_length"] = sum(second for _, second in need) + padding
    return denoise(objective, example_id, texts, **{"seed": seed, "words": WORDS, **sizes, **options})


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


# Rows


@case
def test_fields_and_packing(name):
    """A row of three texts is three rows of one, but for what chance a text has by its place."""
    texts = [np.arange(FIRST, FIRST + n) for n in (30, 12, 50)]
    row = make(name, texts, padding=3)
    two = "decoder_tokens" in row
    length, decoder = row["tokens"].shape, row["targets"].shape
    expected = dict.fromkeys(("tokens", "segments", "positions"), (np.int32, length))
    expected |= {"targets": (np.int32, decoder), "weights": (np.float32, decoder), "example_id": (np.uint32, ())}
    if two:
        expected |= dict.fromkeys(("decoder_tokens", "decoder_segments", "decoder_positions"), (np.int32, decoder))
    elif not name.startswith("masked"):
        expected["prefix"] = (np.int32, length)
    if name.startswith("blanks"):
        expected["block_positions"] = (np.int32, length)
    assert {field: (a.dtype, a.shape) for field, a in row.items()} == expected
    for nth, text in enumerate(texts):
        columns = corrupt(CASES[name], text, Draws(0, 3, nth), words=WORDS)
        for field, values in columns.items():
            segments = row["decoder_segments" if two and field not in ("tokens", "positions") else "segments"]
            assert row[field][segments == nth + 1].tolist() == values.tolist()
    encoder = {"tokens", "segments", "positions"} if two else set(row) - {"example_id"}
    for side, fields in (("", encoder), ("decoder_", set(row) - encoder - {"example_id"})):
        if not fields:
            continue
        segments = row[f"{side}segments"]
        real = np.count_nonzero(segments)
        assert real < len(segments)
        assert (np.diff(segments[:real]) >= 0).all()
        assert not any(row[field][real:].any() for field in fields)
    if two:
        for segment in (1, 2, 3):
            at = row["decoder_segments"] == segment
            assert row["decoder_tokens"][at].tolist() == [CASES[name].start, *row["targets"][at][:-1].tolist()]
            assert row["weights"][at].all()


@case
def test_rows_are_functions_of_seed_and_example(name):
    texts = [np.arange(FIRST, FIRST + 60)] * 2

    def key(**options):
        return batch_hash({k: v for k, v in make(name, texts, **options).items() if k != "example_id"})

    assert key() == key()
    assert len({key(), key(seed=1), key(seed=2**64 - 1), key(example_id=4), key(example_id=2**32 - 1)}) == 5
    # the same text twice in a row is corrupted in two ways
    first, second = (corrupt(CASES[name], texts[0], Draws(0, 3, nth), words=WORDS) for nth in (0, 1))
    assert any(first[field].tolist() != second[field].tolist() for field in first)


def test_draws_are_fixed_for_ever():
    draws = Draws(7, 3)
    assert draws.permutation(6).tolist() == [4, 2, 1, 0, 5, 3]
    assert draws.below(1000, 4).tolist() == [300, 618, 641, 920]
    assert Draws(7, 3, 1).below(1000, 4).tolist() != Draws(7, 3).below(1000, 4).tolist()


@case
@settings(deadline=None, max_examples=30)
@given(length=st.integers(12, 300), extra=st.integers(0, 100))
def test_fit_takes_the_longest_text(name, length, extra):
    objective = CASES[name]
    two = getattr(objective, "form", "") == "encoder_decoder"
    text, decoder = fit(objective, length)
    sizes = [objective.sizes(n) for n in range(2, 3 * length)]
    assert sizes == sorted(sizes)
    assert [second for _, second in sizes] == sorted(second for _, second in sizes)
    assert text == max(n for n, (first, _) in enumerate(sizes, 2) if first <= length)
    assert decoder == sizes[text - 2][1]
    if two:
        both = fit(objective, length, decoder_length := 8 + extra)
        fitting = [n for n, (first, second) in enumerate(sizes, 2) if first <= length and second <= decoder_length]
        assert both == (max(fitting), decoder_length)


@pytest.mark.parametrize(("length", "text", "targets"), [(512, 568, 114), (1024, 1137, 229), (256, 284, 58)])
def test_lengths_are_t5s(length, text, targets):
    """What T5's own `random_spans_helper` gives for density 0.15 and spans of 3; 512 and 568 are in its configs."""

    def helper(tokens):
        noise = round(tokens * 0.15)
        spans = round(noise / 3.0)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = length
    while helper(tokens + 1)[0] <= length:
        tokens += 1
    assert fit(SpanCorruption(SENTINELS, EOS, START), length) == (tokens, helper(tokens)[1]) == (text, targets)


@case
@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=3), example_id=ID)
def test_nothing_predicted_is_seen(name, sizes, example_id):
    """By the masks that `prefix` and `segments` describe; all that is known of a text, on the other hand, is."""
    objective = CASES[name]
    if isinstance(objective, MaskedLM | TextInfilling):
        return  # which show some of what they ask for
    ends = np.cumsum(sizes)
    row = make(name, [np.arange(end - size, end) + FIRST for size, end in zip(sizes, ends, strict=True)], example_id)
    segments, columns = row["segments"], np.arange(len(row["tokens"]))
    decoder = row.get("decoder_segments", segments)
    for column in np.flatnonzero(row["weights"]):
        target, segment = row["targets"][column], decoder[column]
        if "prefix" in row:
            seen = row["tokens"][(segments == segment) & ((columns <= column) | (row["prefix"] == 1))]
        else:
            earlier = np.arange(len(decoder)) <= column
            seen = np.append(row["tokens"][segments == segment], row["decoder_tokens"][(decoder == segment) & earlier])
        if target >= FIRST:
            assert target not in seen
        text = np.arange(ends[segment - 1] - sizes[segment - 1], ends[segment - 1]) + FIRST
        others = row["targets"][(decoder == segment) & (row["weights"] == 1) & (np.arange(len(decoder)) >= column)]
        assert set(seen[seen >= FIRST]) == set(text) - set(others)


# Batches


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    lengths = [30, 0, 7, 255, 1, 12, 3, 64, 90, 65, 2]
    texts = [Document(str(d), "".join(chr(32 + (d * 7 + t) % 90) for t in range(n)), "test") for d, n in enumerate(lengths)]
    return build_store(texts, ByteTokenizer(), tmp_path_factory.mktemp("data") / "store")


BYTE_SENTINELS = tuple(range(300, 340))
BYTE_CASES = [
    PrefixLM(),
    MaskedLM(mask=299, vocab=256, begin=258, eos=256),
    SpanCorruption(BYTE_SENTINELS, eos=256, start=257),
    TextInfilling(mask=299, eos=256, start=257, sentence_ends=(46,)),
    BlankInfilling(299, 298, 297),
    ul2(sentinels=BYTE_SENTINELS, modes=(290, 291, 292), eos=256, start=257),
]
byte_case = pytest.mark.parametrize("objective", BYTE_CASES, ids=lambda objective: type(objective).__name__)


def batches_of(store, objective, **options):
    return DenoisedBatches(store, objective, **{"rows": 3, "length": 64, "vocab": 400, "seed": 5, **options})


def undone(objective, batch):
    """Texts of a batch, whatever was done to them, through targets and what is known: as sorted multisets of tokens."""
    for i in range(len(batch["example_id"])):
        row = {name: values[i] for name, values in batch.items()}
        for segment in range(1, row["segments"].max() + 1):
            at = row["segments"] == segment
            known, told = row["tokens"][at], row["targets"][row.get("decoder_segments", row["segments"]) == segment]
            match objective:
                case PrefixLM():
                    tokens = [known[0], *told]
                case MaskedLM() | TextInfilling():
                    tokens = told
                case _:
                    tokens = [*known[row["prefix"][at] == 1], *told] if "prefix" in row else [*known, *told]
            yield sorted(int(token) for token in tokens if 0 < token < 256 or (token == 256 and isinstance(objective, PrefixLM)))


@byte_case
@pytest.mark.parametrize("packing", ["first_fit", "stream"])
def test_an_epoch_has_each_token_once(store, objective, packing):
    batches = batches_of(store, objective, packing=packing, epochs=1)
    seen = Counter()
    for batch in batches:
        for tokens in undone(objective, batch):
            seen.update(tokens)
    expected = Counter()
    for d in range(len(store)):
        document = store.document(d).tolist()
        keeps_end = isinstance(objective, PrefixLM)
        if packing == "stream" or len(document) - (not keeps_end) > 1:
            expected.update(token for token in document if token < 256 or keeps_end)
    # where the objective leaves ends of documents alone, they are a token like any other; a single token has nothing to predict
    if isinstance(objective, BlankInfilling) and packing == "first_fit":
        expected.update(store.document(4).tolist()[:1])
    assert seen == expected


@byte_case
def test_batches_are_sliced_resumed_and_new_in_each_epoch(store, objective):
    batches = batches_of(store, objective)
    n = batches.examples_per_epoch
    whole = batches[1]
    some = batches.rows(1, [2, 0])
    assert all(np.array_equal(some[name], whole[name][[2, 0]]) for name in whole)
    other = batches_of(store, objective, rows=2)
    assert all(np.array_equal(other.examples(np.arange(3, 6))[name], whole[name]) for name in whole)
    with iterate(batches, start_example=3) as reader:
        assert batch_hash(next(reader)) == batch_hash(whole)
        assert reader.get_state() == {"example": 6}
    assert whole["example_id"].tolist() == [3, 4, 5]
    still = batches_of(store, objective, shuffle=False)
    first, second = still.examples(np.arange(n)), still.examples(np.arange(n) + n)
    assert not all(np.array_equal(first[name], second[name]) for name in first if name != "example_id")
    if isinstance(objective, PrefixLM):  # whose tokens do not depend on chance: all examples, in another order
        one, two = (batches.examples(np.arange(n) + e * n)["tokens"].tolist() for e in (0, 1))
        assert one != two
        assert sorted(one) == sorted(two)
    padded = batches_of(store, objective, rows=n + 1, epochs=1)[0]
    assert all(padded[name].shape == (n + 1, *first[name].shape[1:]) for name in first)
    assert not any(padded[name][-1].any() for name in padded if name != "example_id")


def test_grain_maps_it(store):
    import grain

    texts = [[np.arange(FIRST, FIRST + n)] for n in (10, 20, 30)]
    to_row = functools.partial(denoise, CASES["spans"], length=40, decoder_length=12, seed=9)
    rows = list(grain.MapDataset.source(texts).map_with_index(to_row))
    for i, row in enumerate(rows):
        assert batch_hash(row) == batch_hash(denoise(CASES["spans"], i, texts[i], length=40, decoder_length=12, seed=9))
    batch = next(iter(grain.MapDataset.source(texts).map_with_index(to_row).batch(3)))
    assert batch["decoder_tokens"].shape == (3, 12)
    assert batch["example_id"].tolist() == [0, 1, 2]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=20).filter(lambda lengths: max(lengths) > 1),
    name=st.sampled_from(list(CASES)),
    length=st.integers(14, 80),
    seed=st.integers(0, 3),
)
def test_plans_fit(lengths, name, length, seed):
    objective = CASES[name]
    order = np.random.default_rng(seed).permutation(len(lengths))
    text, decoder = fit(objective, length)
    packed = plan_texts(np.array(lengths), objective, length, order=order)
    seen = Counter()
    for i in range(len(packed)):
        spans = range(packed.first[i], packed.first[i + 1])
        sizes = [objective.sizes(int(packed.stop[j] - packed.start[j])) for j in spans]
        assert sizes
        assert sum(first for first, _ in sizes) <= length
        assert sum(second for _, second in sizes) <= decoder
        for j in spans:
            assert 2 <= packed.stop[j] - packed.start[j] <= text
            seen.update((int(packed.document[j]), t) for t in range(packed.start[j], packed.stop[j]))
    assert seen == Counter((d, t) for d, n in enumerate(lengths) if n > 1 for t in range(n))


def test_word_starts():
    tokenizer = ByteTokenizer()
    starts = word_starts(tokenizer)
    text = list("a b-c d\u00fc9".encode())
    assert starts[text].tolist() == [False, True, False, True, False, True, False, False, False, False]
    assert starts[256]

    class Pieces:
        vocab, pieces = 5, ("[CLS]", "un", "##able", "\u0120the", "\u2581a")

        def token(self, id):
            return self.pieces[id]

    assert word_starts(Pieces()).tolist() == [True, True, False, True, True]
    Pieces.pieces = ("<s>", "un", "\u2581the", "\u010aa", "<0xC3>")
    assert word_starts(Pieces()).tolist() == [True, False, True, False, False]
    Pieces.pieces = (",", "\u00c3", "\u00a9", "\u010a", "\u0120the")
    assert word_starts(Pieces()).tolist() == [True, False, False, True, True]


def test_explained(tmp_path):
    class Named(ByteTokenizer):
        """Bytes, and special tokens by their numbers."""

        vocab = 400

        def decode(self, ids):
            return super().decode([id for id in ids if id < 256])

        def token(self, id):
            return super().token(id) if id < 256 else f"<{id}>"

    texts = ["It was the best of times.", "it was the worst"]
    store = build_store([Document(str(i), text, "test") for i, text in enumerate(texts)], ByteTokenizer(), tmp_path / "store")
    shown = {}
    for objective in BYTE_CASES:
        batch = batches_of(store, objective, rows=1, epochs=1, shuffle=False, length=128)[0]
        pieces = explain(batch, Named()).rows[0].pieces
        shown[type(objective)] = "".join(piece.text for piece in pieces if not piece.text.endswith("padding]"))
        assert sum(piece.role == "predicted" for piece in pieces) == batch["weights"].sum()
    assert shown[PrefixLM] == "It was the best of times.<256>it was the worst<256>"
    source, arrow, target = shown[TextInfilling].partition("\n\u2192 ")
    assert arrow
    assert "<299>" in source
    assert source.count("<256>") == 2
    assert target == "<257>It was the best of times.<256><257>it was the worst<256>"
    source, _, target = shown[SpanCorruption].partition("\n\u2192 ")
    assert source.count("<300>") == 2
    assert target.count("<257><300>") == 2
    assert "\u2192" in shown[MaskedLM]
    assert "<298>\u2192" in shown[BlankInfilling]


@dataclass(frozen=True)
class Experiment:
    objective: Objective | None = None


def test_registry():
    """Every objective has a name, passes its own check, and is saved with an experiment and read again."""
    assert set(OBJECTIVES.values()) == {type(objective) for objective in CASES.values()}
    for objective in CASES.values():
        check(objective, vocab=VOCAB, length=64)
        saved = json.loads(json.dumps(config.to_json(Experiment(objective))))
        assert config.from_json(Experiment, saved) == Experiment(objective)
    changed, _ = config.parse(Experiment(CASES["spans"]), ["--objective.density", "0.3", "--objective.sentinels", "50", "51"])
    assert changed.objective == SpanCorruption((50, 51), EOS, START, 0.3)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (SpanCorruption((399, 400), EOS, START), r"an id of objective\.sentinels is 400, outside the vocabulary 0\.\.399"),
        (SpanCorruption((), EOS, START), r"objective\.sentinels is empty"),
        (SpanCorruption((20, 20), EOS, START), r"mark tokens \(20, 20\) are not distinct"),
        (SpanCorruption((20, 21), EOS, START), r"a text of 70 tokens has 3 spans, but objective\.sentinels has only 2"),
        (SpanCorruption(SENTINELS, EOS), r"objective\.start=None, but a decoder's inputs begin with a token"),
        (SpanCorruption(SENTINELS, EOS, START, density=0), r"objective\.density=0 is not between 0 and 1"),
        (SpanCorruption(SENTINELS, EOS, START, mean_span=0.5), r"objective\.mean_span=0\.5 is less than 1"),
        (SpanCorruption(SENTINELS, 400, START), r"objective\.eos is 400, outside"),
        (SpanCorruption(SENTINELS, EOS, START, form="decoder"), r"objective\.form='decoder' is not one of encoder_decoder, prefix"),
        (MaskedLM(400, VOCAB), r"objective\.mask is 400, outside"),
        (MaskedLM(MASK, 401), r"objective\.vocab=401 is outside 1\.\.400"),
        (MaskedLM(MASK, VOCAB, rate=1.5), r"objective\.rate=1\.5 is not between 0 and 1"),
        (MaskedLM(MASK, VOCAB, random=0.6, keep=0.5), r"objective\.random=0\.6 and keep=0\.5 are not shares"),
        (TextInfilling(MASK, EOS, START, sentence_ends=(-1,)), r"an id of objective\.sentence_ends is -1, outside"),
        (BlankInfilling(MASK, MASK, END), r"BlankInfilling's mark tokens \(4, 4\) are not distinct"),
        (PrefixLM(least=0.7, most=0.2), r"objective\.least=0\.7 and most=0\.2 are not shares"),
        (Mixture(()), r"objective\.denoisers is empty"),
        (Mixture((Denoiser(MaskedLM(MASK, VOCAB)),)), r"a mixture of denoisers cannot have MaskedLM"),
        (Mixture((Denoiser(PrefixLM(), rate=0),)), r"a denoiser's rate=0 is not positive"),
        (Mixture((Denoiser(PrefixLM(), mode=400),)), r"a denoiser's mode is 400, outside"),
        (Mixture((Denoiser(PrefixLM(eos=1)), Denoiser(PrefixLM(eos=2)))), r"different eos: 1, 2; use one"),
        (Mixture((Denoiser(SpanCorruption(SENTINELS, EOS, START), mode=99),)), r"ids \[99\] are modes and sentinels"),
    ],
)
def test_errors_of_configs(objective, message):
    with pytest.raises(ValueError, match=message):
        check(objective, vocab=VOCAB, length=64)


def test_errors_of_texts_and_lengths(store):
    text = np.arange(FIRST, FIRST + 60)
    spans = CASES["spans"]
    with pytest.raises(ValueError, match=r"data\.decoder_length=8, but rows of this PrefixLM have one side"):
        fit(PrefixLM(), 64, 8)
    with pytest.raises(ValueError, match=r"data\.length=2 has no room: SpanCorruption needs 3 and 3 for a text of 2 tokens"):
        fit(spans, 2)
    with pytest.raises(ValueError, match=r"data\.length=64, data\.decoder_length=2 has no room"):
        fit(spans, 64, 2)
    with pytest.raises(ValueError, match=r"example 7 needs 55 columns for its texts of 60 tokens, but data\.length=50"):
        denoise(spans, 7, [text], length=50, seed=0)
    with pytest.raises(ValueError, match=r"example 7 needs 26 columns for its texts of 60, 60 tokens, but data\.decoder_length=20"):
        denoise(spans, 7, [text, text], length=200, decoder_length=20, seed=0)
    with pytest.raises(ValueError, match=r"text 1 of example 7 has 1 tokens"):
        denoise(spans, 7, [text, text[:1]], length=200, seed=0)
    with pytest.raises(ValueError, match=r"text 0 of example 7 has token 99, with which SpanCorruption marks"):
        denoise(spans, 7, [np.append(text, 99)], length=200, seed=0)
    with pytest.raises(ValueError, match=r"has 9 spans, but objective\.sentinels has only 2"):
        denoise(SpanCorruption((20, 21), EOS, START, 0.5, 3), 7, [text[:54]], length=200, seed=0)
    with pytest.raises(ValueError, match=r"objective\.whole_word needs words"):
        denoise(CASES["masked_words"], 7, [text], length=200, seed=0)
    with pytest.raises(ValueError, match=r"needs words for all 257 ids of the text and has none"):
        batches_of(store, CASES["masked_words"])
    with pytest.raises(ValueError, match=r"data\.packing='concatenate' is not one of first_fit, stream"):
        batches_of(store, BYTE_CASES[0], packing="concatenate")
    with pytest.raises(ValueError, match=r"vocab=100 is smaller than the vocabulary of the text, 257"):
        batches_of(store, BYTE_CASES[0], vocab=100)
    with pytest.raises(ValueError, match=r"none of the 2 documents has 2 tokens"):
        plan_texts(np.array([1, 0]), spans, 64)
    with pytest.raises(ValueError, match=r"data\.length=1 has room for texts of 2 tokens, too few to cut longer documents"):
        plan_texts(np.array([5]), PrefixLM(), 1)
