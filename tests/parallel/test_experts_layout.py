"""Mixtures of experts under every layout: loss, gradients and parameters after three steps are one device's."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import runs
from lmx.core.tree import disagreement, named_leaves
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.objectives import CausalLM
from lmx.train.program import build

pytestmark = pytest.mark.usefixtures("compiled_here")

OBJECTIVE = CausalLM(balance_loss=0.2, router_z_loss=0.05, z_loss=1e-3)
DROPLESS = replace(runs.MODEL, experts=4, expert_mlp=8, shared_experts=1)
CAPACITY = replace(DROPLESS, expert_capacity=0.75)
MIXED = replace(CAPACITY, layers=4, pattern=("global_dense", "local"), window=6, norm_placement="post", bias=False)
MODELS = {"dropless": DROPLESS, "capacity": CAPACITY, "capacity, mixed": MIXED, "dropless, parallel": replace(DROPLESS, parallel=True)}

LAYOUTS = {
    "expert=2": Layout(expert=2),
    "expert=4 data=2": Layout(expert=4, data=2),
    "expert=2 fsdp=2 tensor=2": Layout(expert=2, fsdp=2, tensor=2),
    "expert=2 fsdp=2 zero=1": Layout(expert=2, fsdp=2, zero=1),
    "expert=2 fsdp=2 zero=2": Layout(expert=2, fsdp=2, zero=2),
    "expert=4 tensor=2, sequence whole": Layout(expert=4, tensor=2, sequence=False),
    "fsdp=2 tensor=4": Layout(fsdp=2, tensor=4),
    "expert=2 fsdp=2 remat full": Layout(expert=2, fsdp=2, remat="full"),
    "expert=2 tensor=2 remat dots": Layout(expert=2, tensor=2, remat="dots"),
    "pipeline=2 expert=2 fsdp=2": Layout(pipeline=2, expert=2, fsdp=2),
    "pipeline=2 expert=2 tensor=2": Layout(pipeline=2, expert=2, tensor=2),
    "ordered": Layout(data=2, ordered=4),
    "ring=2 expert=2 tensor=2": Layout(context=2, expert=2, tensor=2),
    "alltoall=2 expert=2 fsdp=2": Layout(context=2, exchange="alltoall", expert=2, fsdp=2),
}
CASES = {
    "dropless": (
        "expert=2", "expert=4 data=2", "expert=2 fsdp=2 tensor=2", "expert=2 fsdp=2 zero=1", "fsdp=2 tensor=4", "expert=2 fsdp=2 remat full",
        "pipeline=2 expert=2 fsdp=2", "pipeline=2 expert=2 tensor=2", "ring=2 expert=2 tensor=2", "alltoall=2 expert=2 fsdp=2",
    ),
    "capacity": (
        "expert=4 data=2", "expert=2 fsdp=2 tensor=2", "expert=2 fsdp=2 zero=2", "expert=4 tensor=2, sequence whole",
        "expert=2 tensor=2 remat dots", "pipeline=2 expert=2 fsdp=2", "pipeline=2 expert=2 tensor=2", "ordered",
    ),
    "capacity, mixed": ("pipeline=2 expert=2 fsdp=2",),
    "dropless, parallel": ("expert=2 fsdp=2 tensor=2",),
}  # fmt: skip


def one_device(model: str) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=MODELS[model], objective=OBJECTIVE))


def compare(once, model: str, layout: Layout, microbatches: int = 2):
    run = runs.experiment(model=MODELS[model], objective=OBJECTIVE, layout=layout, microbatches=microbatches)
    check(run)
    found, expected = runs.train_from_shared_start(run), once(one_device, model)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    for part in ("gradients", "params"):
        assert max(disagreement(found[part], expected[part]).values()) < 2e-5, part


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model, layouts in CASES.items() for layout in layouts])
def test_numbers_do_not_depend_on_the_layout(model, layout, once):
    compare(once, model, LAYOUTS[layout])


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("model", ["dropless", "capacity"])
@pytest.mark.parametrize("microbatches", [2, 8])
def test_numbers_do_not_depend_on_how_sequences_are_grouped(model, microbatches, once):
    compare(once, model, Layout(), microbatches)


def test_the_runs_drop_tokens_and_train_every_part(once):
    """Equality would mean little of a mixture that drops none, or whose gradients are zero."""
    run = runs.experiment(model=CAPACITY, objective=OBJECTIVE)
    program = build(run)
    metrics = jax.device_get(program.step(program.initial(), {name: a[None] for name, a in flat(0).items()})[1])
    assert 0.05 < metrics["dropped"] < 0.7
    assert metrics["loss"] == pytest.approx(
        metrics["cross_entropy"] + metrics["z_loss"] + 2 * (0.2 * metrics["balance"] + 0.05 * metrics["router_z"]), rel=1e-5
    )
    for name, gradient in named_leaves(once(one_device, "capacity")["gradients"]).items():
        assert np.abs(gradient).max() > 1e-7 or "bias" in name, name


def flat(step: int) -> dict:
    return {name: a.reshape(-1, *a.shape[2:]) for name, a in runs.batch(step, 1).items()}


def test_tokens_travel_by_all_to_all_and_experts_stay():
    """Counts of what crosses devices in a compiled step."""

    def compiled(model: str, **degrees) -> str:
        program = build(runs.experiment(model=MODELS[model], objective=OBJECTIVE, layout=Layout(**degrees)))
        shapes = {name: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for name, a in flat(0).items()}
        with jax.set_mesh(program.mesh):
            return program.step.jitted.lower(program.abstract, shapes).compile().as_text()

    text = compiled("capacity", expert=4)
    # Two layers; there and back, forward and backward.
    assert text.count(" all-to-all(") == 8
    assert text.count(" all-gather(") == 0
    text = compiled("dropless", expert=4)
    assert text.count(" all-to-all(") == 0


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        (Layout(expert=8), DROPLESS, "model.experts=4 is not divisible by layout.expert=8"),
        (
            Layout(tensor=4),
            replace(DROPLESS, expert_mlp=6),
            r"the experts' width \(model.expert_mlp\)=6 is not divisible by layout.tensor=4",
        ),
        (Layout(context=2), CAPACITY, "model.expert_capacity=0.75 counts an expert's slots along a whole sequence"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(layout, model, message):
    with pytest.raises(ValueError, match=message):
        check(runs.experiment(layout=layout, model=model))
