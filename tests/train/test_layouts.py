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


def train(experiment, steps=STEPS):
    """Losses by step, the first step's gradients (by plain SGD: how parameters moved), and the last parameters."""
    prepared = prepare(experiment.data)
    experiment = resolve(experiment, prepared)
    program = build(experiment)
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    sharding = batch_sharding(program.mesh, microbatches=True)
    rows = local_rows(sharding, shape)
    batches = Batches(prepared.train, rows=experiment.batch, length=experiment.data.length, seed=0)
    state, losses = program.initial(), []
    for k in range(steps):
        state, metrics = program.step(state, place(batches.rows(k, rows), rows, shape, sharding))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.params), state


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
def plain(text):
    return {}


@pytest.fixture
def one_device(plain, experiment):
    """Runs on one device, computed once."""

    def of(key, **changes):
        if key not in plain:
            plain[key] = train(experiment(**changes), changes.get("steps", STEPS))
        return plain[key]

    return of


# One step of plain descent at rate 1 without clipping moves parameters by exactly their gradient.
GRADIENT = SGD(learning_rate=1.0, momentum=0.0, clip=0.0, schedule=Schedule(kind="constant", warmup=0))


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_of_twenty_steps_and_every_gradient_equal_one_devices(name, experiment, one_device):
    layout = LAYOUTS[name]
    adam = AdamW(learning_rate=3e-3, schedule=Schedule(warmup=5))
    losses, _, state = train(experiment(layout=layout, optimizer=adam, steps=STEPS))
    expected, _, _ = one_device("adam", optimizer=adam, steps=STEPS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < expected[0] - 0.5, "twenty steps must learn, or equality means little"
    chex.assert_tree_all_finite(state.params)

    _, moved, _ = train(experiment(layout=layout, optimizer=GRADIENT, steps=1), 1)
    _, reference, _ = one_device("gradient", optimizer=GRADIENT, steps=1)
    start = jax.device_get(build(resolve(experiment(), prepare(experiment().data))).initial().params)

    def gradient(params):
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, start, params)

    assert max(disagreement(gradient(moved), gradient(reference)).values()) < 2e-5


def test_parameters_and_optimizer_state_are_sharded_not_copied(experiment):
    prepared = prepare(experiment().data)
    whole, split = (build(resolve(experiment(layout=layout, optimizer=AdamW()), prepared)).initial() for layout in (Layout(), Layout(fsdp=4, tensor=2)))

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
