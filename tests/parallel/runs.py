"""The smallest training run that has everything: two layers of width 16 on packed random tokens, for tests of layouts."""

from functools import cache
from pathlib import Path

import jax

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.experiment import Experiment
from lmx.train.optimizers import SGD, Schedule
from lmx.train.program import build
from lmx.train.state import TrainState
from lmx.verify import packed
from lmx.verify import train as _train

MODEL = Transformer(
    vocab=48,
    layers=2,
    embed=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    context=32,
    init_std=0.1,
    bias=True,
    norm="layernorm",
)
LENGTH, ROWS = 32, 16


def experiment(**changes) -> Experiment:
    """The run, with changes."""
    momentum = SGD(learning_rate=0.1, momentum=0.9, clip=0.0, schedule=Schedule(kind="constant", warmup=0))
    data = Data(train=str(Path(__file__).parents[2] / "README.md"), length=LENGTH)  # named, never read
    return Experiment(**({"name": "x", "data": data, "model": MODEL, "optimizer": momentum, "batch": ROWS} | changes))


def train(run: Experiment, steps: int = 3) -> dict:
    """`lmx.verify.train`: losses of the steps, the first step's gradients, the parameters after the last."""
    return _train(run, steps)


def train_from_shared_start(run: Experiment, steps: int = 3) -> dict:
    """The same from a beginning that is compiled once a model. It is the same on every layout: `tests/train/test_layouts.py`."""
    return _train(run, steps, _start(run.model, "fp64" if run.precision == "fp64" else "fp32"))


@cache
def _start(model: Transformer, precision: str) -> TrainState:
    return jax.device_get(build(experiment(model=model, precision=precision)).initial())


def batch(step: int, microbatches: int) -> dict:
    """What `train` reads at a step, as `[microbatches, rows, ...]`."""
    return {name: a.reshape(microbatches, -1, *a.shape[1:]) for name, a in packed(experiment(), step).items()}
