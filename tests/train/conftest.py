"""A tiny experiment on a tiny text, shared by the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.experiment import Evaluation, Experiment
from lmx.train.optimizers import SGD, Schedule

SENTENCES = [
    "To be, or not to be, that is the question:",
    "All the world's a stage, and all the men and women merely players;",
    "If music be the food of love, play on;",
    "Now is the winter of our discontent made glorious summer by this sun of York;",
    "Friends, Romans, countrymen, lend me your ears;",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with a training text of twelve documents and a held-out one."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train").mkdir()
    for i in range(12):
        lines = [SENTENCES[(i * j + j) % 5] for j in range(3 + 2 * i)]
        (folder / "train" / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    (folder / "held_out.txt").write_text("\n".join(reversed(SENTENCES * 4)))
    return folder


MODEL = Transformer(layers=2, embed=32, heads=4, kv_heads=2, mlp=64, context=64, dropout=0.1, init_std=0.1)


@pytest.fixture
def experiment(text: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """A function that makes the tiny experiment, with changes."""

    def make(**changes) -> Experiment:
        cache = str(text / "cache")
        plain = {
            "name": "tiny",
            "data": Data(train=str(text / "train"), validation=str(text / "held_out.txt"), length=32, cache=cache),
            "model": MODEL,
            "optimizer": SGD(schedule=Schedule(kind="constant", warmup=0)),
            "steps": 6,
            "batch": 16,
            "log_every": 1,
            "evaluation": Evaluation(every=0),
            "folder": str(tmp_path / "runs"),
        }
        return Experiment(**(plain | changes))

    return make
