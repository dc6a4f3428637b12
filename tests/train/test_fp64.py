"""fp64: nothing of a step is computed in fewer bits, whatever the model and the optimizer; and it is refused where JAX has no 64 bits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lmx.core.config import ConfigError
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from lmx.train.program import build
from lmx.verify import packed, verify

MODELS = {
    "rope": {"bias": True, "qk_norm": True, "logit_softcap": 5.0, "embed_scale": True, "norm": "layernorm"},
    "alibi, chunked": {"positions": "alibi", "attention_softcap": 5.0, "activation": "gelu_tanh"},
    "sinusoidal, dropless": {"positions": "sinusoidal", "experts": 4, "shared_experts": 1},
    "learned, capacity": {"positions": "learned", "experts": 4, "expert_capacity": 1.0, "tied": False},
}
OPTIMIZERS = {recipe.__name__: recipe() for recipe in (AdamW, Adafactor, Lion, Muon, SGD)}


def computed(jaxpr) -> set:
    """The types of all arrays that a program computes, and of what the programs inside it do. Scalars are left out: optax has learning
    rates in fp32, the same for all devices."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.dtype for v in equation.outvars if getattr(v.aval, "shape", ())}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= computed(inner)
    return found


@pytest.mark.parametrize(
    ("model", "optimizer", "layout"),
    [(model, "AdamW", Layout()) for model in MODELS]
    + [("rope", optimizer, Layout()) for optimizer in OPTIMIZERS if optimizer != "AdamW"]
    + [("sinusoidal, dropless", "SGD", layout) for layout in (Layout(context=2), Layout(pipeline=2, tensor=2))],
)
def test_nothing_is_computed_in_fewer_bits(experiment, model, optimizer, layout):
    kind = replace(experiment().model, vocab=48, dropout=0.0, **MODELS[model])
    run = experiment(model=kind, optimizer=OPTIMIZERS[optimizer], layout=layout, precision="fp64", microbatches=2)
    with jax.enable_x64(True):
        program = build(run)
        batch = {n: jax.ShapeDtypeStruct((2, len(a) // 2, *a.shape[1:]), a.dtype) for n, a in packed(run, 0).items()}
        with jax.set_mesh(program.mesh):
            traced = program.step.jitted.trace(program.abstract, batch)
    state, metrics = traced.out_info
    floating = {d for d in computed(traced.jaxpr.jaxpr) if jnp.issubdtype(d, jnp.floating)}
    assert floating == {jnp.dtype("float64")}
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, program.abstract)
    assert {metrics[name].dtype for name in ("loss", "grad_norm")} == {jnp.dtype("float64")}


def test_it_is_refused_where_jax_has_no_64_bits(experiment):
    for door in (check, build, verify):
        with pytest.raises(ConfigError, match=r"precision=fp64 needs 64-bit numbers.*set JAX_ENABLE_X64=1"):
            door(experiment(precision="fp64", model=replace(experiment().model, vocab=48)))
