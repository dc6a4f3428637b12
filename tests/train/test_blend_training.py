"""A run on a blend of texts, along a curriculum and with short rows first: cut off, on another mesh, from the command line."""

import dataclasses

import jax
import numpy as np
import pytest

from lmx.core.config import ConfigError, command_line, from_json, parse, to_json
from lmx.core.tree import disagreement
from lmx.data import Blend, Component, Shorter, Stage, batch_hash
from lmx.models.config import Transformer
from lmx.parallel.layout import Layout
from lmx.train import loop
from lmx.train.experiment import Evaluation, Experiment
from lmx.train.logging import read_metrics

SMALL = Transformer(layers=1, embed=32, heads=4, mlp=64, context=64)


@pytest.fixture(scope="module")
def programs():
    return {}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch, programs):
    """Runs that differ in steps and names alone have one program: the rate does not change."""
    build = loop.build

    def built(experiment):
        key = (experiment.layout, experiment.microbatches)
        if key not in programs:
            programs[key] = build(experiment)
        return programs[key]

    monkeypatch.setattr(loop, "build", built)


@pytest.fixture
def blended(experiment, text):
    """The tiny experiment on two parts of its text."""

    def make(*, epochs=None, keep="tokens", lengths=(Shorter(4, 16),), exhausted="redistribute", **changes):
        parts = (Component(str(text / "train" / "0*.txt")), Component(str(text / "train" / "1*.txt"), epochs=epochs))
        blend = Blend(parts, curriculum=(Stage(0, (3, 1)), Stage(5, (1, 1))), between="linear", exhausted=exhausted)
        plain = experiment(**({"batch": 8, "steps": 6, "model": SMALL} | changes))
        return dataclasses.replace(plain, data=dataclasses.replace(plain.data, train=blend, lengths=lengths, keep=keep))

    return make


@pytest.fixture
def fed(monkeypatch):
    """Every batch that the loop feeds: its shape and hash."""
    found = []

    def watched(batch, *rest):
        if len(rest[1]) == 2:  # training, not evaluation
            order = np.argsort(batch["example_id"])
            found.append((batch["tokens"].shape, batch_hash({name: a[order] for name, a in batch.items()})))
        return place(batch, *rest)

    place = loop.place
    monkeypatch.setattr(loop, "place", watched)
    return found


def run(experiment):
    return loop.run(loop.prepare_run(experiment))


@pytest.mark.parametrize("keep", ["tokens", "rows"])
def test_cut_off_and_resumed(blended, fed, keep):
    whole = run(blended(name="whole", keep=keep, evaluation=Evaluation(every=3, batches=1)))
    expected = list(fed)
    short = (16, 16) if keep == "tokens" else (8, 16)
    assert [shape for shape, _ in expected] == [short] * 4 + [(8, 32)] * 2
    fed.clear()
    for steps in (1, 3, 5, 6):
        cut = run(blended(name="cut", keep=keep, steps=steps, start="new" if steps == 1 else "resume"))
    assert fed == expected
    assert len(set(fed)) == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cut.state.params), jax.device_get(whole.state.params))


def test_on_another_mesh_with_microbatches(blended, fed):
    whole = run(blended(name="whole"))
    expected = list(fed)
    fed.clear()
    run(blended(name="cut", steps=3))
    again = run(blended(name="cut", layout=Layout(data=2), microbatches=2, start="resume"))
    assert fed == expected
    assert max(disagreement(again.state.params, whole.state.params).values()) < 1e-4


def test_what_is_used_up(blended):
    with pytest.raises(ConfigError, match=r"steps=6: data\.train is used up at step \d \(its components' epochs"):
        loop.prepare_run(blended(epochs=0.1, exhausted="error"))
    assert run(blended(epochs=0.1)).metrics["loss"] > 0


def test_wrong_stages_are_refused_before_any_text_is_read(blended):
    with pytest.raises(ValueError, match=r"data\.lengths\.0\.until=1 is within a full row"):
        loop.prepare_run(blended(batch=2, keep="rows", lengths=(Shorter(1, 8),)))
    with pytest.raises(ConfigError, match=r"data\.length=2 is not divisible by layout\.context=4"):
        loop.prepare_run(blended(lengths=(Shorter(1, 2),), layout=Layout(context=4)))


def test_another_blend_is_another_run(blended):
    run(blended(steps=2))
    with pytest.raises(ValueError, match=r"data\.train\.components\.1\.epochs was None and is now 2"):
        loop.prepare_run(blended(epochs=2, start="resume"))
    assert [line["step"] for line in read_metrics(blended().path) if line["split"] == "train"] == [1, 2]


def test_on_the_command_line(blended, text, capsys):
    made = blended(epochs=3.0)
    assert from_json(Experiment, to_json(made)) == made
    found, sources = parse(made, ["--data.train.components.1.epochs", "2.5", "--data.train.temperature=2", "--data.lengths.0.until", "3"])
    assert found.data.train.components[1].epochs == 2.5
    assert (found.data.train.temperature, found.data.lengths[0].until) == (2.0, 3)
    assert sources["data.train.temperature"] == "command line"
    plain, _ = parse(made, ["--data.train", str(text / "held_out.txt")])
    assert plain.data.train == str(text / "held_out.txt")
    with pytest.raises(ConfigError, match=r"data\.train\.between=up is not one of constant, linear"):
        parse(made, ["--data.train.between", "up"])
    for one in (made, plain):
        with pytest.raises(SystemExit, match="0"):
            command_line(one, ["--help"], description="Trains.")
        assert "data.train" in capsys.readouterr().out
