"""Loss, gradients and updates do not depend on the layout: eight devices against one."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from lmx.core.tree import disagreement
from lmx.data.pipeline import Batches
from lmx.data.recipe import prepare
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout
from lmx.train.experiment import resolve
from lmx.train.optimizers import SGD, AdamW, Schedule
from lmx.train.program import build

STEPS = 20


# Plain descent, without clipping or momentum: how far parameters moved tells their gradient.
DESCENT = SGD(learning_rate=0.25, momentum=0.0, clip=0.0, schedule=Schedule(kind="constant", warmup=0))


def train(experiment, steps=STEPS):
    """Losses by step, the first step's gradients, and the last state."""
    prepared = prepare(experiment.data)
    experiment = resolve(experiment, prepared)
    program = build(experiment)
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    sharding = batch_sharding(program.mesh, microbatches=True)
    rows = local_rows(sharding, shape)
    batches = Batches(prepared.train, rows=experiment.batch, length=experiment.data.length, seed=0)
    state, losses, gradient = program.initial(), [], None
    for k in range(steps):
        before = jax.device_get(state.params) if k == 0 else None
        state, metrics = program.step(state, place(batches.rows(k, rows), rows, shape, sharding))
        losses.append(float(metrics["loss"]))
        if k == 0:
            gradient = jax.tree.map(
                lambda a, b: (np.asarray(a, np.float64) - b) / DESCENT.learning_rate, before, jax.device_get(state.params)
            )
    return np.array(losses), gradient, state


LAYOUTS = {
    "data=8": Layout(data=8),
    "fsdp=8": Layout(fsdp=8),
    "tensor=4 data=2": Layout(tensor=4, data=2),
    "data=2 fsdp=2 tensor=2": Layout(data=2, fsdp=2, tensor=2),
    "remat full": Layout(remat="full", fsdp=2),
    "remat dots": Layout(remat="dots"),
    "ordered": Layout(data=4, ordered=8),
}


@pytest.fixture(scope="module")
def one_device():
    """The same run on one device, computed once."""
    found = []

    def of(experiment):
        if not found:
            found.append(train(experiment(optimizer=DESCENT)))
        return found[0]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_of_twenty_steps_and_every_gradient_equal_one_devices(name, experiment, one_device):
    losses, gradient, state = train(experiment(layout=LAYOUTS[name], optimizer=DESCENT))
    expected, reference, _ = one_device(experiment)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # How far a parameter moved tells its gradient to the last place of the parameter: of a norm's scale near 1, 5e-7 of a gradient of 0.016.
    assert max(disagreement(gradient, reference).values()) < 5e-5
    assert expected[-1] < expected[0] - 0.5, "twenty steps must learn, or equality means little"
    chex.assert_tree_all_finite(state.params)


def test_parameters_and_optimizer_state_are_sharded_not_copied(experiment):
    prepared = prepare(experiment().data)
    whole, split = (
        build(resolve(experiment(layout=layout, optimizer=AdamW()), prepared)).initial() for layout in (Layout(), Layout(fsdp=4, tensor=2))
    )

    def bytes_on_first_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    for part in ("params", "optimizer"):
        ratio = bytes_on_first_device(getattr(split, part)) / bytes_on_first_device(getattr(whole, part))
        assert ratio < 1.3 / 8, f"{part}: a device of eight holds {ratio:.2f} of all"


def test_few_key_heads_are_replicated_over_more_tensor_shards(experiment):
    model = dataclasses.replace(experiment().model, kv_heads=1)
    losses, _, _ = train(experiment(model=model, layout=Layout(tensor=4)), 3)
    expected, _, _ = train(experiment(model=model), 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_initial_values_are_the_same_on_every_mesh(experiment):
    prepared = prepare(experiment().data)
    one, eight = (build(resolve(experiment(layout=layout), prepared)).initial() for layout in (Layout(), Layout(fsdp=4, tensor=2)))
    chex.assert_trees_all_equal(jax.device_get(one.params), jax.device_get(eight.params))
