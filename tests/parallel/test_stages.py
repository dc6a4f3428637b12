"""Pipelines: schedules by simulation, their memory from the compiled program, evaluation, and layers in their order on disk."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import runs
from lmx.core.params import is_spec
from lmx.parallel import pipeline
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.offload import HOST
from lmx.train.program import build, mean_over
from lmx.verify import packed

SCHEDULES = [
    pipeline.schedule(Layout(pipeline=p, rounds=v, schedule=kind), m)
    for kind in ("1f1b", "gpipe")
    for p, v, m in ((2, 1, 1), (2, 1, 4), (3, 1, 2), (4, 1, 8), (5, 1, 7), (2, 2, 4), (4, 2, 8), (3, 4, 6))
]


@pytest.mark.parametrize("plan", SCHEDULES, ids=str)
def test_every_item_finds_what_it_needs_when_it_runs(plan):
    """Each tick: forwards, then backwards. What arrives was sent in the tick before; a kept input is there until its backward."""
    total = plan.ticks[0] + plan.ticks[1] + plan.ticks[2]
    done, undone, kept = {}, {}, [{} for _ in range(plan.stages)]
    for t in range(total):
        ahead, back = t < plan.ticks[0] + plan.ticks[1], t >= plan.ticks[0]
        for device in range(plan.stages):
            item = plan.forward(np.int32(t), np.int32(device))
            if not item.valid:
                continue
            assert ahead, "a forward in a tick that runs none"
            stage = int(item.turn) * plan.stages + device
            m = int(item.microbatch)
            assert stage == 0 or done[m, stage - 1] == t - 1
            done[m, stage] = t
            kept[device][int(item.slot)] = m, stage
        for device in range(plan.stages):
            item = plan.backward(np.int32(t), np.int32(device))
            if not item.valid:
                continue
            assert back, "a backward in a tick that runs none"
            stage = int(item.turn) * plan.stages + device
            m, last = int(item.microbatch), plan.stages * plan.rounds - 1
            assert kept[device][int(item.slot)] == (m, stage), "the kept input was overwritten"
            assert done[m, stage] <= t
            assert undone[m, stage + 1] == t - 1 if stage < last else True
            undone[m, stage] = t
    everything = {(m, stage) for m in range(plan.microbatches) for stage in range(plan.stages * plan.rounds)}
    assert set(done) == set(undone) == everything
    assert max(slot for device in kept for slot in device) < plan.kept


@pytest.mark.parametrize("plan", SCHEDULES, ids=str)
def test_the_bubble_is_what_theory_says(plan):
    p, v, m = plan.stages, plan.rounds, plan.microbatches
    assert plan.bubble == pytest.approx((p - 1) / (m * v + p - 1))


def test_memory_of_1f1b_is_bounded_by_the_stages_and_that_of_gpipe_grows_with_the_microbatches():
    def temporaries(schedule: str, microbatches: int) -> int:
        model = dataclasses.replace(runs.MODEL, layers=2, embed=64, heads=2, kv_heads=2, mlp=64)
        run = runs.experiment(model=model, layout=Layout(pipeline=2, schedule=schedule), batch=8 * microbatches, microbatches=microbatches)
        program = build(run)
        shape = (microbatches, 8)
        batch = {n: jax.ShapeDtypeStruct((*shape, *a.shape[1:]), a.dtype) for n, a in packed(run, 0).items()}
        with jax.set_mesh(program.mesh):
            analysis = program.step.jitted.lower(program.abstract, batch).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    few, many = 4, 32
    stage_input = 8 * runs.LENGTH * 64 * 4
    bounded, growing = (temporaries(s, many) - temporaries(s, few) for s in ("1f1b", "gpipe"))
    assert bounded < 2 * stage_input, "1F1B keeps more for more microbatches"
    assert growing > 0.9 * (many - few) * stage_input, "GPipe keeps every microbatch's input"


@pytest.mark.parametrize("layout", [Layout(pipeline=2, data=2), Layout(pipeline=2, rounds=2, tensor=2)], ids=str)
def test_evaluation_goes_through_the_stages_too(layout):
    model = dataclasses.replace(runs.MODEL, layers=4)

    def means(layout):
        run = runs.experiment(model=model, layout=layout, microbatches=2)
        program = build(run)
        sharding = batch_sharding(program.mesh, microbatches=False)
        rows = local_rows(sharding, (run.batch,))
        batches = [place({n: a[rows] for n, a in packed(run, k).items()}, rows, (run.batch,), sharding) for k in range(2)]
        return mean_over(program.evaluate, program.initial().params, batches)

    found, expected = means(layout), means(Layout())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_layers_of_rounds_lie_in_their_order_once_they_leave_the_mesh():
    model = dataclasses.replace(runs.MODEL, layers=8)
    programs = [build(runs.experiment(model=model, layout=layout)) for layout in (Layout(), Layout(pipeline=2, rounds=2))]
    plain, rounds = (program.initial() for program in programs)
    spec = jax.tree.leaves(programs[1].specs["layers"], is_leaf=is_spec)[0]
    assert spec.layers == (0, 1, 4, 5, 2, 3, 6, 7)
    held = jax.device_get(rounds.params["layers"])
    natural = programs[1].natural(rounds)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(natural.params), jax.device_get(plain.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(programs[1].arranged(natural).params["layers"]), held)


def test_so_do_layers_in_the_hosts_memory():
    layout = Layout(pipeline=2, rounds=2)
    where = NamedSharding(make_mesh(layout), P("pipeline"), memory_kind=HOST)
    held = {"layers": jax.device_put(np.array([0.0, 1, 4, 5, 2, 3, 6, 7]), where)}
    natural = pipeline.natural(held, layout)
    np.testing.assert_array_equal(natural["layers"], np.arange(8.0))
    again = pipeline.natural(natural, layout, back=True)
    np.testing.assert_array_equal(again["layers"], held["layers"])
    assert natural["layers"].sharding == again["layers"].sharding == where
