"""Memory that is not enough is explained by the plan, not by a page of XLA."""

import dataclasses

import jax
import pytest

from lmx.core.config import ConfigError
from lmx.models.config import Transformer
from lmx.parallel.layout import Layout
from lmx.train import advice, loop, planning
from lmx.train.checkpoints import Checkpoints
from tests.parallel.test_cost import CASES
from tests.parallel.test_cost import experiment as planned

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 91268055040 bytes."


def failing(program, at: int, text: str):
    """The program, its step failing as XLA does when called for the nth time."""
    calls = []

    def step(state, batch):
        calls.append(1)
        if len(calls) == at:
            raise jax.errors.JaxRuntimeError(text)
        return program.step(state, batch)

    return dataclasses.replace(program, step=step)


def test_a_step_that_does_not_fit_names_rows_and_knobs_and_loses_nothing(experiment, monkeypatch, capsys):
    run = experiment(layout=Layout(fsdp=2, zero=1), checkpoints=Checkpoints(every=1))
    build = loop.build
    monkeypatch.setattr(loop, "build", lambda run: failing(build(run), 3, FULL))
    with pytest.raises(SystemExit) as stop:
        loop.main(run, [])
    message = str(stop.value)  # which Python prints to stderr, leaving with 1
    assert "tiny: a device has not memory enough for a step (XLA: RESOURCE_EXHAUSTED)" in message
    assert 4 <= len(message.splitlines()) <= 8
    assert "--layout.remat dots or full, or --microbatches 2" in message
    monkeypatch.setattr(loop, "build", build)
    assert "step 2/6" in capsys.readouterr().out
    result = loop.main(run, ["--start", "resume", "--layout.remat", "full", "--microbatches", "2"])
    assert int(result.state.step) == run.steps
    assert "step 3/6" in (resumed := capsys.readouterr().out)
    assert "step 2/6" not in resumed


def test_any_other_failure_is_raised_as_it_is(experiment, monkeypatch):
    build = loop.build
    monkeypatch.setattr(loop, "build", lambda run: failing(build(run), 1, "INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        loop.main(experiment(), [])


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_a_knob(name):
    run = planned(**CASES[name])
    found = planning.plan(run)
    for row in found.memory:
        assert advice.LOWERED_BY[row], row
    assert advice.shortage(run).count("\n") == 5


def test_what_cannot_be_planned_is_explained_nonetheless():
    run = planned(Transformer(vocab=64, embed=32, heads=2), length=32, data=2, ordered=2)
    with pytest.raises(ConfigError):
        planning.plan(run)
    assert "raise microbatches" in advice.shortage(run)


def test_a_knob_at_its_end_is_not_named():
    assert "remat" not in advice.shortage(planned(remat="full", fsdp=8))
    assert "--layout.zero 2 to 3" in advice.shortage(planned(remat="full", fsdp=8, zero=1), rows=9)
    assert "--layout.zero 3 " not in advice.shortage(planned(remat="full", fsdp=8), rows=9)
