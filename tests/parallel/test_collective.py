"""Products that gather and sum a part at a time: one device's numbers, and no whole gather in a layer."""

from dataclasses import replace

import pytest

import runs
from lmx.parallel import hlo
from lmx.parallel.layout import Layout
from lmx.train import program
from lmx.train.experiment import check
from lmx.train.planning import compile_step
from lmx.verify import BOUND, differences

PARALLEL = {"parallel": True, "gated": True, "bias": False, "norm": "rmsnorm"}
EXPERTS = {"experts": 4, "expert_mlp": 8, "shared_experts": 1, "shared_gate": True, "kv_heads": 4}
CASES = {
    "a ring of four": ({"kv_heads": 4}, Layout(tensor=4, fsdp=2, zero=2)),
    "ZeRO-3, remat": ({}, Layout(tensor=2, data=2, fsdp=2, remat="full")),
    "ring attention": ({}, Layout(tensor=2, context=2, fsdp=2, remat="dots")),
    "a pipeline, parallel blocks": (PARALLEL, Layout(tensor=2, pipeline=2, fsdp=2)),
    "experts": (EXPERTS, Layout(tensor=2, expert=2, fsdp=2, zero=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_device(name):
    knobs, layout = CASES[name]
    run = runs.experiment(model=replace(runs.MODEL, **knobs), layout=replace(layout, collective_matmul=True), microbatches=2)
    check(run)
    found = differences(runs.train_from_shared_start(run), runs.train_from_shared_start(replace(run, layout=Layout())))
    assert max(found.values()) < BOUND, {name: value for name, value in found.items() if not value < BOUND}


def test_layers_gather_nothing_whole(monkeypatch):
    """Of four tensor devices each product sends three parts instead of gathering, and three instead of scattering."""
    monkeypatch.setattr(program, "SHALLOW", 0)
    model, layers = replace(runs.MODEL, kv_heads=4), runs.MODEL.layers
    run = runs.experiment(model=model, layout=Layout(tensor=4))
    whole, parted = (compile_step(replace(run, layout=replace(run.layout, collective_matmul=on))).collectives for on in (False, True))

    def times(found: list[hlo.Collective], kind: str) -> int:
        return sum(one.times for one in found if one.kind == kind and one.axes == ("tensor",))

    # Forward, attention and feed-forward each gather and sum; backward each gathers its input and its gradient again, and sums.
    assert times(parted, "collective-permute") == 3 * 2 * 5 * layers
    assert times(whole, "collective-permute") == 0
    assert times(parted, "all-gather") == 2 < times(whole, "all-gather")  # hidden states for the head, the gradient for the embedding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(fsdp=2, collective_matmul=True)}, "not of layout.tensor=1"),
        ({"layout": Layout(tensor=2, sequence=False, collective_matmul=True)}, "layout.sequence=False"),
        ({"layout": Layout(tensor=4, collective_matmul=True)}, "model.kv_heads=2 is not divisible by layout.tensor=4"),
        ({"layout": Layout(tensor=2, collective_matmul=True), "precision": "fp8"}, "not there for precision=fp8"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(runs.experiment(**changes))
