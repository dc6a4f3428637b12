"""Hashed n-grams and the classifier over them, against versions written plainly."""

import json
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lmx.data.clean import linear
from lmx.data.clean.linear import Features, Linear, Training, evaluate, load_linear, train

VERSE = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the darling buds of May"
M32 = 2**32 - 1
PLAIN = Features(words=(1, 2, 3), characters=(2, 4), bits=12)


def plain_places(features, text):
    """The same hashes from loops over words and characters."""
    data = re.sub(r"[ \t\n\r\v\f]", " ", text[: features.limit].lower()).encode("utf-8", "surrogatepass")
    inside = [byte >= 128 or chr(byte).isalnum() for byte in data]
    words, previous = [], False
    for byte, is_inside in zip(data, inside, strict=True):
        if byte != 32:
            if is_inside and previous:
                words[-1].append(byte)
            else:
                words.append([byte])
        previous = is_inside
    prime = [int(value) for value in linear.MIX]
    hashed = [sum(int(linear.WORD_BYTES[b]) * pow(prime[0], i % 256, 2**32) for i, b in enumerate(word)) & M32 for word in words]
    blocks = []
    for items, orders, factor, salt in (
        (hashed, features.words, prime[1], 0),
        (list(linear.TEXT_BYTES[list(data)]), features.characters, prime[2], 16),
    ):
        for order in orders:
            block = []
            for start in range(len(items) - order + 1):
                value = 0
                for item in items[start : start + order]:
                    value = (value * factor + int(item)) & M32
                value = (value + (salt + order) * prime[3]) & M32
                value = ((value ^ (value >> 15)) * prime[2]) & M32
                block.append(value >> (32 - features.bits))
            blocks.append(block)
    return blocks


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aB9 é中\n'.,-\U0001f600\ud800"), max_size=40) | st.sampled_from(["", " ", VERSE, "x" * 600 + " y"]))
def test_hashes_equal_plain_loops(text):
    places, lengths = PLAIN.places(text)
    blocks = plain_places(PLAIN, text)
    assert lengths == [len(block) for block in blocks]
    assert places.tolist() == [place for block in blocks for place in block]


def test_features_are_the_same_in_any_process_and_version():
    places, lengths = Features().places(VERSE)
    code = f"from lmx.data.clean.linear import Features; print(Features().places({VERSE!r})[0].tolist())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert json.loads(run.stdout) == places.tolist()
    assert lengths == [28, 27, 122]
    assert places[:4].tolist() == [195154, 139116, 171876, 225106]


def test_hashes_are_spread_evenly():
    words = [f"w{i}" for i in range(20_000)]
    places, lengths = Features(words=(1,), characters=(), bits=16).places(" ".join(words))
    counts = np.bincount(places, minlength=2**16)
    expected = lengths[0] / 2**16
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 2**16) < 6 * np.sqrt(2 * 2**16)
    assert (
        Features(words=(1,), characters=(), bits=12).places("ab ba")[0][0]
        != Features(words=(1,), characters=(), bits=12).places("ba ab")[0][0]
    )


def sentences(words, count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(5, 30))) for _ in range(count)]


SMALL = Features(words=(1,), characters=(), bits=8)


def test_training_reaches_the_minimum_that_scipy_finds():
    first, second = sentences(["a", "b", "c", "d", "e"], 60, 0), sentences(["c", "d", "e", "f", "g", "h"], 90, 1)
    how = Training(epochs=200, rate=0.5, l2=1e-2, held_out=0.1, batch=16)
    model, evaluation = train(first, second, features=SMALL, training=how)
    trained = [(text, label) for texts, label in ((first, 1.0), (second, 0.0)) for text in texts if linear._draw(text, 0) >= how.held_out]
    assert evaluation.texts + len(trained) == 150
    x = np.zeros((len(trained), 257))
    for row, (text, _) in enumerate(trained):
        (block,) = plain_places(SMALL, text)
        for place in block:
            x[row, place] += 1 / np.sqrt(len(block))
    x[:, -1] = 1
    y = np.array([label for _, label in trained])
    importance = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))

    def loss(w):
        return (importance * np.logaddexp(0, np.where(y == 1, -1, 1) * (x @ w))).mean() + how.l2 / 2 * (w[:-1] ** 2).sum()

    best, mine = minimize(loss, np.zeros(257), method="L-BFGS-B").fun, loss(np.append(model.weights, model.bias))
    assert mine - best < 2e-3 * best
    assert loss(np.zeros(257)) > 1.5 * best
    for text, row in zip((text for text, _ in trained), x, strict=True):
        assert model.logit(text) == pytest.approx(row[:-1] @ model.weights + model.bias, abs=1e-4)


def test_both_kinds_weigh_the_same_however_many_texts_they_have():
    few, many = sentences(["a", "b", "c"], 40, 0), sentences(["b", "c", "d"], 400, 1)
    model, evaluation = train(few, many, features=SMALL, training=Training(held_out=0.3, epochs=20))
    assert evaluation.auc > 0.99
    assert evaluation.accuracy > 0.95
    assert abs(model("b c b c b c") - 0.5) < 0.25  # what both have says nothing, whatever the counts


def test_training_is_decided_by_its_seed_and_a_file_by_the_classifier(tmp_path):
    first, second = sentences(["a", "b", "c", "d", "e"], 50, 0), sentences(["c", "d", "e", "f", "g", "h"], 50, 1)
    one, again = (train(first, second, features=SMALL)[0] for _ in range(2))
    other = train(first, second, features=SMALL, training=Training(seed=1))[0]
    assert one.fingerprint == again.fingerprint != other.fingerprint
    one.save(tmp_path / "one.npz")
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    loaded = load_linear(str(tmp_path / "one.npz"), one.fingerprint)
    assert loaded.features == SMALL
    assert loaded.fingerprint == one.fingerprint
    assert [loaded(text) for text in second] == [one(text) for text in second]
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint
    with pytest.raises(ValueError, match=r"has fingerprint .*, not abc; it was trained again"):
        load_linear(str(tmp_path / "one.npz"), "abc")


def test_damaged_files_are_named(tmp_path):
    model = Linear(SMALL, np.zeros(256, np.float32), 0.0)
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz' does not exist"):
        load_linear(str(tmp_path / "nothing.npz"))
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        model.save(tmp_path / "model.bin")
    model.save(tmp_path / "good.npz")
    data = (tmp_path / "good.npz").read_bytes()
    for name, bad in (("text", b"no archive"), ("cut", data[:-40]), ("empty", b"")):
        (tmp_path / f"{name}.npz").write_bytes(bad)
        with pytest.raises(ValueError, match="is no classifier of format 1"):
            load_linear(str(tmp_path / f"{name}.npz"))
    with np.load(tmp_path / "good.npz") as file:
        np.savez(tmp_path / "changed.npz", settings=file["settings"], weights=file["weights"] + 1)
    with pytest.raises(ValueError, match="is damaged"):
        load_linear(str(tmp_path / "changed.npz"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=30))
def test_evaluation_equals_its_definition(rows):
    scores, labels = np.array([score / 20 for score, _ in rows]), np.array([label for _, label in rows])
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="evaluating needs both"):
            evaluate(scores, labels)
        return
    found = evaluate(scores, labels)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert found.auc == pytest.approx(np.mean(pairs))
    assert found.accuracy == pytest.approx(np.mean([np.mean(scores[labels] >= 0.5), np.mean(scores[~labels] < 0.5)]))
    # Repeating each kind until both are as many is the same as weighing them alike.
    wanted = np.lcm(labels.sum(), (~labels).sum())
    s = np.concatenate([np.tile(scores[kind], wanted // kind.sum()) for kind in (labels, ~labels)])
    y = np.repeat([1, 0], wanted)
    error = 0.0
    for i in range(10):
        inside = (s >= i / 10) & ((s < (i + 1) / 10) if i < 9 else True)
        error += abs(s[inside].sum() - y[inside].sum()) / len(s)
    assert found.calibration_error == pytest.approx(error)


def test_texts_that_are_equal_are_on_one_side():
    model, evaluation = train(
        ["a b"] * 50 + ["a c"] * 50 + sentences("abc", 40, 0), sentences("def", 60, 1), features=SMALL, training=Training(held_out=0.3)
    )
    assert evaluation.auc == 1.0
    assert model("a b") > 0.5
    held = sum(linear._draw(text, 0) < 0.3 for text in ("a b", "a c"))
    assert 50 * held <= evaluation.texts < 50 * (held + 1)  # of 100 others about 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Features(words=(), characters=()), "must name at least one order"),
        (lambda: Features(words=(0,)), "must name at least one order, all of 1 to 16"),
        (lambda: Features(bits=40), "bits=40 must be from 8 to 28"),
        (lambda: Features(limit=0), "limit=0 must be positive"),
        (lambda: Training(held_out=0), "held_out between 0 and 1"),
        (lambda: Training(epochs=0), "epochs, batch and rate must be positive"),
        (lambda: train(["a"] * 30, []), "of the second 0 and 0; give more texts"),
        (lambda: train(["a"], ["b", " "]), "give more texts, or change held_out=0.1"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_the_beginning_of_a_long_text_is_read():
    short = replace(PLAIN, limit=10)
    assert np.array_equal(short.places(VERSE)[0], PLAIN.places(VERSE[:10])[0])
