"""How often a layer's weights are gathered, as a step asks for it: on CPUs XLA merges what is asked twice, on GPUs it does not."""

import dataclasses
import re

import jax
import pytest

from lmx.models.config import RWKV
from lmx.parallel.feed import batch_sharding
from lmx.parallel.layout import Layout, make_mesh
from lmx.train.planning import batch_structs
from lmx.train.program import build
from runs import MODEL, experiment

FSDP, TENSOR = Layout(fsdp=4), Layout(fsdp=2, tensor=2)
DENSE = dataclasses.replace(MODEL, mlp=40, bias=False)
CASES = {
    "dense": (DENSE, FSDP, "bf16", 3),
    "tensor": (DENSE, TENSOR, "bf16", 3),
    "collective": (DENSE, dataclasses.replace(TENSOR, collective_matmul=True), "bf16", 3),
    "fp8": (DENSE, FSDP, "fp8", 3),
    "experts": (dataclasses.replace(DENSE, experts=4, experts_per_token=2), FSDP, "bf16", 3),
    "capacity": (dataclasses.replace(DENSE, experts=4, experts_per_token=2, expert_capacity=2.0), FSDP, "bf16", 3),
    "rwkv": (RWKV(vocab=48, layers=2, embed=16, mlp=40), FSDP, "bf16", 2),
}
"""A model, its layout and precision, and how many matrices a layer's feed-forward has."""


MATRIX = r"tensor<(?:4x)?(?:16x40|40x16)x(?:bf16|f8E4M3FN)>"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_gathered_for_the_forward_pass_and_once_for_the_backward_pass(name, remat, scanned):
    model, layout, precision, matrices = CASES[name]
    run = experiment(model=model, layout=dataclasses.replace(layout, remat=remat), precision=precision)
    mesh = make_mesh(layout)
    program = build(run, mesh)
    with jax.set_mesh(mesh):
        text = program.step.jitted.lower(program.abstract, batch_structs(run, batch_sharding(mesh, microbatches=True))).as_text()
    places = re.findall(rf"sdy\.sharding_constraint %\d+ <@mesh, (.*)> : {MATRIX}", text)
    parts = [place for place in places if "fsdp" in place]
    by_hand = len(re.findall(rf"stablehlo\.all_gather.*-> {MATRIX}", text))
    assert len(places) - len(parts) + by_hand == 2 * matrices
    # Told what is before, XLA does not gather numbers of the type that they rest in.
    assert len(parts) == 2 * matrices - by_hand
