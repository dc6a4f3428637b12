"""One optimizer step, the same under any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lmx.core.execution import Execution
from lmx.core.precision import all_finite, update_loss_scale
from lmx.core.tree import Tree
from lmx.kernels.wide import wide, widened
from lmx.models.config import Model
from lmx.models.dropout import Dropout
from lmx.models.families import functions
from lmx.parallel import pipeline
from lmx.parallel.context import arrange
from lmx.parallel.offload import joined, stand_ins
from lmx.train.objectives import Batch, Objective
from lmx.train.state import TrainState
from lmx.train.update import Update

Sums = tuple[Array, Tree]
"""A loss sum and the sums of metrics."""

ValueAndGrad = Callable[[Tree, Batch, Array, Array], tuple[Sums, Tree]]
"""`(params, batch of [microbatches, rows, ...], key, seed) -> (sums over the batch, gradient of seed * loss sum)`. A pipeline
schedule replaces it by its own."""


@dataclass(frozen=True)
class Task:
    """What is trained, and how its forward runs: a model, an objective, an execution."""

    model: Model
    objective: Objective
    execution: Execution

    def read(self, batch: Batch) -> Batch:
        """A batch with its weights in the type that losses are summed in."""
        return batch | {"weights": batch["weights"].astype(wide(self.execution.precision.compute))}

    def sums(self, params: Tree, microbatch: Batch, key: Array | None) -> Sums:
        """Loss and metric sums of one microbatch. `key` has seed and step folded in; None: no dropout (evaluation)."""
        microbatch = arrange(microbatch, self.execution)
        output = functions(self.model).forward(
            params, self.model, dropout=self._dropout(microbatch, key), execution=self.execution, **self.objective.inputs(microbatch)
        )
        loss, metrics = self.objective.loss(params, self.model, output.hidden, microbatch, self.execution)
        more, others = self.objective.auxiliary(self.model, output.aux, microbatch)
        return loss + more, metrics | others

    def staged(self) -> pipeline.Model:
        """The same, cut where a pipeline cuts it."""
        model, execution, family = self.model, self.execution, functions(self.model)

        def inputs(microbatch: Batch, key: Array | None) -> tuple[Batch, Dropout | None]:
            microbatch = arrange(microbatch, execution)
            return self.objective.inputs(microbatch), self._dropout(microbatch, key)

        def enter(outer: Tree, microbatch: Batch, key: Array | None) -> Array:
            read, dropout = inputs(microbatch, key)
            more = {name: read[name] for name in ("block_positions", "token_types") if name in read}
            return family.enter(outer, model, read["tokens"], read["positions"], dropout, execution, **more)

        def stage(layers: Tree, x: Array, microbatch: Batch, key: Array | None, first: Array) -> tuple[Array, Sums]:
            read, dropout = inputs(microbatch, key)
            more = {"prefix": read["prefix"]} if "prefix" in read else {}
            context = family.share(model, read["positions"], read.get("segments"), dropout, execution, **more)
            x, aux = family.run_part(x, layers, model, context, execution, first)
            return x, self.objective.auxiliary(model, aux, microbatch)

        def leave(outer: Tree, x: Array, microbatch: Batch) -> Sums:
            hidden = family.leave(outer, model, x, execution)
            return self.objective.loss(outer, model, hidden, arrange(microbatch, execution), execution)

        return pipeline.Model(enter, stage, leave)

    def _dropout(self, microbatch: Batch, key: Array | None) -> Dropout | None:
        return None if key is None or not self.model.dropout else Dropout(key, microbatch["example_id"], self.model.dropout)


def accumulate(task: Task) -> ValueAndGrad:
    """The plain `ValueAndGrad`: microbatches one after another, gradients and sums added up in the gradients' own type."""

    def value_and_grad(params: Tree, batch: Batch, key: Array, seed: Array) -> tuple[Sums, Tree]:
        def of(microbatch: Batch) -> tuple[Sums, Tree]:
            def seeded(by):
                loss, metrics = task.sums(joined(params, by), microbatch, key)
                return seed * loss, (loss, metrics)

            (_, sums), gradient = jax.value_and_grad(seeded, has_aux=True)(stand_ins(params))
            return sums, gradient

        if jax.tree.leaves(batch)[0].shape[0] == 1:
            return of(jax.tree.map(lambda a: a[0], batch))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of, jax.tree.map(lambda a: a[0], batch)))
        return jax.lax.scan(lambda total, microbatch: (jax.tree.map(jnp.add, total, of(microbatch)), None), zero, batch)[0]

    return value_and_grad


def make_step(
    task: Task, value_and_grad: ValueAndGrad, update: Update, rate: Callable, clip: float
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function from a state and a batch of `[microbatches, rows, ...]` to the next state and the step's metrics. `rate` gives the
    learning rate by step (to report: the update knows it too); gradients are scaled down to norm `clip` (0: never).

    The backward pass starts from `scale / (weight sum of the whole batch)`, so that gradients are those of the weighted mean and
    fp16 does not overflow where it need not. Metrics are means over supervised tokens, in nats, beside `grad_norm` (before clipping)
    and `tokens` (supervised). Under fp16 a step whose gradients are not finite changes nothing but the loss scale.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = task.read(batch)
        weight = task.objective.weight(batch)
        scale = jnp.ones_like(weight) if state.loss_scale is None else state.loss_scale.scale
        (loss, sums), gradients = value_and_grad(state.params, batch, key, scale / weight)
        if state.loss_scale is not None:
            gradients = jax.tree.map(lambda g: g / scale, gradients)
        norm = optax.tree.norm(jax.tree.map(widened, gradients))
        if clip:
            shrink = jnp.minimum(1.0, clip / norm)
            gradients = jax.tree.map(lambda g: (g * shrink).astype(g.dtype), gradients)

        def move(state: TrainState) -> TrainState:
            params, optimizer = update(state.params, gradients, state.optimizer)
            return state.replace(params=params, optimizer=optimizer)

        metrics = {n: s / weight for n, s in sums.items()}
        metrics |= {"loss": loss / weight, "grad_norm": norm, "learning_rate": rate(state.step), "tokens": weight}
        if state.loss_scale is None:
            return move(state).replace(step=state.step + 1), metrics
        finite = all_finite(gradients)
        loss_scale = update_loss_scale(state.loss_scale, finite)
        state = jax.lax.cond(finite, move, lambda state: state, state)
        metrics |= {"loss_scale": loss_scale.scale, "skipped": loss_scale.skipped}
        return state.replace(step=state.step + 1, loss_scale=loss_scale), metrics

    return step


def make_evaluation(task: Task, sums: Callable[[Tree, Batch, None], Sums]) -> Callable[[Tree, Batch], dict[str, Array]]:
    """The function from parameters and a batch of `[rows, ...]` to sums: `weight`, `loss` and the objective's metrics."""

    def evaluate(params: Tree, batch: Batch) -> dict[str, Array]:
        batch = task.read(batch)
        loss, metrics = sums(params, batch, None)
        return {"loss": loss, "weight": task.objective.weight(batch)} | metrics

    return evaluate
