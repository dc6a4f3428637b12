"""The field's own bugs, planted: lmx with a patch that re-creates each, and the check that is green without it and turns red."""

import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import runs
import tables
from lmx.core.params import is_spec
from lmx.core.precision import all_finite
from lmx.data import Batches, ByteTokenizer, Document, build_store, iterate
from lmx.data.pipeline import BatchIterator, _Window
from lmx.kernels import dense
from lmx.models import attention, dropout, losses, transformer
from lmx.parallel import context, manual, pipeline, tensor
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.rules import partition, rules
from lmx.train import program, state, step
from lmx.train.experiment import Experiment
from lmx.verify import BOUND, Report, packed, verify

TESTS = Path(__file__).parents[1]

TENSOR = runs.experiment(layout=Layout(tensor=2), model=replace(runs.MODEL, dropout=0.1))
CONTEXT = runs.experiment(layout=Layout(data=2, context=2), microbatches=2)
RING = runs.experiment(layout=Layout(context=2))
PIPELINE = runs.experiment(layout=Layout(pipeline=2), microbatches=2)
OVERFLOW = runs.experiment(layout=Layout(fsdp=2), precision="fp16")

Patch = pytest.MonkeyPatch


class Changed:
    """A module with some names changed: for one that uses it, where a patch of the module itself would reach all."""

    def __init__(self, module: ModuleType, **names):
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def change_psum(patch: Patch, module: ModuleType, psum: Callable) -> None:
    """Changes `jax.lax.psum` as one module sees it."""
    patch.setattr(module, "jax", Changed(jax, lax=Changed(jax.lax, psum=psum)))


def change_weights(patch: Patch, change: Callable) -> None:
    """Changes what each device of a mesh takes its tokens' weights for."""

    def manually(local, *specs):
        return manual.manual(lambda head, hidden, targets, weights: local(head, hidden, targets, change(weights)), *specs)

    patch.setattr(losses, "manual", Changed(manual, manual=manually))


def loss_times_context(patch: Patch) -> None:
    def on_mesh(*args, **knobs):
        times = manual.axes().get("context", 1)
        return jax.tree.map(lambda a: times * a, exact(*args, **knobs))

    exact = losses._on_mesh
    patch.setattr(losses, "_on_mesh", on_mesh)


def mean_of_a_rank_first(patch: Patch) -> None:
    change_weights(patch, lambda weights: weights / weights.sum() * weights.sum())


def ranks_count_the_same(patch: Patch) -> None:
    def change(weights):
        mine = weights.sum()
        return jnp.where(mine > 0, weights * jax.lax.pmean(mine, "context") / mine, 0)

    change_weights(patch, change)


def key_gradients_go_astray(patch: Patch) -> None:
    def backward(_, g):
        n = jax.lax.axis_size("context")
        return (jax.lax.ppermute(g, "context", [(i, (i + 1) % n) for i in range(n)]),)

    astray = jax.custom_vjp(lambda a: a)
    astray.defvjp(lambda a: (a, None), backward)
    exact = context.ring
    patch.setattr(context, "ring", lambda q, k, v, *rest, **knobs: exact(q, astray(k), astray(v), *rest, **knobs))


def logits_gathered_already(patch: Patch) -> None:
    def chunk(static, head, *args, gradients):
        if static.axis is None:
            return exact(static, head, *args, gradients=gradients)
        everything = jax.lax.all_gather(head, static.axis, tiled=True)
        sums, d_head, d_hidden = exact(static, everything, *args, gradients=gradients)
        return sums, jax.lax.psum_scatter(d_head, static.axis, tiled=True) if gradients else None, d_hidden

    exact = losses._chunk
    patch.setattr(losses, "_chunk", chunk)


def seed_of_each_rank(patch: Patch) -> None:
    def values(key, specs, dtype):
        def local(key):
            return exact(jax.random.fold_in(key, jax.lax.axis_index("tensor")), specs, dtype)

        return manual.manual(local, P(), P())(key) if manual.axes() else exact(key, specs, dtype)

    exact = state.initial_values
    patch.setattr(state, "initial_values", values)


def dropout_of_each_rank(patch: Patch) -> None:
    def keep(shared, *site):
        def local(key, rows):
            key = jax.random.fold_in(key, jax.lax.axis_index("tensor"))
            return exact(shared.replace(key=key, example_id=rows), *site)

        return manual.manual(local, P(), P())(shared.key, shared.example_id) if manual.axes() else exact(shared, *site)

    exact = dropout.keep
    patch.setattr(dropout, "keep", keep)


def mean_of_means(patch: Patch) -> None:
    def accumulate(task):
        def value_and_grad(params, batch, key, seed):
            weights = batch["weights"]
            means = weights / weights.sum((1, 2), keepdims=True) / len(weights)
            return added(params, batch | {"weights": means * weights.sum()}, key, seed)

        added = exact(task)
        return value_and_grad

    exact = program.accumulate
    patch.setattr(program, "accumulate", accumulate)


def no_segments_on_a_mesh(patch: Patch) -> None:
    def attend(q, k, v, mask, *rest, **knobs):
        if manual.axes():
            mask = mask.replace(query_segments=None, key_segments=None)
        return exact(q, k, v, mask, *rest, **knobs)

    exact = attention.attend
    patch.setattr(attention, "attend", attend)


def no_segments_in_a_kernel(patch: Patch) -> None:
    def kernel(q, k, v, mask, **knobs):
        return exact(q, k, v, mask.replace(query_segments=None, key_segments=None), **knobs)

    exact = dense.attention
    patch.setattr(dense, "attention", kernel)


def is_gradient(a) -> bool:
    return isinstance(a, jax.Array) and a.ndim == 2


def head_not_summed(patch: Patch) -> None:
    change_psum(patch, tensor, lambda a, axes: a if is_gradient(a) else jax.lax.psum(a, axes))


def head_summed_twice(patch: Patch) -> None:
    def psum(a, axes):
        total = jax.lax.psum(a, axes)
        return jax.lax.psum(total, "data") if is_gradient(a) else total

    change_psum(patch, tensor, psum)


def table_not_shared(patch: Patch) -> None:
    change_psum(patch, pipeline, lambda a, axes: a if isinstance(a, dict) else jax.lax.psum(a, axes))


def overflow_of_each_rank(patch: Patch) -> None:
    def finite(gradients):
        split = rules(OVERFLOW.layout, split=True)
        where = jax.tree.map(lambda s: partition(s.axes, s.shape, split, manual.axes()), transformer.specs(OVERFLOW.model), is_leaf=is_spec)
        return manual.manual(all_finite, (where,), P())(gradients)

    patch.setattr(step, "all_finite", finite)


def cursor_of_each_process(patch: Patch) -> None:
    """A process counts from its own first row: right for one that goes on from what it saved itself."""

    def start(self, batches, at, which, *rest):
        exact(self, batches, at or int(which[0]), which, *rest)

    exact, window = BatchIterator.__init__, _Window.__init__
    patch.setattr(BatchIterator, "__init__", start)
    patch.setattr(_Window, "__init__", lambda self, batches, at, which: window(self, batches, at, which - which[0]))


def two_processes_resume_from_what_the_first_saved(folder: Path) -> None:
    """Two processes that go on from the first one's data position read what one process would have."""
    texts = [Document(str(d), "To be, or not to be: that is the question. " * (1 + d % 3), "test") for d in range(20)]
    batches = Batches(build_store(texts, ByteTokenizer(), folder / "store"), rows=4, length=16, seed=0)
    halves, positions = (range(2), range(2, 4)), []
    for rows in halves:
        with iterate(batches, rows=rows) as reader:
            found = [batch["tokens"] for batch in islice(reader, 3)]
            positions.append(reader.get_state()["example"])
        np.testing.assert_array_equal(found, [batches[k]["tokens"][rows] for k in range(3)])
    for rows in halves:
        with iterate(batches, start_example=positions[0], rows=rows) as reader:
            np.testing.assert_array_equal(next(reader)["tokens"], batches[3]["tokens"][rows])


def an_overflow_on_one_device_is_skipped_on_all(folder: Path) -> None:
    """One number of one device's share of the gradient is infinite: parameters and optimizer stay as they were, everywhere."""

    def overflowing(task):
        def value_and_grad(*args):
            sums, gradient = exact(task)(*args)
            return sums, gradient | {"embed": gradient["embed"].at[0, 0].set(jnp.inf)}

        return value_and_grad

    exact = program.accumulate
    with Patch.context() as patch:
        patch.setattr(program, "accumulate", overflowing)
        built = program.build(OVERFLOW)
    sharding, shape = batch_sharding(built.mesh, microbatches=True), (1, OVERFLOW.batch)
    rows, before = local_rows(sharding, shape), built.initial()
    held = jax.device_get((before.params, before.optimizer))
    after, metrics = built.step(before, place(packed(OVERFLOW, 0), rows, shape, sharding))
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((after.params, after.optimizer)), held)


def loss_and_gradient_do_not_depend_on_how_examples_are_grouped(folder: Path) -> None:
    """`tests/train/test_regrouping.py`, of one example."""
    spec = importlib.util.spec_from_file_location("regrouping", TESTS / "train" / "test_regrouping.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    test = module.test_loss_and_gradient_do_not_depend_on_how_examples_are_grouped.hypothesis.inner_test
    test("padding rows", [list(range(i, i + 3 + i % 5)) for i in range(module.TEXTS)], 0)


@dataclass(frozen=True)
class Plant:
    """A bug.

    Attributes:
      name: what is wrong.
      seen: where the field had it, or much like it.
      patch: plants it.
      check: what sees it: `verify` of an experiment, or a function of an empty folder that raises AssertionError.
      wrong: all that `verify` finds wrong, of losses and gradients.
      steps: how many it takes. After more than one, losses show what is wrong with gradients.
    """

    name: str
    seen: str
    patch: Callable[[Patch], None]
    check: Experiment | Callable[[Path], None]
    wrong: tuple[str, ...] = ("losses", "gradients")
    steps: int = 1


GRADIENTS = ("gradients",)
PLANTS = [
    Plant("loss multiplied by the number of context ranks", "Megatron-LM#673, #906", loss_times_context, CONTEXT),
    Plant("each context rank's tokens averaged apart", "Megatron-LM#7452", ranks_count_the_same, CONTEXT),
    Plant("0 / 0 on a rank whose tokens are all masked", "Megatron-LM#1764", mean_of_a_rank_first, RING, ("losses",), 2),
    Plant("gradients of keys and values at the wrong context rank", "Megatron-LM#1464", key_gradients_go_astray, CONTEXT, GRADIENTS),
    Plant("logits gathered before a vocabulary-parallel loss", "Megatron-LM#7452", logits_gathered_already, TENSOR, ("losses",)),
    Plant("initial values from each tensor rank's own seed", "torchtitan#1750", seed_of_each_rank, TENSOR),
    Plant("dropout masks that differ between tensor ranks", "Megatron-LM#1256", dropout_of_each_rank, TENSOR),
    Plant("mean of the microbatches' means", "transformers#34191, #35651", mean_of_means, CONTEXT),
    Plant("segment mask dropped where attention is sharded", "maxtext#878", no_segments_on_a_mesh, CONTEXT),
    Plant(
        "segment mask ignored by an attention kernel",
        "maxtext#4476, trl#1230, #3067",
        no_segments_in_a_kernel,
        loss_and_gradient_do_not_depend_on_how_examples_are_grouped,
    ),
    Plant("a gradient not summed over ranks", "Megatron-LM#1446, #7452", head_not_summed, CONTEXT, GRADIENTS),
    Plant("a gradient summed over ranks twice", "Paddle#30437", head_summed_twice, CONTEXT, GRADIENTS),
    Plant("tied embedding not summed over first and last stage", "Megatron-LM#844", table_not_shared, PIPELINE, GRADIENTS),
    Plant(
        "a step skipped by the rank that overflowed alone, whose parameters are then stale",
        "ColossalAI#1175",
        overflow_of_each_rank,
        an_overflow_on_one_device_is_skipped_on_all,
    ),
    Plant(
        "a data position of each rank's own, saved by the first",
        "torchtitan#291, prime-rl#1035",
        cursor_of_each_process,
        two_processes_resume_from_what_the_first_saved,
    ),
]


def table() -> str:
    """Which check sees which bug, as Markdown."""

    def sees(plant: Plant) -> str:
        if not isinstance(plant.check, Experiment):
            return f"`test_{plant.check.__name__}`"
        run = plant.check
        knobs = [f"{axis} {getattr(run.layout, axis)}" for axis in AXES if getattr(run.layout, axis) > 1]
        knobs += [f"microbatches {run.microbatches}"] if run.microbatches > 1 else []
        return f"`lmx.verify` on {', '.join(knobs)}: {' and '.join(plant.wrong)}"

    lines = ["| bug | as in | what turns red |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {plant.name} | {plant.seen} | {sees(plant)} |" for plant in PLANTS])


@cache
def clean(run: Experiment) -> Report:
    return verify(run)


@contextmanager
def planted(plant: Plant):
    jax.clear_caches()  # of what was traced without the patch, and then with it
    with Patch.context() as patch:
        plant.patch(patch)
        yield
    jax.clear_caches()


@pytest.mark.parametrize("plant", [p for p in PLANTS if isinstance(p.check, Experiment)], ids=lambda p: p.name)
def test_verify_sees(plant):
    assert clean(plant.check).right
    with planted(plant):
        report = verify(plant.check, plant.steps)
    assert not report.right
    beyond = {name.split("/")[0] for name, value in report.worst.items() if not value <= report.bound}
    assert tuple(part for part in ("losses", "gradients") if part in beyond) == plant.wrong


def test_fp64_sees_what_passes_for_rounding_in_fp32():
    """A gradient that is too large by a millionth."""

    def accumulate(task):
        def value_and_grad(*args):
            sums, gradient = exact(task)(*args)
            return sums, jax.tree.map(lambda g: g * (1 + 1e-6), gradient) if manual.axes() else gradient

        return value_and_grad

    exact = program.accumulate
    with jax.enable_x64(True), Patch.context() as patch:
        patch.setattr(program, "accumulate", accumulate)
        report = verify(replace(RING, precision="fp64"))
    assert not report.right
    assert report.bound < max(report.worst.values()) < BOUND


@pytest.mark.parametrize("plant", [p for p in PLANTS if not isinstance(p.check, Experiment)], ids=lambda p: p.name)
def test_the_suite_sees(plant, tmp_path):
    with planted(plant), pytest.raises(AssertionError, match=r"[Nn]ot equal"):
        plant.check(tmp_path)


# Without the patch they are tests like any other.
def test_two_processes_resume_from_what_the_first_saved(tmp_path):
    two_processes_resume_from_what_the_first_saved(tmp_path)


def test_an_overflow_on_one_device_is_skipped_on_all(tmp_path):
    an_overflow_on_one_device_is_skipped_on_all(tmp_path)


def test_the_readme_has_the_table():
    assert tables.block("planted bugs", table()) in tables.README.read_text()
