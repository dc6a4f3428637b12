"""Rows and batches of denoising objectives: fields, lengths, packing, epochs; and what is refused."""

import functools
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from denoising_cases import (
    CASES,
    END,
    EOS,
    FIRST,
    ID,
    MASK,
    SENTINELS,
    START,
    VOCAB,
    WORDS,
    case,
    make,
)
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
from lmx.data.corruption import Draws, corrupt
from lmx.data.denoised import plan_texts
from lmx.data.denoising import check, fit


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
