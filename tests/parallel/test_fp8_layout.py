"""Training in float8: as bf16's within a few percent, and the same under any layout."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.tree import disagreement
from lmx.core.weights import E4M3, Narrow, Split, linear, quantised
from lmx.parallel import absent
from lmx.parallel.layout import Layout, make_mesh
from lmx.train.experiment import check
from runs import experiment, train, train_from_shared_start

pytestmark = pytest.mark.usefixtures("compiled_here", "scanned")

LAYOUTS = {
    "zero-3 and tensor": (Layout(fsdp=2, tensor=2, data=2, remat="full"), 1),
    "ring": (Layout(fsdp=2, context=2, zero=2), 1),
    "pipeline": (Layout(pipeline=2, fsdp=2, tensor=2), 2),
}


def one_device(precision: str, microbatches: int) -> dict:
    return train_from_shared_start(experiment(precision=precision, microbatches=microbatches))


def test_a_tiny_model_trains_as_in_bf16():
    losses = {name: train(experiment(precision=name), 20)["losses"] for name in ("bf16", "fp8")}
    fell = {name: found[0] - found[-1] for name, found in losses.items()}
    assert fell["fp8"] == pytest.approx(fell["bf16"], rel=0.05)
    assert np.abs(losses["fp8"] - losses["bf16"]).max() < 0.01 * losses["bf16"].max()
    assert not np.array_equal(losses["fp8"], losses["bf16"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree_within_the_error_of_float8_itself(name, once):
    """A number at the edge of two float8 ones may go to either: so the bound, as of other precisions, is twice one device's distance from
    fp32."""
    layout, microbatches = LAYOUTS[name]
    found = train_from_shared_start(experiment(precision="fp8", layout=layout, microbatches=microbatches))
    alone, exact = once(one_device, "fp8", microbatches), once(one_device, "fp32", 1)
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=2e-3)
    for what in ("gradients", "params"):
        own = max(disagreement(alone[what], exact[what]).values())
        assert max(disagreement(found[what], exact[what]).values()) <= 2 * own


def test_the_scale_is_that_of_the_whole_tensor_wherever_it_lies():
    mesh, a = make_mesh(Layout(fsdp=4, tensor=2)), np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    a[3, 5] = 1000.0  # on one device alone
    split = jax.device_put(a, NamedSharding(mesh, P("fsdp", "tensor")))
    run = jax.jit(quantised, static_argnums=1)
    for found, expected in zip(run(split, E4M3), run(a, E4M3), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_mixtures_are_refused():
    run = experiment(precision="fp8")
    with pytest.raises(ValueError, match=r"precision=fp8 is not there for mixtures \(model.experts=4\); use bf16"):
        check(dataclasses.replace(run, model=dataclasses.replace(run.model, experts=4)))


@pytest.mark.aot
def test_an_h100_multiplies_float8_and_weights_travel_as_such(h100):
    """Which of cuBLAS and Triton multiplies is decided by timing, on a GPU; both take float8. Here cuBLAS is chosen, to be seen by name."""
    mesh = absent.mesh(Layout(fsdp=8), h100)
    split = P("fsdp")
    x, w = (
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, split))
        for shape, kind in (((8, 256, 512), "bfloat16"), ((512, 1024), "float32"))
    )

    def both(x, w, g):
        y, pullback = jax.vjp(lambda x, w: linear(x, Narrow(Split(w, P(), split))), x, w)
        return y, pullback(g)

    g = jax.ShapeDtypeStruct((8, 256, 1024), "bfloat16", sharding=x.sharding)
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(x, w, g).compile({"xla_gpu_enable_triton_gemm": False}).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    gathered = [line for line in text.splitlines() if " all-gather" in line and "512,1024" in line]
    assert gathered
    assert all("f8e4m3fn[512,1024]" in line for line in gathered)
