"""The optimizer step: loss scaling, skipped steps, clipping, dropout, precision."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.precision import GROWTH_INTERVAL
from lmx.data.pipeline import Batches
from lmx.data.recipe import prepare
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.train.experiment import resolve
from lmx.train.optimizers import SGD, AdamW, Schedule
from lmx.train.program import build


class Harness:
    """An experiment's program and batches, a step at a time."""

    def __init__(self, experiment):
        prepared = prepare(experiment.data)
        self.experiment = resolve(experiment, prepared)
        self.program = build(self.experiment)
        self.shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
        self.sharding = batch_sharding(self.program.mesh, microbatches=True)
        self.rows = local_rows(self.sharding, self.shape)
        self.batches = Batches(prepared.train, rows=experiment.batch, length=experiment.data.length, seed=0)

    def step(self, state, k, **changes):
        batch = self.batches.rows(k, self.rows) | changes
        return self.program.step(state, place(batch, self.rows, self.shape, self.sharding))


@pytest.fixture
def harness(experiment):
    return lambda **changes: Harness(experiment(**changes))


ADAM = AdamW(learning_rate=3e-3, schedule=Schedule(kind="constant", warmup=0))


def test_fp16_skips_the_step_that_overflows_halves_the_scale_and_goes_on(harness):
    h = harness(precision="fp16", optimizer=ADAM)
    state, losses = h.program.initial(), []
    for k in range(6):
        if k == 2:  # the third step overflows: a scale that fp16 gradients cannot hold
            before = jax.device_get((state.params, state.optimizer))
            state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**24)))
            state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, h.program.abstract))
        state, metrics = h.step(state, k)
        losses.append(float(metrics["loss"]))
        if k == 2:
            chex.assert_trees_all_equal(before, jax.device_get((state.params, state.optimizer)))
            assert (float(metrics["loss_scale"]), int(metrics["skipped"]), int(state.step)) == (2.0**23, 1, 3)
            state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**15)))
            state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, h.program.abstract))
    assert int(metrics["skipped"]) == 1
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3


def test_fp16_scale_finds_its_own_way_down(harness):
    h = harness(precision="fp16", optimizer=ADAM)
    state = h.program.initial()
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**24), clean=jnp.int32(GROWTH_INTERVAL - 1)))
    state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, h.program.abstract))
    scales = []
    for k in range(12):
        state, metrics = h.step(state, k)
        scales.append(float(metrics["loss_scale"]))
    assert scales[-1] == scales[-2], "the scale settles where gradients are finite"
    skipped = int(metrics["skipped"])
    assert skipped >= 1
    assert scales[-1] == 2.0 ** (24 - skipped)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_pure"])
def test_low_precision_follows_fp32(harness, precision):
    def losses(name, steps=15):
        h = harness(precision=name, optimizer=ADAM, steps=steps)
        state, found = h.program.initial(), []
        for k in range(steps):
            state, metrics = h.step(state, k)
            found.append(float(metrics["loss"]))
        return np.array(found), state

    found, state = losses(precision)
    expected, _ = losses("fp32")
    np.testing.assert_allclose(found, expected, rtol=2e-2 if precision == "bf16_pure" else 1e-2)
    held = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert held == {jnp.dtype("bfloat16" if precision == "bf16_pure" else "float32")}


def test_gradients_are_clipped_to_the_norm_and_the_norm_reported_is_before(harness):
    def moved(clip):
        flat = SGD(learning_rate=1.0, momentum=0.0, clip=clip, schedule=Schedule(kind="constant", warmup=0))
        h = harness(optimizer=flat)
        before = h.program.initial()
        start = jax.device_get(before.params)
        after, metrics = h.step(before, 0)
        difference = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(after.params), start)
        return np.sqrt(sum((d.astype(np.float64) ** 2).sum() for d in jax.tree.leaves(difference))), float(metrics["grad_norm"])

    free, norm = moved(0.0)
    np.testing.assert_allclose(free, norm, rtol=1e-4)
    short, same = moved(norm / 10)
    np.testing.assert_allclose(short, norm / 10, rtol=1e-3)
    np.testing.assert_allclose(same, norm, rtol=1e-6)


def test_accumulation_equals_the_big_batch_with_dropout_on(harness):
    states = []
    for microbatches in (1, 4):
        h = harness(microbatches=microbatches)
        state, _ = h.step(h.program.initial(), 0)
        states.append(jax.device_get(state.params))
    chex.assert_trees_all_close(*states, rtol=0, atol=2e-6)
    h = harness(model=dataclasses.replace(h.experiment.model, dropout=0.0, vocab=0))
    dry, _ = h.step(h.program.initial(), 0)
    with pytest.raises(AssertionError):  # dropout does something
        chex.assert_trees_all_close(jax.device_get(dry.params), states[0], rtol=0, atol=2e-6)


def test_unsupervised_targets_change_nothing(harness):
    h = harness()
    batch = h.batches[0]
    weights = batch["weights"].copy()
    weights[:, ::3] = 0
    other = np.where(weights == 0, (batch["targets"] + 7) % 50, batch["targets"])
    results = [h.step(h.program.initial(), 0, weights=weights, targets=targets) for targets in (batch["targets"], other)]
    chex.assert_trees_all_equal(*(jax.device_get(state.params) for state, _ in results))
