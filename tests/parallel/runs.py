"""The smallest training run that has everything: two layers of width 16 on packed random tokens, for tests of layouts."""

import dataclasses

import jax
import numpy as np

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout
from lmx.parallel.pipeline import natural
from lmx.train.experiment import Experiment
from lmx.train.optimizers import SGD, Schedule
from lmx.train.program import build

MODEL = Transformer(
    vocab=48, layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=32, context=32, init_std=0.1, bias=True, norm="layernorm"
)
LENGTH, ROWS = 32, 16


def experiment(**changes) -> Experiment:
    momentum = SGD(learning_rate=0.1, momentum=0.9, clip=0.0, schedule=Schedule(kind="constant", warmup=0))
    data = Data(train="unread", length=LENGTH)
    return Experiment(**({"name": "x", "data": data, "model": MODEL, "optimizer": momentum, "batch": ROWS} | changes))


def batch(step: int, microbatches: int) -> dict[str, np.ndarray]:
    """Packed rows: two or three texts and padding, every row of another weight; row 0 and row 5 are all padding."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, MODEL.vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ends = np.sort(rng.choice(np.arange(4, LENGTH + 1), 3, replace=False))
        start = 0
        for segment, end in enumerate(ends, 1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
    segments[[0, 5]] = 0
    found = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (segments > 0) * rng.uniform(0.5, 1.5, (ROWS, LENGTH)).astype(np.float32),
        "segments": segments,
        "positions": positions,
        "example_id": 100 * step + np.arange(ROWS, dtype=np.int32),
    }
    return {name: a.reshape(microbatches, -1, *a.shape[1:]) for name, a in found.items()}


def train(run: Experiment, steps: int = 3) -> dict:
    """Losses of the steps, the first step's gradients, the parameters after the last; and the compiled step."""
    program = build(run)
    shape = (run.microbatches, run.batch // run.microbatches)
    sharding = batch_sharding(program.mesh, microbatches=True)
    state, losses, gradients = program.initial(), [], None
    for k in range(steps):
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in batch(k, run.microbatches).items()}
        state, metrics = program.step(state, place(flat, local_rows(sharding, shape), shape, sharding))
        losses.append(float(metrics["loss"]))
        if k == 0:  # the momentum after one step is the gradient
            gradients = jax.device_get(_momentum(state.optimizer))
    found = {"losses": np.array(losses), "gradients": gradients, "params": jax.device_get(state.params)}
    return natural(found, run.layout)


def _momentum(optimizer):
    found = [s.trace for s in jax.tree.leaves(optimizer, is_leaf=lambda s: hasattr(s, "trace")) if hasattr(s, "trace")]
    return found[0]


def on(run: Experiment, **degrees) -> Experiment:
    return dataclasses.replace(run, layout=Layout(**degrees))
