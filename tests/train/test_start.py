"""Starting is quick: compile time does not grow with depth, and a second start compiles nothing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.experiment import Experiment
from lmx.train.program import SHALLOW, build

COUNTED = """
import sys
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
from experiments.shakespeare import experiment
from lmx.train.loop import main
main(experiment, sys.argv[1:])
print(*(sum(name.endswith(kind) for name in events) for kind in ("cache_hits", "cache_misses")))
"""


def lowered_step(layers: int) -> str:
    model = Transformer(vocab=64, layers=layers, embed=16, heads=2, context=16)
    program = build(Experiment(name="deep", data=Data(train=""), model=model, batch=2))
    integers = ("tokens", "targets", "segments", "positions")
    batch = {name: jax.ShapeDtypeStruct((1, 2, 16), jnp.int32) for name in integers}
    batch |= {"weights": jax.ShapeDtypeStruct((1, 2, 16), jnp.float32), "example_id": jax.ShapeDtypeStruct((1, 2), jnp.uint32)}
    with jax.set_mesh(program.mesh):
        return program.step.jitted.lower(program.abstract, batch).as_text()


def test_the_program_of_a_step_does_not_grow_with_depth():
    few, many = (len(lowered_step(layers)) for layers in (SHALLOW + 1, 96))
    assert many < 1.02 * few


@pytest.mark.slow
def test_a_second_start_finds_every_compiled_program(root, text, tmp_path):
    knobs = "--model.layers 2 --model.embed 16 --model.heads 2 --data.length 16 --data.tokenizer bytes --steps 2 --samples.tokens 4"
    paths = ["--folder", str(tmp_path), "--data.train", str(text / "train"), "--data.validation", str(text / "held_out.txt")]
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name} | {"JAX_PLATFORMS": "cpu"}
    counts = []
    for start in ("new", "overwrite"):
        argv = [sys.executable, "-c", COUNTED, *knobs.split(), *paths, "--data.cache", str(tmp_path / "cache"), "--start", start]
        done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, check=True)
        counts.append([int(n) for n in done.stdout.splitlines()[-1].split()])
    (_, cold_misses), (warm_hits, warm_misses) = counts
    assert cold_misses > 5
    assert warm_misses == 0
    assert warm_hits >= cold_misses
