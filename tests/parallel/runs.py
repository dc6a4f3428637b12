"""The smallest training run that has everything: two layers of width 16 on packed random tokens, for tests of layouts."""

from pathlib import Path

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.experiment import Experiment
from lmx.train.optimizers import SGD, Schedule
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


def train(run: Experiment, steps: int = 3, start: TrainState | None = None) -> dict:
    """`lmx.verify.train`: losses of the steps, the first step's gradients, the parameters after the last."""
    return _train(run, steps, start)


def batch(step: int, microbatches: int) -> dict:
    """What `train` reads at a step, as `[microbatches, rows, ...]`."""
    return {name: a.reshape(microbatches, -1, *a.shape[1:]) for name, a in packed(experiment(), step).items()}
