"""How often a layer's weights are gathered, as a step asks for it: on CPUs XLA merges what is asked twice, on GPUs it does not."""

import dataclasses
import re

import jax
import pytest

from lmx.models.config import RWKV, Transformer
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


def asked(model: Transformer | RWKV, layout: Layout, precision: str) -> tuple[int, int]:
    """How often a step's program says that a matrix of a feed-forward, in the type that it multiplies in, is split over fsdp, and how often
    that it is whole."""
    run = experiment(model=model, layout=layout, precision=precision)
    mesh = make_mesh(layout)
    program = build(run, mesh)
    with jax.set_mesh(mesh):
        text = program.step.jitted.lower(program.abstract, batch_structs(run, batch_sharding(mesh, microbatches=True))).as_text()
    places = re.findall(rf"sdy\.sharding_constraint %\d+ <@mesh, (.*)> : {MATRIX}", text)
    parts = sum("fsdp" in place for place in places)
    return parts, len(places) - parts + len(re.findall(rf"stablehlo\.all_gather.*-> {MATRIX}", text))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_gathered_for_the_forward_pass_and_once_for_the_backward_pass(name, remat, scanned):
    model, layout, precision, matrices = CASES[name]
    assert asked(model, dataclasses.replace(layout, remat=remat), precision) == (0, 2 * matrices)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_comes_from_the_host_is_said_to_be_split_in_the_type_that_it_multiplies_in(precision, scanned):
    host = dataclasses.replace(FSDP, remat="full", offload=("optimizer", "params"))
    assert asked(DENSE, host, precision) == (6, 6)
    assert asked(DENSE, dataclasses.replace(host, zero=2), precision)[0] == 0
