"""A GPU gives a CPU's numbers. Needs both: `JAX_PLATFORMS=cuda,cpu pytest -m gpu -n 0`."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.parallel.layout import Layout, make_mesh
from lmx.train.checkpoints import Manager
from lmx.train.experiment import Experiment
from lmx.train.optimizers import SGD, Schedule
from lmx.train.program import build
from lmx.verify import differences, packed, train

MODEL = Transformer(vocab=512, layers=3, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, context=64, init_std=0.1)
RUN = Experiment(
    name="gpu",
    data=Data(train="", length=64),
    model=MODEL,
    optimizer=SGD(learning_rate=0.1, momentum=0.9, clip=0.0, schedule=Schedule(kind="constant", warmup=0)),
    batch=8,
)
CASES = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "scanned": {"precision": "bf16", "model": replace(MODEL, layers=26)},
    "remat": {"precision": "bf16", "layout": Layout(remat="full"), "microbatches": 2},
    "gpt2": {
        "precision": "bf16",
        "model": replace(MODEL, positions="learned", norm="layernorm", activation="gelu_tanh", gated=False, bias=True),
    },
    "gemma2": {
        "precision": "bf16",
        "model": replace(MODEL, attention_softcap=30.0, logit_softcap=20.0, window=16, pattern=("local", "global")),
    },
    "experts": {
        "precision": "fp32",
        "model": replace(MODEL, experts=4, experts_per_token=2, expert_mlp=64),
    },
    "offload": {"precision": "fp32", "layout": Layout(offload=("optimizer", "params"), remat="full")},
}


@pytest.fixture(scope="module")
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("there is no GPU, or JAX may not use it (JAX_PLATFORMS=cuda,cpu)")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_trains_as_a_cpu_does(gpu, case):
    run = replace(RUN, **CASES[case])
    here = replace(run, layout=replace(run.layout, offload=()))
    found = train(run, 2, mesh=make_mesh(run.layout, [gpu]))
    exact = train(replace(here, precision="fp32"), 2, mesh=make_mesh(here.layout, jax.devices("cpu")[:1]))
    bound = 5e-5
    if run.precision == "bf16":
        bound = 2 * max(differences(train(here, 2, mesh=make_mesh(here.layout, jax.devices("cpu")[:1])), exact).values())
    worst = differences(found, exact)
    assert max(worst.values()) <= bound, {name: value for name, value in worst.items() if not value <= bound}


@pytest.mark.gpu
def test_offloaded_state_is_saved_while_steps_go_on(gpu, tmp_path):
    run = replace(RUN, **CASES["offload"])
    program = build(run, make_mesh(run.layout, [gpu]))
    batch = {name: a[None] for name, a in packed(run, 0).items()}
    state, _ = program.step(program.initial(), batch)
    then = jax.tree.map(np.array, state.params)
    with Manager(tmp_path, run.checkpoints) as manager:
        manager.save(1, state, {})
        for _ in range(3):
            state, _ = program.step(state, batch)
        manager.wait()
        restored, _ = manager.restore(program.abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, restored.params), then)
    assert not np.array_equal(state.params["embed"], then["embed"])


@pytest.mark.gpu
def test_tf32_is_another_precision(gpu):
    """What fp32 would be if its products were not asked for in all of fp32."""
    found, exact = (train(replace(RUN, precision=p), 1, mesh=make_mesh(RUN.layout, [gpu])) for p in ("tf32", "fp32"))
    assert max(differences(found, exact).values()) > 2e-4
