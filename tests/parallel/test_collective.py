"""Products that gather and sum a part at a time: one device's numbers, and no whole gather in a layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import runs
from lmx.core.execution import Execution
from lmx.core.tree import disagreement
from lmx.core.weights import Adapted
from lmx.models.config import EncoderDecoder, Transformer
from lmx.parallel import hlo
from lmx.parallel.collective import linear_back, linears
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules
from lmx.train import program
from lmx.train.experiment import check
from lmx.train.objectives import Seq2Seq
from lmx.train.planning import compile_step
from lmx.verify import BOUND, differences

PARALLEL = {"parallel": True, "gated": True, "bias": False, "norm": "rmsnorm"}
EXPERTS = {"experts": 4, "expert_mlp": 8, "shared_experts": 1, "shared_gate": True, "kv_heads": 4}
PAIR = EncoderDecoder(vocab=48, heads=4, kv_heads=4, context=32, encoder=Transformer(vocab=48, heads=4, kv_heads=1, causal=False))
FEW_KEYS = {"model": PAIR, "objective": Seq2Seq(), "layout": Layout(tensor=2, collective_matmul=True)}
CASES = {
    "a ring of four": ({"kv_heads": 4}, Layout(tensor=4, fsdp=2, zero=2)),
    "ZeRO-3, remat": ({}, Layout(tensor=2, data=2, fsdp=2, remat="full")),
    "ring attention": ({}, Layout(tensor=2, context=2, fsdp=2, remat="dots")),
    "a pipeline, parallel blocks": (PARALLEL, Layout(tensor=2, pipeline=2, fsdp=2)),
    "experts": (EXPERTS, Layout(tensor=2, expert=2, fsdp=2, zero=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_device(name):
    knobs, layout = CASES[name]
    run = runs.experiment(model=replace(runs.MODEL, **knobs), layout=replace(layout, collective_matmul=True), microbatches=2)
    check(run)
    found = differences(runs.train_from_shared_start(run), runs.train_from_shared_start(replace(run, layout=Layout())))
    assert max(found.values()) < BOUND, {name: value for name, value in found.items() if not value < BOUND}


def test_layers_gather_nothing_whole(monkeypatch):
    """Of four tensor devices each product sends three parts instead of gathering, and three instead of scattering."""
    monkeypatch.setattr(program, "SHALLOW", 0)
    model, layers = replace(runs.MODEL, kv_heads=4), runs.MODEL.layers
    run = runs.experiment(model=model, layout=Layout(tensor=4))
    whole, parted = (compile_step(replace(run, layout=replace(run.layout, collective_matmul=on))).collectives for on in (False, True))

    def times(found: list[hlo.Collective], kind: str) -> int:
        return sum(one.times for one in found if one.kind == kind and one.axes == ("tensor",))

    # Forward, attention and feed-forward each gather and sum; backward each gathers its input and its gradient again, and sums.
    assert times(parted, "collective-permute") == 3 * 2 * 5 * layers
    assert times(whole, "collective-permute") == 0
    assert times(parted, "all-gather") == 2 < times(whole, "all-gather")  # hidden states for the head, the gradient for the embedding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(fsdp=2, collective_matmul=True)}, "not of layout.tensor=1"),
        ({"layout": Layout(tensor=2, sequence=False, collective_matmul=True)}, "layout.sequence=False"),
        ({"layout": Layout(tensor=4, collective_matmul=True)}, "model.kv_heads=2 is not divisible by layout.tensor=4"),
        ({"layout": Layout(tensor=2, collective_matmul=True), "precision": "fp8"}, "not there for precision=fp8"),
        (FEW_KEYS, "model.encoder.kv_heads=1 is not divisible by layout.tensor=2"),
        ({"layout": Layout(tensor=2), "model": replace(runs.MODEL, **EXPERTS, shared_mlp=9)}, r"\(model.shared_mlp\)=9 is not divisible"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(runs.experiment(**changes))


def test_what_no_device_has_a_part_of_does_not_go_round():
    """Its gradient would be that of one device as often as there are devices: 0.97 off where it did, of an encoder with one key head."""
    layout = Layout(tensor=2, collective_matmul=True)
    execution = Execution(rules=rules(layout), collective_matmul=True)
    with jax.set_mesh(make_mesh(layout)):
        with pytest.raises(ValueError, match="kv_heads=1 is not divisible by"):
            linears(jnp.ones((2, 8, 16)), [{"weight": jnp.ones((16, 1, 4))}], "kv_heads", execution)
        with pytest.raises(ValueError, match="mlp=9 is not divisible by"):
            linear_back(jnp.ones((2, 8, 9)), {"weight": jnp.ones((9, 16))}, "mlp", execution)


def test_adapters_are_over_what_goes_round():
    layout = Layout(tensor=4, data=2, collective_matmul=True)
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def weight(*sides: int) -> Adapted:
        """An adapter with lengths over one without."""
        base, *factors = (jax.random.normal(next(keys), shape) for shape in (sides, *((sides[0], 2), (2, sides[1])) * 2))
        return Adapted(Adapted(base, *factors[:2], jnp.array([0.5, 0.7])), *factors[2:], jnp.array([0.3, 0.0]), 1.0 + jnp.arange(sides[1]))

    def loss(into, out, x, execution: Execution):
        (hidden,) = linears(x, [into], "mlp", execution)
        return jnp.sum(jnp.cos(linear_back(jnp.tanh(hidden / 8), out, "mlp", execution)))

    into, out = ({"weight": weight(*sides), "bias": jnp.arange(8.0)} for sides in ((16, 8), (8, 8)))
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    arguments = into, out, jax.random.normal(next(keys), (4, 8, 16))
    exact = gradient(*arguments, Execution())
    with jax.set_mesh(make_mesh(layout)):
        found = gradient(*arguments, Execution(rules=rules(layout), collective_matmul=True))
    worst = disagreement(found, exact)
    assert max(worst.values()) < BOUND, worst
