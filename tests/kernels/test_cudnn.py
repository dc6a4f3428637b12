"""cuDNN's attention where there is no GPU: what it is told means what the mask says, what it cannot do is refused, and it compiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import attention as door
from lmx.kernels import cudnn, devices, reference
from lmx.kernels.attention import attention
from lmx.kernels.masks import Mask
from lmx.parallel import absent
from lmx.parallel.layout import Layout

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]], np.int32)
PREFIX = np.array([[1, 1, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], np.int32)
MASKS = {
    "causal": Mask(),
    "everything": Mask(causal=False),
    "window": Mask(window=3),
    "packed": Mask(query_segments=SEGMENTS, key_segments=SEGMENTS),
    "prefix": Mask(key_prefix=PREFIX),
    "packed prefixes": Mask(query_segments=SEGMENTS, key_segments=SEGMENTS, key_prefix=PREFIX),
    "packed window": Mask(window=2, query_segments=SEGMENTS, key_segments=SEGMENTS),
}


def inputs(dtype=jnp.bfloat16, dim=8, keys=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, n, heads, dim)), dtype) for n, heads in ((8, 4), (keys, 2), (keys, 2))]


@pytest.mark.parametrize("name", MASKS)
def test_what_it_is_told_is_what_the_mask_says(name, monkeypatch):
    """JAX documents the arguments to mean the same to its own implementation, which runs here."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k, implementation="xla"))

    def both(run, q, k, v):
        out, pullback = jax.vjp(partial(run, mask=MASKS[name], scale=0.3), q, k, v)
        return out, *pullback(jnp.ones_like(out))

    q, k, v = inputs(jnp.float32)
    for found, expected in zip(both(cudnn.attention, q, k, v), both(reference.attention, q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arrays", "mask", "knobs", "reason"),
    [
        ({"dtype": jnp.float32}, Mask(), {}, "computes in bfloat16 or float16, not float32"),
        ({"dim": 12}, Mask(), {}, "multiples of 8 up to 128, not 12"),
        ({"dim": 136}, Mask(), {}, "multiples of 8 up to 128, not 136"),
        ({"keys": 16}, Mask(), {}, "whole sequences in order"),
        ({}, Mask(query_index=np.arange(8), key_index=np.arange(8)), {}, "whole sequences in order"),
        ({}, Mask(order="positions", query_positions=SEGMENTS, key_positions=SEGMENTS), {}, "whole sequences in order"),
        ({}, Mask(), {"softcap": 5.0}, "takes no soft cap"),
        ({}, Mask(), {"slopes": jnp.ones(4)}, "takes no ALiBi"),
        ({}, Mask(), {"keep": jnp.ones((2, 4, 8, 8))}, "takes no dropout"),
    ],
)
def test_what_it_cannot_do_is_refused_and_auto_goes_another_way(arrays, mask, knobs, reason, monkeypatch):
    q, k, v = inputs(**arrays)
    with pytest.raises(ValueError, match=f"attention='cudnn' .*{reason}.*; use auto"):
        attention(q, k, v, mask, **knobs, implementation="cudnn")
    monkeypatch.setattr(devices, "on_nvidia", lambda: True)
    assert attention(q, k, v, mask, **knobs).shape == q.shape


def test_long_packed_sequences_are_left_to_tiles(monkeypatch):
    monkeypatch.setattr(cudnn, "LONGEST", 4)
    why = partial(cudnn.refusal, *inputs()[:2], softcap=None, slopes=None, keep=None)
    assert "up to 4 keys, not 8" in why(MASKS["packed"])
    assert why(MASKS["causal"]) is None


def test_auto_takes_it_on_nvidia_and_only_there(monkeypatch):
    calls = []
    monkeypatch.setattr(door.cudnn, "attention", lambda q, *_, **__: calls.append(q.dtype) or q)
    attention(*inputs(), Mask())
    assert not calls
    monkeypatch.setattr(devices, "on_nvidia", lambda: True)
    attention(*inputs(), Mask())
    attention(*inputs(jnp.float32), Mask())
    assert calls == [jnp.bfloat16]


@pytest.mark.aot
@pytest.mark.parametrize("name", MASKS)
def test_it_compiles_for_an_absent_h100(h100, name):
    mesh = absent.mesh(Layout(), h100)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [jax.ShapeDtypeStruct((2, 8, heads, 64), jnp.bfloat16, sharding=where) for heads in (4, 2, 2)]

    def both(q, k, v):
        out, pullback = jax.vjp(lambda *a: attention(*a, MASKS[name]), q, k, v)
        return out, pullback(out)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*arrays).compile().as_text()
    assert text.count("__cudnn$fmha") >= 2
    assert "Backward" in text
