"""Loss, gradients and parameters after three steps are one device's under every layout: a covering set of their combinations."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import composition
import runs
import tables
from lmx.core.tree import disagreement
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.objectives import CausalLM
from lmx.verify import BOUND, BOUNDS, differences

CASES = composition.cover()
EXACT = [case | {"precision": "fp64"} for case in composition.sample(CASES, 10)]
pytestmark = pytest.mark.usefixtures("scanned")


def one_device(model, objective, precision: str) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=model, objective=objective, precision=precision))


@pytest.mark.parametrize("case", CASES, ids=composition.name)
def test_numbers_do_not_depend_on_the_layout(case, once):
    run = composition.experiment(case)
    check(run)
    exact = once(one_device, run.model, run.objective, "fp32")
    bound = BOUND
    if run.precision != "fp32":
        # Which experts a token gets is a choice: rounding changes it for those at the border, for other tokens on every layout.
        bound = (6 if run.model.experts else 2) * max(
            differences(once(one_device, run.model, run.objective, run.precision), exact).values()
        )
    found = differences(runs.train_from_shared_start(run), exact)
    assert max(found.values()) < bound, {name: value for name, value in found.items() if not value < bound}


@pytest.mark.parametrize("case", EXACT, ids=composition.name)
def test_numbers_do_not_depend_on_the_layout_to_ten_digits(case, once):
    run = composition.experiment(case)
    with jax.enable_x64(True):
        check(run)
        found = differences(runs.train_from_shared_start(run), once(one_device, run.model, run.objective, "fp64"))
    assert max(found.values()) < BOUNDS["fp64"], {name: value for name, value in found.items() if not value < BOUNDS["fp64"]}


def test_every_setting_is_among_the_exact():
    for knob, settings in composition.KNOBS.items():
        assert knob == "precision" or {case[knob] for case in EXACT} == set(settings)


def test_every_pair_of_settings_is_covered():
    assert len(CASES) >= 60
    for a, b in composition.PAIRS:
        for x in composition.KNOBS[a]:
            for y in composition.KNOBS[b]:
                refused = (x, y) in composition.REFUSED
                assert refused or sum(case[a] == x and case[b] == y for case in CASES) >= composition.ROUNDS, (x, y)


def test_the_readme_has_the_table():
    assert tables.block("composition", composition.table(CASES)) in tables.README.read_text()


def test_training_moves_every_parameter(once):
    """Equality would mean little of gradients that are all noise."""
    run = once(one_device, runs.MODEL, CausalLM(), "fp32")
    assert np.isfinite(run["losses"]).all()
    assert run["losses"][-1] < run["losses"][0]
    assert len(set(disagreement(run["params"], run["gradients"]))) == len(disagreement(run["gradients"], run["gradients"]))


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"layout": Layout(context=2)}, {"dropout": 0.1}, "cannot drop attention weights"),
        ({"layout": Layout(context=2, tensor=4, exchange="alltoall")}, {}, "trades 1 heads"),
        ({"layout": Layout(context=8, tensor=1)}, {"context": 24, "vocab": 48}, "data.length=24 is not divisible by 2 x layout.context=8"),
        ({"layout": Layout(pipeline=4)}, {}, "model.layers=2 is not divisible by layout.pipeline=4"),
        (
            {"layout": Layout(pipeline=2, rounds=2), "microbatches": 1},
            {"layers": 4},
            "microbatches=1 is not divisible by layout.pipeline=2",
        ),
        ({"layout": Layout(rounds=2)}, {}, "layout.rounds=2 are stages of a pipeline's devices"),
        ({"layout": Layout(zero=4)}, {}, "layout.zero=4 is not one of 0, 1, 2, 3"),
        ({"layout": Layout(tensor=8)}, {}, "model.heads=4 is not divisible by layout.tensor=8"),
        ({"layout": Layout(data=16)}, {}, "the layout needs 16 devices"),
        ({"layout": Layout(data=8), "microbatches": 4}, {}, "a microbatch of 4 rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(changes, model, message):
    run = runs.experiment(**changes, model=replace(runs.MODEL, **model))
    if model.get("context") == 24:
        run = replace(run, data=replace(run.data, length=24))
    with pytest.raises(ValueError, match=message):
        check(run)
