"""What each device holds under ZeRO is what the paper's formula says: measured from real arrays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import runs
import tables
from lmx.core.params import count
from lmx.parallel.feed import batch_sharding
from lmx.parallel.layout import Layout
from lmx.train.optimizers import AdamW
from lmx.train.program import build

SPLIT = 8
LOWEST = {"parameters": 3, "gradients": 2, "optimizer": 1}
"""From which stage on each is split (Rajbhandari et al., 2020, figure 1)."""
NUMBERS = {"parameters": 1, "gradients": 1, "optimizer": 2}
"""Numbers of each a parameter, all fp32 here; the bf16 copy that the paper counts beside them is made a layer at a time."""


def measured() -> dict[int, dict[str, float]]:
    """Bytes a parameter on one device, by stage."""
    found = {}
    for zero in range(4):
        run = runs.experiment(
            model=replace(runs.MODEL, bias=False), layout=Layout(fsdp=SPLIT, zero=zero), precision="bf16", optimizer=AdamW()
        )
        program = build(run)
        state = program.initial()
        batch = jax.device_put(runs.batch(0, 1), batch_sharding(program.mesh, microbatches=True))
        _, gradients = program.value_and_grad(state.params, batch, state.key, jnp.float32(1))
        state, _ = program.step(state, batch)
        trees = {"parameters": state.params, "gradients": gradients, "optimizer": state.optimizer}
        sizes = {name: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(t) if a.ndim) for name, t in trees.items()}
        found[zero] = {name: size / count(program.specs) for name, size in sizes.items()}
    return found


def formula(name: str, zero: int) -> float:
    return 4 * NUMBERS[name] / (SPLIT if zero >= LOWEST[name] else 1)


def table(found: dict[int, dict[str, float]]) -> str:
    """As Markdown: measured, and the formula's."""
    lines = ["| bytes a parameter | " + " | ".join(NUMBERS) + " | all | by the formula |", "| --- |" + " ---: |" * (len(NUMBERS) + 2)]
    for zero, sizes in found.items():
        cells = [*sizes.values(), sum(sizes.values()), sum(formula(name, zero) for name in NUMBERS)]
        lines.append(f"| ZeRO-{zero} | " + " | ".join(f"{cell:g}" for cell in cells) + " |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, float]]:
    return measured()


@pytest.mark.parametrize("zero", range(4))
def test_each_device_holds_what_the_paper_says(found, zero):
    assert found[zero] == {name: formula(name, zero) for name in NUMBERS}


def test_the_readme_has_the_measured_table(found):
    assert tables.block("zero memory", table(found)) in tables.README.read_text()
