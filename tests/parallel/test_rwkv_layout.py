"""An RWKV trained on eight devices has the numbers of one; what it cannot be split over is refused by name."""

from dataclasses import replace

import pytest

import runs
from lmx.models.config import RWKV
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.planning import compile_step
from lmx.verify import differences, shrink, verify

pytestmark = pytest.mark.usefixtures("scanned")

MODEL = RWKV(vocab=48, layers=4, embed=16, channels=24, mlp=32, context=runs.LENGTH, init_std=0.1, rescale_every=2)
FINCH = replace(MODEL, version=6, layers=2, channels=16, head_dim=4, mix_rank=4, decay_rank=6, rescale_every=0)
GOOSE = replace(FINCH, version=7, mix_rank=32, rate_rank=4, value_rank=4, gate_rank=6)
LAYOUTS = {
    "ZeRO-1, the sequence whole, remat": Layout(fsdp=4, tensor=2, zero=1, sequence=False, remat="dots"),
    "data x fsdp x tensor": Layout(data=2, fsdp=2, tensor=2),
    "interleaved pipeline": Layout(pipeline=2, rounds=2, fsdp=2, tensor=2, remat="full"),
}


def one(model: RWKV) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=model))


@pytest.mark.parametrize(
    ("model", "name"),
    [  # version 4 on three axes is among the representatives
        (MODEL, "ZeRO-1, the sequence whole, remat"),
        (MODEL, "interleaved pipeline"),
        (FINCH, "data x fsdp x tensor"),
        (GOOSE, "data x fsdp x tensor"),
    ],
    ids=lambda value: str(getattr(value, "version", value)),
)
def test_losses_gradients_and_parameters_are_those_of_one_device(model, name, once):
    layout = LAYOUTS[name]
    found = runs.train_from_shared_start(runs.experiment(model=model, layout=layout, microbatches=2 if layout.pipeline > 1 else 1))
    worst = differences(found, once(one, model))
    assert max(worst.values()) < 2e-5, sorted(worst.items(), key=lambda item: -item[1])[:5]


def test_nothing_is_moved_behind_ones_back():
    run = runs.experiment(model=replace(MODEL, layers=16, rescale_every=0), layout=Layout(fsdp=2, tensor=4))
    made = compile_step(run)
    whole = runs.ROWS // 2 * runs.LENGTH * MODEL.embed * 4
    inside = [one for one in made.collectives if one.times == 16 and one.axes == ("tensor",)]
    gathered = [one for one in inside if one.kind == "all-gather"]
    # Each sublayer's input, forward and (again) backward, the cotangents of both outputs, and that of the gate's mixture.
    assert 4 <= len(gathered) <= 7
    assert all(one.size <= whole for one in gathered)
    others = {one.kind for one in inside if one.kind not in ("all-gather", "all-reduce", "reduce-scatter")}
    assert others <= {"collective-permute"}
    assert all(one.size <= whole // runs.LENGTH for one in inside if one.kind == "collective-permute"), "of one token a row at most"


def test_verify_takes_an_rwkv_and_keeps_what_it_is():
    run = runs.experiment(model=replace(MODEL, layers=24, embed=512, channels=None), layout=Layout(data=2, tensor=4), precision="bf16")
    small = shrink(run).model
    assert isinstance(small, RWKV)
    assert (small.layers, small.rescale_every, small.tied) == (2, MODEL.rescale_every, MODEL.tied)
    assert verify(run, steps=1).right


@pytest.mark.parametrize(
    ("model", "layout", "said"),
    [
        (MODEL, Layout(context=2), "layout.context=2"),
        (MODEL, Layout(tensor=5), "model.channels"),
        (FINCH, Layout(tensor=8), "model.channels / model.head_dim"),
        (GOOSE, Layout(pipeline=2), "layout.pipeline=2 .*model.version=7"),
        (MODEL, Layout(fsdp=3), "model.embed=16 is not divisible by layout.fsdp=3"),
        (MODEL, Layout(pipeline=3), "model.layers=4 is not divisible by layout.pipeline=3"),
    ],
    ids=str,
)
def test_what_does_not_divide_is_refused_by_name(model, layout, said):
    with pytest.raises(ValueError, match=said):
        check(runs.experiment(model=model, layout=layout, batch=30))
