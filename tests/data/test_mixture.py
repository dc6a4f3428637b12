"""Blends: exact shares wherever one looks, caps kept to the example, curricula, lengths; the same batches from wherever they are asked."""

import dataclasses
import json
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import (
    Blend,
    Component,
    Data,
    Shorter,
    SpanCorruption,
    Stage,
    batch_hash,
    check,
    explain,
    iterate,
    make_batches,
    prepare,
)
from lmx.data.interleaving import interleave
from lmx.data.lengths import schedule
from lmx.data.mixture import pieces, shares

REPOSITORY = Path(__file__).parents[2]
NAMES = "abc"


@st.composite
def orders(draw):
    count, parts = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    begins = [0, *sorted(draw(st.lists(st.integers(1, 600), min_size=parts - 1, max_size=parts - 1, unique=True)))]
    weight = st.sampled_from([0, 1e-4, 0.1, 0.5, 1, 3, 7.7])
    each = [(begin, draw(st.lists(weight, min_size=count, max_size=count))) for begin in begins]
    caps = draw(st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=count, max_size=count))
    return each, caps, draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))


@settings(max_examples=60, deadline=None)
@given(orders(), st.booleans())
def test_order(made, redistribute):
    """Against a count, slot by slot, of what each component should have."""
    each, caps, seed = made
    order = interleave(each, caps, end=800, seed=seed, redistribute=redistribute)
    component, nth = order.locate(np.arange(order.total))
    counts = np.bincount(component, minlength=len(caps))
    for c, cap in enumerate(caps):
        mine = np.flatnonzero(component == c)
        assert sorted(nth[mine]) == list(range(counts[c]))  # each example once
        assert np.array_equal(order.find(c, nth[mine]), mine)
        assert cap is None or counts[c] <= cap
    plain, _ = interleave(each, caps, end=800, seed=None, redistribute=redistribute).locate(np.arange(order.total))
    run, ideal = np.zeros(len(caps)), np.zeros(len(caps))
    bound = math.ceil(math.log2(len(caps))) / 2 + 1
    for j in range(801):
        now = np.array([share for begin, share in each if begin <= j][-1], float)
        used_up = np.array([cap is not None and n >= cap for cap, n in zip(caps, run, strict=True)])
        if j == order.total:
            ends = not now[~used_up].any() or (not redistribute and now[used_up].any())
            assert j == 800 or ends
            break
        now[used_up] = 0
        ideal += now / now.sum()
        assert now[plain[j]] > 0
        run[plain[j]] += 1
        assert np.abs(run - ideal).max() < bound
        assert (np.bincount(component[: j + 1], minlength=len(caps)) == run).all() or j % 64 != 63 or len(order.begins) > 2
    assert np.array_equal(order.used(order.total // 2), np.bincount(plain[: order.total // 2], minlength=len(caps)))


@pytest.mark.parametrize("weights", [(1, 1), (5, 3, 2), (0.7, 0.2, 0.05, 0.05)])
def test_exact_shares_in_every_window(weights):
    order = interleave([(0, weights)], [None] * len(weights), end=2**32, seed=5)
    exact = np.array(weights) / sum(weights)
    for start in (0, 6400, 2**31, 2**32 - 6400):
        component, _ = order.locate(np.arange(start, start + 6400))
        assert np.abs(np.bincount(component) - 6400 * exact).max() <= 1
        blocks = np.array([np.bincount(block, minlength=len(weights)) for block in component.reshape(-1, 64)])
        assert np.abs(blocks - 64 * exact).max() < 2
        assert len({tuple(block) for block in component.reshape(-1, 64).tolist()}) > 90  # in another order each time
    # fixed for ever: a run must go on after an upgrade of NumPy
    assert interleave([(0, (2, 1))], [None] * 2, end=99, seed=7).locate(np.arange(20))[0].tolist() == [
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
    ]


def test_far_is_as_near_and_can_be_undone():
    order = interleave([(0, (3, 1)), (10**6, (1, 3)), (10**9, (0.001, 1))], [None, 2 * 10**9], end=2**32, seed=0)
    draw = np.random.Generator(np.random.Philox(0)).integers(0, order.total, 500)
    component, nth = order.locate(draw)
    for c in (0, 1):
        assert np.array_equal(order.find(c, nth[component == c]), draw[component == c])
    assert order.counts[-1].tolist() == [2**32 - 2 * 10**9, 2 * 10**9]
    with pytest.raises(IndexError, match="of a mixture of 4294967296"):
        order.locate([2**32])
    with pytest.raises(IndexError, match="of 2000000000 of component 1"):
        order.find(1, [2 * 10**9])


def test_shares_by_temperature():
    assert shares((1, 3)) == [0.25, 0.75]
    assert shares((1, 9, 0), 2) == pytest.approx([0.25, 0.75, 0])
    assert shares((1, 1e9), 1e9) == pytest.approx([0.5, 0.5])
    blend = Blend((Component("a"), Component("b")), temperature=2)
    assert pieces(blend, [100, 900]) == [(0, pytest.approx([0.25, 0.75]))]


def test_a_line_of_shares():
    blend = Blend((Component("a"), Component("b")), curriculum=(Stage(0, (1, 0)), Stage(1000, (0, 4))), between="linear")
    found = pieces(blend, [1, 1])
    assert found[-1] == (1000, [0, 1])
    assert len(found) == 257
    for step, share in found[:-1]:
        assert abs(share[1] - step / 1000) < 1 / 256
    assert [step for step, _ in pieces(dataclasses.replace(blend, between="constant"), [1, 1])] == [0, 1000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts that show where they are from: all letters of a component's are its name."""
    folder = tmp_path_factory.mktemp("texts")
    for i, name in enumerate(NAMES):
        lines = [json.dumps({"text": name * (20 + 37 * i + 11 * j % 90), "id": f"{name}{j}"}) for j in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def make(folder, *, blend=None, epochs=(None,) * 3, rows=4, seed=3, **options):
    parts = tuple(Component(str(folder / f"{name}.jsonl"), epochs=e) for name, e in zip(NAMES, epochs, strict=True))
    data = Data(train=Blend(parts, **(blend or {})), cache=str(folder / "cache"), **{"length": 64, **options})
    prepared = prepare(data)
    return make_batches(data, prepared.train, prepared.tokenizer, vocab=257 + 64, rows=rows, seed=seed)


def of(batch):
    """Of which component each row is, those without a letter left out."""
    letters = [next((chr(token) for token in row if chr(token) in NAMES), "") for row in batch["tokens"]]
    return [NAMES.index(letter) for letter in letters if letter]


CURRICULUM = {"curriculum": (Stage(0, (1, 1, 0)), Stage(20, (0, 1, 1)), Stage(40, (1, 2, 3))), "between": "linear"}
LENGTHS = (Shorter(12, 16), Shorter(24, 32))


@pytest.mark.parametrize("packing", ["concatenate", "first_fit", "stream"])
def test_batches_are_the_components(folder, packing):
    batches = make(folder, packing=packing, blend={"temperature": 2.0})
    for k in (0, 5, 10**6):
        batch = batches[k]
        assert batch["example_id"].tolist() == list(range(4 * k, 4 * k + 4))
        component, nth = batches.origin(batch["example_id"])
        assert of(batch) == component.tolist()
        for row, (c, n) in enumerate(zip(component, nth, strict=True)):
            alone = batches.batches[c].examples([n])
            assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch if name != "example_id")
            assert batches.find(c, [n]).tolist() == [4 * k + row]
    sizes = [b.store.targets**0.5 for b in batches.batches]
    share = np.bincount([c for k in range(80) for c in of(batches[k])]) / 320
    assert share == pytest.approx(np.array(sizes) / sum(sizes), abs=0.01)


def test_caps_are_exact(folder):
    batches = make(folder, blend={"curriculum": (Stage(0, (1, 1, 1)), Stage(5, (1, 1, 8)))}, epochs=(0.5, 2, 1), rows=3)
    per_epoch = [b.examples_per_epoch for b in batches.batches]
    caps = [per_epoch[0] // 2, 2 * per_epoch[1], per_epoch[2]]
    assert batches.total == sum(caps)
    assert len(batches) == -(-sum(caps) // 3)
    targets = Counter()
    for batch in batches:
        real = batch["weights"].any(1)
        targets.update(batch["targets"][real][batch["weights"][real] > 0].tolist())
    assert targets[ord("b")] == 2 * sum(20 + 37 + 11 * j % 90 - 1 for j in range(30))  # all but the first of each document
    assert targets[ord("c")] == sum(20 + 74 + 11 * j % 90 - 1 for j in range(30))
    with iterate(batches) as iterator:
        assert len(list(iterator)) == len(batches)
    refused = make(folder, blend={"curriculum": (Stage(0, (1, 1, 1)),), "exhausted": "error"}, epochs=(0.5, 2, 1), rows=3)
    assert max(refused.order.counts[-1] - caps) == 0
    assert refused.total < batches.total
    # what is used up and has no share any more is no error
    fine = make(
        folder, blend={"curriculum": (Stage(0, (1, 1, 1)), Stage(2, (0, 1, 1))), "exhausted": "error"}, epochs=(0.1, None, None), rows=3
    )
    assert fine.total == 2**32


@pytest.mark.parametrize("keep", ["tokens", "rows"])
@pytest.mark.parametrize("packing", ["concatenate", "first_fit", "stream"])
def test_short_rows_are_parts_of_full_ones(folder, keep, packing):
    """In every epoch each target comes once, whatever the lengths; only what it sees of its text is cut."""
    plain = make(folder, packing=packing, blend=CURRICULUM | {"curriculum": (Stage(0, (1, 1, 1)),)})
    batches = make(folder, packing=packing, blend=CURRICULUM | {"curriculum": (Stage(0, (1, 1, 1)),)}, lengths=LENGTHS, keep=keep)
    ids, seen = [], []
    for k in range(30):
        batch = batches[k]
        length = 16 if k < 12 else 32 if k < 24 else 64
        assert batch["tokens"].shape == ((4 * 64 // length if keep == "tokens" else 4), length)
        assert batches.begin(0, k) == batch["example_id"][0]
        ids += batch["example_id"].tolist()
        seen += batch["targets"][batch["weights"] > 0].tolist()
        full, column = batches.origin(batch["example_id"])
        whole = plain.examples(full)
        for row in range(len(full)):
            here = slice(column[row], column[row] + length)
            for name in ("tokens", "targets", "weights"):
                assert np.array_equal(batch[name][row], whole[name][row, here])
            real = batch["weights"][row] > 0
            segments = batch["segments"][row] if packing != "stream" else real
            for segment in np.unique(segments[real]):
                at = segments == segment
                assert batch["positions"][row, at].tolist() == list(range(at.sum()))
            if packing != "stream":
                assert np.array_equal(segments[real], np.unique(whole["segments"][row, here][real], return_inverse=True)[1] + 1)
            assert not batch["positions"][row, ~real].any()
    assert ids == list(range(len(ids)))
    used = plain.examples(np.arange(batches.schedule.examples(30)))
    assert seen == used["targets"][used["weights"] > 0].tolist()


@pytest.mark.parametrize("keep", ["tokens", "rows"])
def test_caps_with_short_rows(folder, keep):
    """A run that ends, in full rows or in short ones, has each target once; the last batch is filled up with padding."""
    expected = Counter({ord(name): sum(20 + 37 * i + 11 * j % 90 - 1 for j in range(30)) for i, name in enumerate(NAMES)})
    for stages in (LENGTHS, (Shorter(400, 16),)):
        batches = make(folder, epochs=(1, 1, 1), lengths=stages, keep=keep)
        found = Counter()
        for batch in batches:
            found.update(batch["targets"][batch["weights"] > 0].tolist())
        assert found[256] == 90  # the ends of all texts
        assert {token: found[token] for token in expected} == expected
        with iterate(batches) as iterator:
            assert [batch_hash(batch) for batch in iterator] == [batch_hash(batch) for batch in batches]
        assert batches.left(batches.begin(0, 3)) == len(batches) - 3
        with pytest.raises(IndexError, match=f"batch {len(batches)} of"):
            batches[len(batches)]


def test_a_cap_of_no_example_is_refused(folder):
    with pytest.raises(ValueError, match=r"components\.1\.epochs=0\.001 of \d+ examples is less than one"):
        make(folder, epochs=(None, 0.001, None))


def test_a_curriculum_is_counted_in_steps(folder):
    """Where batches take fewer full rows at first, shares still change at their step."""
    stages = {"curriculum": (Stage(0, (1, 0, 0)), Stage(12, (0, 1, 0)), Stage(20, (0, 0, 1)))}
    for options in ({}, {"lengths": LENGTHS, "keep": "rows"}, {"lengths": LENGTHS}):
        batches = make(folder, blend=stages, **options)
        for k in (0, 11, 12, 19, 20, 23, 24, 100):
            assert set(of(batches[k])) == {0 if k < 12 else 1 if k < 20 else 2}, (options, k)


@pytest.mark.parametrize("keep", ["tokens", "rows"])
def test_resume_anywhere(folder, keep):
    options = {"blend": CURRICULUM, "epochs": (None, 3, None), "lengths": LENGTHS, "keep": keep}
    expected = [batch_hash(make(folder, **options)[k]) for k in range(50)]
    step = random.randrange(1, 40)
    with iterate(make(folder, **options)) as iterator:
        assert [batch_hash(batch) for batch in islice(iterator, step)] == expected[:step]
        state = json.loads(json.dumps(iterator.get_state()))
        assert iterator.size == len(make(folder, **options)[step - 1]["tokens"])
    with iterate(make(folder, **options)) as iterator:
        iterator.set_state(state)
        assert [batch_hash(batch) for batch in islice(iterator, 50 - step)] == expected[step:]
        with pytest.raises(ValueError, match="no batch of this schedule of lengths"):
            iterator.set_state({"example": state["example"] + 1})
    batches = make(folder, **options)
    halves = [[batches.rows(k, lambda n, i=i: np.arange(n)[i::4]) for i in range(4)] for k in (0, 13, 30)]
    for k, parts in zip((0, 13, 30), halves, strict=True):
        whole = batches[k]
        for i, part in enumerate(parts):
            assert all(np.array_equal(part[name], whole[name][i::4]) for name in whole)


READER = """
import pickle, sys
import numpy as np
from lmx.data import batch_hash, iterate
batches, start, count, i, grained = pickle.load(sys.stdin.buffer)
mine = lambda n: np.arange(n)[n * i // count : n * (i + 1) // count]
if grained:
    with iterate(batches, start_example=start, rows=mine, prefetch=2) as reader:
        found = [next(reader) for _ in range(16)]
else:
    found = [batches.after(start, j, mine) for j in range(16)]
sys.stdout.buffer.write(pickle.dumps(found))
"""


@pytest.mark.parametrize("grained", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "grain"])
def test_processes_read_their_rows(folder, grained):
    """Four real processes with a quarter of the rows each, and one with all of them, from a random step on: put together the same."""
    batches = make(folder, blend=CURRICULUM, lengths=LENGTHS, epochs=(None, 3, None))
    step = random.randrange(4, 22)
    readers = []
    for count in (1, 4):
        for i in range(count):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY}
            reader = subprocess.Popen([sys.executable, "-c", READER], **pipes)
            reader.stdin.write(pickle.dumps((batches, batches.begin(0, step), count, i, grained)))
            reader.stdin.close()
            readers.append(reader)
    found = []
    for reader in readers:
        with reader:
            found.append(pickle.load(reader.stdout))
    for k in range(16):
        expected = batch_hash(batches[step + k])
        assert batch_hash(found[0][k]) == expected
        assert batch_hash({name: np.concatenate([part[k][name] for part in found[1:]]) for name in found[0][k]}) == expected


@pytest.mark.slow
def test_workers_read_the_same(folder):
    """One process of Grain's and four, from a random step on."""
    batches = make(folder, blend=CURRICULUM, lengths=LENGTHS, epochs=(None, 3, None))
    step = random.randrange(4, 22)
    expected = [batch_hash(batches[step + k]) for k in range(10)]
    for workers in (1, 4):
        with iterate(batches, start_example=batches.begin(0, step), workers=workers) as reader:
            assert [batch_hash(batch) for batch in islice(reader, 10)] == expected
            assert reader.get_state() == {"example": batches.begin(0, step + 10)}


def test_denoising(folder):
    objective = SpanCorruption(sentinels=tuple(range(257 + 63, 257 - 1, -1)), start=256)
    batches = make(folder, denoising=objective, packing="first_fit", rows=4, epochs=(None, 1, None))
    batch = batches[3]
    component, nth = batches.origin(batch["example_id"])
    for row, (c, n) in enumerate(zip(component, nth, strict=True)):
        alone = batches.batches[c].examples([n])
        assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch if name != "example_id")
    assert batch_hash(pickle.loads(pickle.dumps(batches))[3]) == batch_hash(batch)


def test_it_can_be_explained(folder):
    from lmx.data import ByteTokenizer

    assert "predicted" in str(explain(make(folder, blend=CURRICULUM, lengths=LENGTHS)[0], ByteTokenizer()))


def test_components_draw_apart(folder):
    """The same text twice in a blend is read in two orders."""
    twice = Blend((Component(str(folder / "c.jsonl")),) * 2)
    data = Data(train=twice, cache=str(folder / "cache"), length=64)
    prepared = prepare(data)
    a, b = make_batches(data, prepared.train, prepared.tokenizer, vocab=257, rows=4, seed=0).batches
    assert a.store.fingerprint == b.store.fingerprint
    assert batch_hash(a[0]) != batch_hash(b[0])
    one = prepare(dataclasses.replace(data, train=dataclasses.replace(twice, components=twice.components[:1])))
    assert one.train.fingerprint != prepared.train.fingerprint
    assert prepared.train.targets == 2 * one.train.targets
    assert prepared.train.bytes_per_token == one.train.bytes_per_token


A, B = Component("a"), Component("b")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (Blend(()), "components is empty"),
        (Blend((A, B), temperature=0), "temperature=0 is not positive"),
        (Blend((A, B), between="step"), "between='step' is not one of constant, linear"),
        (Blend((A, B), exhausted="stop"), "exhausted='stop' is not one of redistribute, error"),
        (Blend((A, Component("b", epochs=0))), r"components\.1\.epochs=0 must be positive"),
        (Blend((A, Component("b", weight=1))), r"components\.0\.weight is not given, but others are"),
        (Blend((Component("a", weight=0), Component("b", weight=0))), "weights are 0 or more, and at least one"),
        (Blend((Component("a", weight=-1), Component("b", weight=2))), r"components\.\*\.weight=\(-1, 2\)"),
        (Blend((A, B), curriculum=(Stage(0, (1,)),)), r"curriculum\.0\.weights has 1 weights; there are 2"),
        (Blend((A, B), curriculum=(Stage(1, (1, 1)),)), r"curriculum\.0\.step=1: .* the first is for step 0"),
        (Blend((A, B), curriculum=(Stage(0, (1, 1)), Stage(0, (1, 2)))), r"curriculum\.1\.step=0: stages are in the order"),
        (Blend((Component("a", weight=1), Component("b", weight=2)), curriculum=(Stage(0, (1, 1)),)), "both components with weights and"),
    ],
)
def test_wrong_blends(train, message):
    with pytest.raises(ValueError, match=f"data\\.train.*{message}"):
        check(Data(train=train))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (Shorter(5, 24),)}, r"data\.lengths\.0\.length=24 must divide data\.length=64 and be less"),
        ({"lengths": (Shorter(5, 64),)}, r"data\.lengths\.0\.length=64 must divide"),
        ({"lengths": (Shorter(5, 16), Shorter(5, 32))}, r"data\.lengths\.1\.until=5 must be a step after 5"),
        ({"lengths": (Shorter(5, 16),), "keep": "all"}, r"data\.keep='all' is not one of tokens, rows"),
        ({"lengths": (Shorter(5, 16),), "denoising": SpanCorruption(sentinels=(257,))}, r"data\.lengths cuts rows"),
    ],
)
def test_wrong_lengths(folder, options, message):
    with pytest.raises(ValueError, match=message):
        check(Data(train=str(folder), length=64, **options))
    with pytest.raises(ValueError, match=r"until=5 is within a full row, which is cut into 4: .* a multiple of 2 steps"):
        schedule((Shorter(5, 16),), rows=2, length=64, keep="rows")
