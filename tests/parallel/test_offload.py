"""What waits in the host's memory changes no number."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import runs
from lmx.core.params import initial_values, is_spec
from lmx.core.tree import disagreement, named_leaves
from lmx.models import transformer
from lmx.models.config import EncoderDecoder, Transformer
from lmx.parallel.feed import batch_sharding
from lmx.parallel.layout import Layout
from lmx.parallel.offload import HOST, copied, in_host
from lmx.train import optimizers
from lmx.train.experiment import check
from lmx.train.optimizers import Adafactor, Adam8bit, AdamW, Muon
from lmx.train.program import build
from lmx.train.update import at_once, layer_by_layer
from lmx.verify import BOUND, differences

pytestmark = pytest.mark.usefixtures("scanned")

EVERYTHING = ("optimizer", "params", "activations")
LAYOUTS = {
    "one device, all kept": Layout(remat="dots", offload=("optimizer", "params")),
    "one device, everything in the host": Layout(remat="full", offload=EVERYTHING),
    "ZeRO-1": Layout(data=2, fsdp=4, zero=1, remat="dots", offload=EVERYTHING),
    "ZeRO-3 and tensor": Layout(fsdp=4, tensor=2, remat="sites", sites=("query", "mixed", "hidden"), offload=EVERYTHING),
    "ring": Layout(fsdp=2, context=2, tensor=2, remat="full", offload=EVERYTHING),
    "pipeline": Layout(pipeline=2, fsdp=2, tensor=2, remat="full", offload=EVERYTHING),
}
MODEL = replace(runs.MODEL, layers=5, pattern=("local", "global"), window=6)
EVEN = replace(MODEL, layers=4)


def model(layout: Layout):
    return EVEN if layout.pipeline > 1 else MODEL


def one_device(config) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=config, microbatches=2))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_numbers_do_not_depend_on_what_is_in_the_host(layout, once):
    config = model(layout)
    found = differences(
        runs.train_from_shared_start(runs.experiment(model=config, layout=layout, microbatches=2)), once(one_device, config)
    )
    assert max(found.values()) < BOUND, {name: value for name, value in found.items() if not value < BOUND}


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16", AdamW()), ("fp16", AdamW()), ("fp32", Muon()), ("fp32", Adafactor()), ("bf16", Adam8bit())]
)
def test_state_stays_where_it_is_and_moves_as_it_would_on_the_device(precision, optimizer):
    states = []
    for offload in ((), EVERYTHING):
        layout = Layout(fsdp=2, tensor=2, remat="full", offload=offload)
        run = runs.experiment(model=MODEL, layout=layout, precision=precision, optimizer=optimizer, microbatches=2)
        program = build(run)
        state, sharding = program.initial(), batch_sharding(program.mesh, microbatches=True)
        for step in range(3):
            state, metrics = program.step(state, jax.device_put(runs.batch(step, 2), sharding))
        assert np.isfinite(metrics["loss"])
        layers = [leaf for name, leaf in named_leaves((state.params, state.optimizer)).items() if "layers" in name.split("/")]
        assert {leaf.sharding.memory_kind for leaf in layers} == {"pinned_host" if offload else "device"}
        assert state.params["embed"].sharding.memory_kind == "device"
        states.append(jax.device_get((state.params, state.optimizer)))
        evaluated = program.evaluate(state.params, jax.tree.map(lambda a: a[0], runs.batch(9, 2)))
        assert np.isfinite(evaluated["loss"])
    apart = disagreement(*states)
    assert max(apart.values()) < 1e-6, {name: value for name, value in apart.items() if value >= 1e-6}


@pytest.mark.parametrize("recipe", [AdamW(), Muon()], ids=lambda recipe: type(recipe).__name__)
def test_layers_of_an_encoder_too_are_moved_one_at_a_time(recipe):
    sizes = {"vocab": 16, "embed": 8, "heads": 2, "mlp": 8, "context": 8}
    specs = transformer.specs(EncoderDecoder(**sizes, layers=2, encoder=Transformer(**sizes, layers=3, causal=False)))
    params, gradients = (initial_values(jax.random.key(seed), specs) for seed in range(2))
    parts = []

    def made(part):
        parts.append({bool(spec.layers) for spec in named_leaves(part, is_leaf=is_spec).values()})
        return optimizers.build(recipe, 9, part)[0]

    whole = optimizers.build(recipe, 9, specs)[0]
    found, wanted = (jax.jit(move)(params, gradients, whole.init(params)) for move in (layer_by_layer(made, specs), at_once(whole)))
    assert parts == [{False}, {True}, {True}]
    assert max(disagreement(found, wanted).values()) < 1e-6


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(offload=("params",)), "with layout.remat=none"),
        (Layout(offload=("activations",)), "with layout.remat=none"),
        (Layout(ordered=2, data=2, offload=("optimizer",)), "layout.ordered keeps everything on the device"),
        (Layout(pipeline=2, rounds=2, remat="full", offload=("params",)), "one stage of several is cut out of its device's layers"),
        (Layout(remat="sites"), "set sites with remat sites"),
        (Layout(remat="dots", sites=("query",)), "set sites with remat sites"),
    ],
)
def test_what_cannot_be_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        check(runs.experiment(layout=layout))


def test_a_copy_to_save_is_not_where_the_state_is():
    state = {"moved": jax.device_put(jnp.arange(8.0), SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)), "stays": jnp.ones(3)}
    copies = copied(state)
    assert copies["stays"] is state["stays"]
    assert in_host(copies["moved"])
    assert not np.shares_memory(np.asarray(copies["moved"]), np.asarray(state["moved"]))
    np.testing.assert_array_equal(copies["moved"], state["moved"])
