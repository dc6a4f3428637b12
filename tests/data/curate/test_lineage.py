"""What was trained on is found again: in the right step and row, with where it came from."""

import numpy as np
import pytest

from corpora import WORDS, recipe, write_corpus
from lmx.data.curate import curate
from lmx.data.documents import Document
from lmx.data.lengths import ScheduledBatches, Shorter, schedule
from lmx.data.lineage import seen, trace
from lmx.data.mixture import Blend, Component, MixedBatches, Stage
from lmx.data.pipeline import Batches
from lmx.data.shards import open_shards
from lmx.data.store import build_store
from lmx.data.tokenizers import ByteTokenizer, load_tokenizer

ROWS, LENGTH, STEPS = 4, 48, 80


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of shards with 50 planted documents and 10 planted questions inside others."""
    folder = tmp_path_factory.mktemp("lineage")
    raw = write_corpus(folder / "raw")
    planted = [f"planted number {i} {' '.join(np.random.default_rng(i).choice(WORDS, 5))}" for i in range(50)]
    questions = [f"what is item {i} of the benchmark" for i in range(10)]
    for number, text in enumerate(planted + [f"before {q} and after" for q in questions]):
        with (raw / f"{number % 6}.txt").open("a") as file:
            file.write(text + "\n")
    plan = recipe(raw, held_out=0.0, tokenizer="bpe:400")
    curate(plan, folder / "corpus")
    return open_shards(folder / "corpus/train"), load_tokenizer(folder / "corpus/tokenizer.model"), planted, questions


@pytest.mark.parametrize("packing", ["concatenate", "first_fit", "stream"])
def test_every_row_is_explained(corpus, packing):
    store, tokenizer, _, _ = corpus
    batches = Batches(store, rows=ROWS, length=LENGTH, seed=3, packing=packing)
    for step in (1, 2, 17, STEPS):
        batch = batches[step - 1]
        for row in range(ROWS):
            pieces = trace(batches, tokenizer, step, row)
            # The pieces, put together again, are the row: what is predicted is each piece but its first token.
            count = int(batch["weights"][row].sum())
            inputs = [t for piece in pieces for t in store.document(piece.document)[piece.start : piece.stop].tolist()]
            if packing == "stream":
                assert inputs == [*batch["tokens"][row][:count].tolist(), int(batch["targets"][row][count - 1])]
            else:
                parts = [store.document(p.document)[p.start : p.stop] for p in pieces]
                assert [t for part in parts for t in part[:-1].tolist()] == batch["tokens"][row][:count].tolist()
                assert [t for part in parts for t in part[1:].tolist()] == batch["targets"][row][:count].tolist()
            for piece in pieces:
                text = tokenizer.decode(store.document(piece.document).tolist())
                assert text[slice(*piece.characters)] == piece.text
                assert piece.about["decisions"][0]["step"] == "upper"
                assert piece.about["source"].endswith(piece.about["id"].partition(":")[0])


@pytest.mark.parametrize("packing", ["concatenate", "first_fit", "stream"])
def test_all_that_was_planted_is_found(corpus, packing):
    store, tokenizer, planted, questions = corpus
    batches = Batches(store, rows=ROWS, length=LENGTH, seed=3, packing=packing)
    assert 2 * batches.examples_per_epoch < STEPS * ROWS  # each is seen twice at least
    texts = [tokenizer.decode([*map(int, row)]) for k in range(STEPS) for row in batches[k]["tokens"]]
    for text in [*(p.capitalize() for p in planted), *questions]:
        sights = seen(batches, tokenizer, text, steps=STEPS)
        assert len({s.id for s in sights}) == 1
        for sight in sights:
            assert any(text in p.text or not sight.whole for p in trace(batches, tokenizer, sight.step, sight.row))
        # Independently: the rows whose own text has it. (One at the end of a row has its last token only as a target.)
        rows = {(n // ROWS + 1, n % ROWS) for n, held in enumerate(texts) if text in held}
        assert rows <= {(s.step, s.row) for s in sights}
        assert {(s.step, s.row) for s in sights if s.whole} >= rows
        assert len(sights) >= 2


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory):
    """Two texts, one of a corpus, mixed along a curriculum in rows that are short at first."""
    store, tokenizer, _, _ = corpus
    texts = [Document(f"other {i}", f"another text, number {i}, of slings and arrows", "there") for i in range(40)]
    other = build_store(texts, tokenizer, tmp_path_factory.mktemp("mixed") / "store")
    parts = [Batches(s, rows=ROWS, length=LENGTH, seed=i) for i, s in enumerate((store, other))]
    stages = schedule((Shorter(12, 12), Shorter(20, 24)), rows=ROWS, length=LENGTH, keep="tokens")
    blend = Blend((Component("a"), Component("b")), curriculum=(Stage(0, (3, 1)), Stage(15, (1, 1))))
    return ScheduledBatches(MixedBatches(parts, blend, seed=5, steps=stages.examples), stages), tokenizer, other


def test_rows_of_mixtures_and_schedules_are_explained(mixed):
    batches, tokenizer, _ = mixed
    for step in (1, 5, 12, 13, 16, 20, 21, 60):
        batch = batches[step - 1]
        for row in range(len(batch["tokens"])):
            count = int(batch["weights"][row].sum())
            spans = batches.spans(batches.begin(0, step - 1) + row)
            parts = [store.tokens[a:b] for store, a, b in spans]
            assert [t for part in parts for t in part[:-1].tolist()] == batch["tokens"][row][:count].tolist()
            assert [t for part in parts for t in part[1:].tolist()] == batch["targets"][row][:count].tolist()
            pieces = trace(batches, tokenizer, step, row)
            assert "".join(p.text for p in pieces) == "".join(tokenizer.decode(part.tolist()) for part in parts)


def test_texts_are_found_in_mixtures_and_schedules(corpus, mixed):
    _, _, planted, _ = corpus
    batches, tokenizer, _ = mixed
    for text in ["another text, number 7,", *(p.capitalize() for p in planted[:10])]:
        sights = seen(batches, tokenizer, text, steps=STEPS)
        places = {(s.step, s.row) for s in sights}
        held = set()
        for k in range(STEPS):
            for row, tokens in enumerate(batches[k]["tokens"]):
                if text in tokenizer.decode(tokens.tolist()):
                    held.add((k + 1, row))
        assert held
        assert held <= places
        assert all(any(text in p.text for p in trace(batches, tokenizer, s.step, s.row)) for s in sights if s.whole)
    assert {s.id for s in seen(batches, tokenizer, "another text, number 7,", steps=STEPS)} == {"other 7"}
    with pytest.raises(IndexError, match="rows from 0 to 15"):
        trace(batches, tokenizer, 1, 16)  # of a quarter of the length there are four times as many


def test_what_was_not_trained_on_is_not_found(corpus):
    store, tokenizer, planted, _ = corpus
    batches = Batches(store, rows=ROWS, length=LENGTH, seed=3)
    assert seen(batches, tokenizer, "nowhere to be found", steps=STEPS) == []
    first = seen(batches, tokenizer, planted[0].capitalize(), steps=STEPS)[0].step
    assert seen(batches, tokenizer, planted[0].capitalize(), steps=first - 1) == []
    with pytest.raises(ValueError, match="text='' is in every document"):
        seen(batches, tokenizer, "", steps=STEPS)
    with pytest.raises(IndexError, match="steps count from 1"):
        trace(batches, tokenizer, 0, 0)


def test_a_plain_store_knows_ids(tmp_path):
    store = build_store([Document(f"d{i}", f"text {i} with \u00fcmlauts", "here") for i in range(9)], ByteTokenizer(), tmp_path / "store")
    batches = Batches(store, rows=2, length=20, seed=0)
    assert {piece.about["id"] for piece in trace(batches, ByteTokenizer(), 1, 0)} <= {f"d{i}" for i in range(9)}
    assert [s.id for s in seen(batches, ByteTokenizer(), "xt 4 with \u00fcm", steps=6)][:1] == ["d4"]
