"""Batches: right contents, a pure function of (seed, k), sliced by processes, resumed anywhere."""

import json
import pickle
import subprocess
import sys
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import Batches, ByteTokenizer, Document, batch_hash, build_store, iterate, require_supervised

REPOSITORY = Path(__file__).parents[2]


def make_store(directory, lengths):
    """Document d's tokens are its number (in the first byte) and their places: so that a batch shows where each token is from."""
    texts = [Document(str(d), "".join(chr(32 + (d * 7 + t) % 90) for t in range(n)), "test") for d, n in enumerate(lengths)]
    return build_store(texts, ByteTokenizer(), directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", [30, 0, 7, 55, 1, 12, 3, 21, 90, 2])


def make(store, **options):
    return Batches(store, **{"rows": 4, "length": 16, "seed": 3, **options})


@pytest.mark.parametrize("packing", ["concatenate", "first_fit"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_contents(store, packing, shuffle):
    """Everything that a batch promises, for all of an epoch, against the store."""
    batches = make(store, packing=packing, shuffle=shuffle, epochs=1)
    seen = Counter()
    lines = [store.document(d).tolist() for d in range(len(store))]
    for k in range(len(batches)):
        batch = batches[k]
        assert {name: (a.dtype, a.shape) for name, a in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "segments", "positions"), (np.int32, (4, 16))),
            "weights": (np.float32, (4, 16)),
            "example_id": (np.uint32, (4,)),
        }
        assert batch["example_id"].tolist() == list(range(4 * k, 4 * k + 4))
        assert np.array_equal(batch["weights"], batch["segments"] > 0)
        for row in range(4):
            tokens, targets, segments, positions = (batch[n][row] for n in ("tokens", "targets", "segments", "positions"))
            count = segments.max()
            for segment in range(1, count + 1):
                at = np.flatnonzero(segments == segment)
                assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
                assert positions[at].tolist() == list(range(len(at)))
                assert tokens[at][1:].tolist() == targets[at][:-1].tolist()
                piece = [*tokens[at].tolist(), int(targets[at[-1]])]
                # the span is a stretch of one document; its targets are counted
                places = [
                    (d, t) for d, line in enumerate(lines) for t in range(len(line) - len(piece) + 1) if line[t : t + len(piece)] == piece
                ]
                assert places
                seen.update(piece[1:])
            padding = segments == 0
            assert not (padding[:-1] & ~padding[1:]).any()
            assert not tokens[padding].any()
            assert not targets[padding].any()
            assert not positions[padding].any()
    assert seen == Counter(token for line in lines for token in line[1:])


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    rows=st.integers(1, 5),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
)
@pytest.mark.parametrize("packing", ["concatenate", "first_fit"])
def test_each_epoch_has_each_target_once(tmp_path_factory, packing, lengths, rows, length, seed):
    if not any(lengths):
        lengths = [*lengths, 1]
    store = make_store(tmp_path_factory.mktemp("data") / "store", lengths)
    batches = Batches(store, rows=rows, length=length, seed=seed, packing=packing, epochs=2)
    n = batches.examples_per_epoch
    expected = Counter(token for d in range(len(store)) for token in store.document(d).tolist()[1:])
    for epoch in range(2):
        batch = batches.examples(np.arange(n) + epoch * n)
        assert Counter(batch["targets"][batch["weights"] > 0].tolist()) == expected
    assert sum(int(batches[k]["weights"].sum()) for k in range(len(batches))) == 2 * store.targets


def test_a_stream_is_all_text_as_one(store):
    batches = make(store, packing="stream", epochs=1)
    n = batches.examples_per_epoch
    rows = batches.examples(np.arange(n))
    assert "segments" not in rows
    order = np.argsort(rows["tokens"][:, 0], kind="stable")  # any order: examples are shuffled
    assert (rows["positions"][order[0]] == np.arange(16)).all()
    whole = make(store, packing="stream", shuffle=False, epochs=1).examples(np.arange(n))
    real = whole["weights"].ravel() > 0
    assert real[: real.sum()].all()  # only the end is padded
    assert whole["tokens"].ravel()[real].tolist() == store.tokens[:-1].tolist()
    assert whole["targets"].ravel()[real].tolist() == store.tokens[1:].tolist()
    assert sorted(map(bytes, rows["tokens"])) == sorted(map(bytes, whole["tokens"]))


def test_evaluation_pads_the_last_batch(store):
    batches = make(store, rows=5, shuffle=False, epochs=1)
    assert batches.examples_per_epoch % 5
    last = batches[len(batches) - 1]
    real = last["example_id"] < batches.examples_per_epoch
    assert last["weights"][real].any(axis=1).all()
    assert not last["weights"][~real].any()
    assert not last["segments"][~real].any()
    with pytest.raises(IndexError, match=f"batch {len(batches)} of {len(batches)}"):
        batches[len(batches)]
    assert len(list(batches)) == len(batches)


def test_without_shuffle_the_text_comes_in_order(store):
    batches = make(store, shuffle=False, epochs=1)
    rows = batches.examples(np.arange(batches.examples_per_epoch))
    targets = rows["targets"][rows["weights"] > 0].tolist()
    assert targets == [token for d in range(len(store)) for token in store.document(d).tolist()[1:]]
    assert batch_hash(make(store, shuffle=False, seed=99)[0]) == batch_hash(batches[0])


def test_epochs_follow_without_a_seam_and_differ(store):
    batches = make(store)
    n = batches.examples_per_epoch
    assert n % 4
    across = batches[n // 4]
    assert across["example_id"].tolist() == list(range(n // 4 * 4, n // 4 * 4 + 4))
    for row, example in enumerate(across["example_id"].tolist()):
        assert np.array_equal(across["tokens"][row], batches.examples([example])["tokens"][0])
    first, second = (batches.examples(np.arange(n) + epoch * n)["tokens"].tolist() for epoch in (0, 1))
    # documents change their order, so that the text is cut elsewhere
    assert sorted(first) != sorted(second)
    whole = make(store, packing="first_fit")
    n = whole.examples_per_epoch
    first, second = (whole.examples(np.arange(n) + epoch * n)["tokens"].tolist() for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_batch_is_a_function_of_seed_and_number(store):
    hashes = [batch_hash(make(store)[k]) for k in range(12)]
    assert len(set(hashes)) == 12
    batches = make(store)
    assert [batch_hash(batches[k]) for k in reversed(range(12))] == hashes[::-1]
    far = 10**8
    assert batch_hash(batches[far]) == batch_hash(make(store)[far])
    assert batch_hash(make(store, seed=4)[0]) != hashes[0]


def test_a_batch_is_the_same_in_another_process(store):
    program = """
import sys
from lmx.data import Batches, batch_hash, open_store
batches = Batches(open_store(sys.argv[1]), rows=4, length=16, seed=3)
print(batch_hash(batches[2]), batch_hash(batches[777]), *(name for name in ("jax", "grain") if name in sys.modules))
"""
    command = [sys.executable, "-c", program, str(store.directory)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    assert there == [batch_hash(make(store)[2]), batch_hash(make(store)[777])]


def test_processes_slice_the_same_global_batch(store):
    batches = make(store, rows=6)
    whole = batches[5]
    for slices in ([slice(0, 3), slice(3, 6)], [[0, 2, 4], [1, 3, 5]], [[5], [3, 4], [0, 1, 2]]):
        for which in slices:
            part = make(store, rows=6).rows(5, which)
            assert all(np.array_equal(part[name], whole[name][which]) for name in whole)
    with pytest.raises(IndexError):
        batches.rows(5, [6])


def test_threads_may_share(store):
    batches, expected = make(store), [batch_hash(make(store)[k]) for k in range(60)]
    found = [None] * 60

    def work(first):
        for k in range(first, 60, 4):
            found[k] = batch_hash(batches[k])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterate_and_resume(store, prefetch):
    batches = make(store)
    expected = [batch_hash(batches[k]) for k in range(20)]
    with iterate(batches, prefetch=prefetch) as iterator:
        assert [batch_hash(batch) for batch in islice(iterator, 7)] == expected[:7]
        state = iterator.get_state()
        assert state == json.loads(json.dumps(state)) == {"example": 28}
        rest = [batch_hash(batch) for batch in islice(iterator, 13)]
    assert rest == expected[7:]
    with iterate(make(store), prefetch=prefetch) as other:
        next(other)
        other.set_state(state)
        assert [batch_hash(batch) for batch in islice(other, 13)] == rest
    with iterate(make(store), start_example=28, prefetch=prefetch) as third:
        assert [batch_hash(batch) for batch in islice(third, 13)] == rest


def test_iterate_rows_of_a_process(store):
    with iterate(make(store), rows=[1, 3]) as iterator:
        for k, batch in enumerate(islice(iterator, 9)):
            assert batch_hash(batch) == batch_hash(make(store).rows(k, [1, 3]))


def test_another_batch_size_goes_on_at_the_same_example(store):
    with iterate(make(store, rows=4)) as iterator:
        before = [id for batch in islice(iterator, 3) for id in batch["example_id"].tolist()]
        state = iterator.get_state()
    with iterate(make(store, rows=5)) as iterator:
        iterator.set_state(state)
        batches = list(islice(iterator, 3))
    assert before + [id for batch in batches for id in batch["example_id"].tolist()] == list(range(27))
    one_by_one = make(store, rows=1)
    for batch in batches:
        for row, id in enumerate(batch["example_id"].tolist()):
            assert np.array_equal(batch["targets"][row], one_by_one[id]["targets"][0])


def test_iterate_ends_with_the_last_epoch(store):
    batches = make(store, epochs=2)
    with iterate(batches) as iterator:
        assert len(list(iterator)) == len(batches)
        assert iterator.get_state()["example"] >= batches.total
    with iterate(batches, start_example=batches.total - 1) as iterator:
        assert [int(batch["weights"].any(axis=1).sum()) for batch in iterator] == [1]
    with iterate(batches, start_example=batches.total + 5) as iterator:
        assert list(iterator) == []


def test_starting_late_costs_no_more_than_starting_early(store):
    reads = []

    class Counting(Batches):
        def examples(self, ids):
            reads.append(ids)
            return super().examples(ids)

    batches = Counting(store, rows=4, length=16, seed=3)
    with iterate(batches, start_example=4 * 10**8, prefetch=2) as iterator:
        assert next(iterator)["example_id"][0] == 4 * 10**8
    assert len(reads) < 8


def test_closed_iterator(store):
    iterator = iterate(make(store))
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed; set_state opens it again"):
        next(iterator)
    iterator.set_state({"example": 4})
    assert next(iterator)["example_id"][0] == 4
    iterator.close()


def test_errors_of_threads_arrive(store):
    class Broken(Batches):
        def examples(self, ids):
            raise ValueError("the disk is gone")

    with iterate(Broken(store, rows=4, length=16, seed=0)) as iterator, pytest.raises(ValueError, match="the disk is gone"):
        next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0 is not positive"),
        ({"length": 0}, r"data\.length=0 is not positive"),
        ({"seed": -1}, r"seed=-1 is outside 0\.\.2\*\*64-1"),
        ({"epochs": 0}, "epochs=0 is not positive"),
        ({"epochs": 2**32}, "are more than example_id can count"),
        ({"packing": "best_fit"}, r"data\.packing='best_fit' is not one of"),
    ],
)
def test_bad_arguments(store, options, message):
    with pytest.raises(ValueError, match=message):
        make(store, **options)


@pytest.mark.parametrize("state", [{}, {"example": -1}, {"example": "3"}, {"next_index": 3}])
def test_bad_state(store, state):
    with iterate(make(store)) as iterator, pytest.raises(ValueError, match=r"data position .* is not understood"):
        iterator.set_state(state)


def test_nothing_to_predict(tmp_path, store, monkeypatch):
    empty = make_store(tmp_path / "empty", [0, 0])
    with pytest.raises(ValueError, match="nothing to predict: none of the 2 documents"):
        make(empty)
    batches = make(store)
    monkeypatch.setattr(Batches, "_fill", lambda *_: None)
    with pytest.raises(ValueError, match=r"example 8 \(batch 2\) has nothing to predict: every weight is 0"):
        batches[2]
    with pytest.raises(ValueError, match="batch 7 has nothing to predict"):
        require_supervised({"weights": np.zeros((2, 3))}, "batch 7")


def test_batch_hash_sees_everything(store):
    batch = make(store)[0]
    assert batch_hash(batch) == batch_hash(pickle.loads(pickle.dumps(batch)))
    changed = [{**batch, "tokens": batch["tokens"] + 1}, {**batch, "tokens": batch["tokens"].astype(np.int64)}]
    changed += [{**batch, "tokens": batch["tokens"].reshape(-1)}, {k: v for k, v in batch.items() if k != "weights"}]
    assert len({batch_hash(b) for b in [batch, *changed]}) == 5
