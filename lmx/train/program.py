"""An experiment made runnable: its functions compiled for its mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps

import jax
from jax.sharding import AbstractMesh, Mesh

from lmx.core.execution import Execution
from lmx.core.precision import Precision, policy
from lmx.core.tree import Tree
from lmx.models.families import functions
from lmx.parallel import overlap, pipeline
from lmx.parallel.feed import batch_sharding
from lmx.parallel.host import compiled_here, keep_pages, on_cpus
from lmx.parallel.layout import make_mesh
from lmx.parallel.ordered import ordered
from lmx.parallel.rules import rules
from lmx.train import optimizers
from lmx.train.experiment import Experiment
from lmx.train.objectives import Batch
from lmx.train.state import TrainState, initial_state, state_shardings
from lmx.train.step import Task, ValueAndGrad, accumulate, make_evaluation, make_step
from lmx.train.update import at_once, layer_by_layer

SHALLOW = 12
"""Up to this depth the scan over layers is unrolled on a CPU: 5 to 15% faster there, for a compile time that grows with depth."""
DEEP = 24
"""The same on one GPU, where a loop copies whatever a layer keeps, there and back. On several it stays: each trip gathers its own layer."""


@dataclass(frozen=True)
class Program:
    """What a run computes, each function entering the mesh by itself.

    Attributes:
      specs: the parameter table.
      initial: the state before the first step.
      step: from a state (donated) and a batch `[microbatches, rows, ...]` to the next state and its metrics.
      value_and_grad: the step's gradient alone (`lmx.train.step.ValueAndGrad`), placed as the step has it.
      evaluate: from parameters and a batch `[rows, ...]` to sums.
      natural: a state, or parameters, with layers in their order: what is saved and sampled from. A pipeline with rounds holds another.
      arranged: the inverse of `natural`.
      abstract: the state's shapes, types and shardings, to restore into (in natural order).
    """

    experiment: Experiment
    precision: Precision
    specs: Tree
    mesh: Mesh
    initial: Callable[[], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    value_and_grad: ValueAndGrad
    evaluate: Callable[[Tree, Batch], dict[str, jax.Array]]
    natural: Callable[[Tree], Tree]
    arranged: Callable[[Tree], Tree]
    abstract: TrainState


def build(experiment: Experiment, mesh: Mesh | AbstractMesh | None = None) -> Program:
    """Makes the program of an experiment whose vocabulary is settled (`lmx.train.experiment.resolve`); compiles on first use.

    Args:
      mesh: that of its layout; over the devices at hand when None, an abstract one to lower what will not run here.
    """
    keep_pages()
    model, layout, precision = experiment.model, experiment.layout, policy(experiment.precision)
    mesh, specs = mesh or make_mesh(layout), pipeline.arranged(functions(model).specs(model), layout)
    recipe = partial(optimizers.build, experiment.optimizer, experiment.steps)
    transform, rate = recipe(specs)
    on_cpu = on_cpus(mesh)
    depth = SHALLOW if on_cpu else DEEP if mesh.size == 1 else 0
    unroll = model.layers if model.layers <= depth and not layout.ordered else 1
    plain = layout.ordered > 0
    told = "params" in layout.offload or (model.shared_layers and not on_cpu)
    execution = Execution(
        rules=None if plain else rules(layout),
        split=None if plain else rules(layout, split=layout.zero >= 2),
        rest=rules(layout, split=True) if layout.zero == 3 and told else None,
        exchange=layout.exchange,
        collective_matmul=layout.collective_matmul,
        precision=precision,
        # Of its own accord the door takes cuDNN's for a chip, which cannot be lowered where there are no devices.
        attention="xla" if layout.attention == "auto" and not isinstance(mesh, Mesh) else layout.attention,
        remat=layout.remat,
        sites=layout.sites,
        offload="activations" in layout.offload,
        unroll=unroll,
    )
    task = Task(model, experiment.objective, execution)
    value_and_grad, sums = accumulate(task), task.sums
    if layout.ordered:
        value_and_grad = ordered(value_and_grad, layout.ordered)
    elif layout.pipeline > 1:
        staged = task.staged()
        value_and_grad, sums = pipeline.value_and_grad(staged, layout), pipeline.sums(staged, layout)
    start = partial(initial_state, experiment.seed, specs, transform, precision)
    shapes = jax.eval_shape(start)
    shardings = state_shardings(specs, shapes, mesh, layout)

    # Optimised code rounds a normal number differently in a vector loop and in its remainder, so by where a shard ends.
    exactly = {"xla_backend_optimization_level": 0} if on_cpu else None
    # XLA:CPU's concurrent scheduler runs collectives inside a branch and outside it in any order: devices then wait for each other for ever.
    in_turn = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if on_cpu and layout.pipeline > 1 else None
    update = layer_by_layer(lambda part: recipe(part)[0], specs) if layout.streamed else at_once(transform)
    step = make_step(task, value_and_grad, update, rate, experiment.optimizer.clip)
    placed, on = batch_sharding(mesh, microbatches=True), partial(_on, mesh, precision)
    return Program(
        experiment,
        precision,
        specs,
        mesh,
        initial=on(jax.jit(start, out_shardings=shardings, compiler_options=exactly)),
        step=on(
            jax.jit(
                step,
                in_shardings=(shardings, placed),
                out_shardings=(shardings, None),
                donate_argnums=0,
                compiler_options=in_turn or overlap.options(mesh, layout),
            ),
        ),
        value_and_grad=on(jax.jit(value_and_grad, compiler_options=in_turn)),
        evaluate=on(jax.jit(make_evaluation(task, sums), compiler_options=in_turn)),
        natural=partial(pipeline.natural, layout=layout),
        arranged=partial(pipeline.natural, layout=layout, back=True),
        abstract=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings),
    )


def _on(mesh: Mesh, precision: Precision, function: Callable) -> Callable:
    """The function under the mesh, its products as the precision says."""

    @wraps(function)
    def entered(*args):
        with jax.set_mesh(mesh), compiled_here(mesh), jax.default_matmul_precision(precision.products):
            return function(*args)

    entered.jitted = function
    return entered


def mean_over(evaluate: Callable[[Tree, Batch], dict[str, jax.Array]], params: Tree, batches) -> dict[str, float]:
    """Weighted means over batches, summed in float64 on the host."""
    total: dict[str, float] = {}
    for batch in batches:
        sums = jax.device_get(evaluate(params, batch))
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    weight = total.pop("weight")
    return {name: value / weight for name, value in total.items()} | {"tokens": weight}
