"""Attention over split sequences by the flash kernels: how a ring joins what they give, and both ways with the kernels themselves, interpreted."""

import re
import threading
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.kernels import chunked, devices, flash, flash_blocks, reference
from lmx.kernels.masks import Mask
from lmx.parallel import absent
from lmx.parallel.attention import attention
from lmx.parallel.context import arrange, joined
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules

pytestmark = pytest.mark.usefixtures("compiled_here")

H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Case:
    """What of a call is fixed."""

    causal: bool = True
    window: int | None = None
    packed: bool = False
    prefix: bool = False
    softcap: float | None = None
    alibi: bool = False
    heads: int = 4
    kv_heads: int = 2

    def arrays(self, length: int, head_dim: int, dtype) -> dict[str, jax.Array]:
        """One row: q, k, v, the output's cotangent, and what the mask says; where packed, three texts and padding, cut off the chunks."""
        rng = np.random.default_rng(0)
        shapes = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "g": self.heads}
        found = {name: jnp.asarray(rng.normal(size=(1, length, heads, head_dim)), dtype) for name, heads in shapes.items()}
        segments = np.ones((1, length), np.int32)
        if self.packed:
            ends = np.array([length // 5, length // 2 + 3, length - length // 7])
            segments = np.searchsorted(ends, np.arange(length), side="right")[None].astype(np.int32) + 1
            segments[segments == 4] = 0
        starts = np.stack([[np.argmax(row == s) for s in row] for row in segments])
        positions = (np.arange(length) - starts).astype(np.int32)
        prefix = ((positions < 9) & (segments != 0)).astype(np.int32)
        return found | {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions), "prefix": jnp.asarray(prefix)}

    def mask(self, a: dict[str, jax.Array]) -> Mask:
        mask = Mask(self.causal, self.window, query_positions=a["positions"], key_positions=a["positions"])
        if self.packed:
            mask = mask.replace(query_segments=a["segments"], key_segments=a["segments"])
        return mask.replace(key_prefix=a["prefix"]) if self.prefix else mask

    @property
    def slopes(self) -> jax.Array | None:
        return 2.0 ** -jnp.arange(1.0, self.heads + 1) if self.alibi else None

    def both(self, run, a: dict[str, jax.Array]) -> list[jax.Array]:
        """The output of `run(q, k, v, mask)`, and the gradients of q, k and v."""
        out, pullback = jax.vjp(lambda *qkv: run(*qkv, self.mask(a)), a["q"], a["k"], a["v"])
        return [out, *pullback(a["g"])]


CASES = {
    "causal": Case(),
    "both ways": Case(causal=False, kv_heads=1),
    "window, capped": Case(window=21, softcap=3.0),
    "packed, ALiBi": Case(packed=True, alibi=True),
    "packed prefixes": Case(packed=True, prefix=True),
}


def split(case: Case, a: dict[str, jax.Array], devices: int, exchange: str) -> list[np.ndarray]:
    """The same of sequences that devices divide, in order again."""
    layout = Layout(context=devices, exchange=exchange)
    execution = Execution(rules=rules(layout), exchange=exchange, attention="flash")
    length = a["q"].shape[1]

    @jax.jit
    def run(a):
        placed = arrange(a | {"place": jnp.arange(length)[None]}, execution)
        found = case.both(lambda *of: attention(*of, execution, softcap=case.softcap, slopes=case.slopes), placed)
        return found, placed["place"][0]

    with jax.set_mesh(make_mesh(layout)):
        found, order = run(a)
    back = np.argsort(np.asarray(order))
    return [np.asarray(x, np.float32)[:, back] for x in found]


def textbook(case: Case, a: dict[str, jax.Array]) -> list[jax.Array]:
    knobs = {"scale": a["q"].shape[-1] ** -0.5, "softcap": case.softcap, "slopes": case.slopes}
    return jax.jit(lambda a: case.both(partial(reference.attention, **knobs), a))(a)


def test_outputs_over_parts_of_the_keys_are_joined_by_their_log_sum_exps():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(5, 12)) * 4, rng.normal(size=(12, 3))
    scores[0, :4] = scores[1, 4:] = scores[2] = -np.inf  # nothing in the first part, in the second, in any

    def exactly(of: slice):
        weights = np.exp(scores[:, of])
        total = weights.sum(1)
        lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)), chunked.NONE)
        return (weights @ values[of] / np.where(total > 0, total, 1)[:, None])[None, :, None], lse[None, :, None]

    for found, expected in zip(joined(exactly(slice(4)), exactly(slice(4, 12))), exactly(slice(12)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def lse_in_tiles(q, k, v, mask, *, scale, softcap, slopes):
    return chunked.untiled(chunked.forward((scale, softcap), q, k, v, mask, slopes, chunked.nothing(q, k, v)), q)


def gradients_in_tiles(q, k, v, mask, lse, delta, g, *, scale, softcap, slopes):
    return chunked.backward((scale, softcap), q, k, v, mask, slopes, lse, delta, g)[:3]


@pytest.mark.parametrize("name", CASES)
def test_a_ring_of_eight_adds_up_what_kernels_give_of_each_hop(name, monkeypatch):
    """With others in the kernels' place that keep to their contract, and to fp32."""
    monkeypatch.setattr(flash, "check", lambda *_, **__: None)
    monkeypatch.setattr(flash, "with_lse", lse_in_tiles)
    monkeypatch.setattr(flash, "gradients", gradients_in_tiles)
    case = CASES[name]
    a = case.arrays(64, 8, jnp.float32)
    for found, expected in zip(split(case, a, 8, "ring"), textbook(case, a), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("exchange", ["ring", "alltoall"])
def test_what_the_kernels_cannot_do_is_refused(exchange, monkeypatch):
    a = Case().arrays(32, 64, jnp.bfloat16)
    with pytest.raises(ValueError, match="attention='flash' runs on Hopper GPUs, not cpu; use auto"):
        split(Case(), a, 2, exchange)
    monkeypatch.setattr(devices, "kind", lambda: H100)
    with pytest.raises(ValueError, match="attention='flash' computes in bfloat16 or float16, one for all, not float32"):
        split(Case(), a | {name: a[name].astype(jnp.float32) for name in "qkvg"}, 2, exchange)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in Pallas' interpreter, which looks for races, as if the devices were H100s.

    The interpreter's callbacks are ordered, and a program of several devices can have none that are: so each device calls the host, which
    interprets for one after another.
    """
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(devices, "kind", lambda: H100)
    knobs = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    turn = threading.Lock()

    @cache
    def compiled(kernel, scale, softcap):
        return jax.jit(lambda args, slopes: kernel(*args, slopes=slopes, scale=scale, softcap=softcap, **knobs))

    def on_host(kernel):
        def call(*args, scale, softcap, slopes):
            run = compiled(kernel, scale, softcap)

            def here(*of):
                with turn:
                    found = jax.tree.map(np.asarray, run(*of))
                    assert not interpret_pallas_call.get_races().races_found
                    return found

            return jax.pure_callback(here, jax.eval_shape(run, args, slopes), args, slopes)

        return call

    with_lse, gradients = on_host(flash.with_lse), on_host(flash.gradients)
    monkeypatch.setattr(flash, "with_lse", with_lse)
    monkeypatch.setattr(flash, "gradients", gradients)
    monkeypatch.setattr(flash, "attention", in_one(with_lse, gradients))
    small = flash_blocks.Blocks(64, 64, 2, False)
    monkeypatch.setattr(flash_blocks, "table", lambda: {(n, 64, kind): small for n in flash_blocks.KERNELS for kind in flash_blocks.KINDS})


def in_one(with_lse, gradients):
    """`flash.attention` of its two halves."""

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(static, q, k, v, mask, slopes):
        return forward(static, q, k, v, mask, slopes)[0]

    def forward(static, q, k, v, mask, slopes):
        out, lse = with_lse(q, k, v, mask, slopes=slopes, **dict(static))
        return out, (q, k, v, mask, slopes, out, lse)

    def backward(static, saved, g):
        q, k, v, mask, slopes, out, lse = saved
        return *gradients(q, k, v, mask, lse, chunked.weigh(g, out), g, slopes=slopes, **dict(static)), None, None

    run.defvjp(forward, backward)
    return lambda q, k, v, mask, slopes=None, **static: run(tuple(static.items()), q, k, v, mask, slopes)


def check(case: Case, devices: int, exchange: str, length: int) -> None:
    a = case.arrays(length, 64, jnp.bfloat16)
    exact = textbook(case, a | {name: a[name].astype(jnp.float32) for name in "qkvg"})
    for what, ours, theirs, true in zip(("out", "dq", "dk", "dv"), split(case, a, devices, exchange), rough(case, a), exact, strict=True):
        error, allowance = (np.abs(np.asarray(x, np.float32) - np.asarray(true)).max() for x in (ours, theirs))
        assert error <= 2 * allowance, f"{what} errs by {error}, where the textbook in bf16 errs by {allowance}"


def rough(case: Case, a: dict[str, jax.Array]) -> list[jax.Array]:
    """The textbook with everything in the type of the inputs."""

    def run(q, k, v, mask):
        length, dtype = q.shape[1], q.dtype
        k, v = (jnp.repeat(x, case.heads // case.kv_heads, 2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.asarray(q.shape[-1] ** -0.5, dtype)
        if case.softcap:
            scores = case.softcap * jnp.tanh(scores / case.softcap)
        if case.alibi:
            scores -= (case.slopes[:, None, None] * mask.distances(length, length)[:, None]).astype(dtype)
        allowed = mask.dense(length, length)[:, None]
        weights = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(dtype).min), -1), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return jax.jit(lambda a: case.both(run, a))(a)


@pytest.mark.parametrize(("exchange", "name"), [("ring", "packed, ALiBi"), ("alltoall", "window, capped")])
def test_the_kernels_on_two_devices(exchange, name, interpreted):
    check(replace(CASES[name], heads=2, kv_heads=1), 2, exchange, 44)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "name", "heads"), [("ring", "causal", 2), ("ring", "packed, ALiBi", 2), ("alltoall", "packed prefixes", 8)]
)
def test_the_kernels_on_eight_devices(exchange, name, heads, interpreted):
    check(replace(CASES[name], heads=heads, kv_heads=heads // 2), 8, exchange, 160)


@pytest.mark.aot
@pytest.mark.parametrize(("exchange", "calls"), [("ring", 2 + 2 * 3), ("alltoall", 3)])
def test_they_compile_for_eight_absent_h100s(h100, exchange, calls):
    """A ring's hops are a loop and what is written out beside it: the last forwards, the first and the last backwards."""
    layout = Layout(context=8, exchange=exchange)
    mesh = absent.mesh(layout, h100)
    execution = Execution(rules=rules(layout), exchange=exchange, attention="flash")

    def struct(*shape, dtype=jnp.bfloat16):
        where = jax.sharding.NamedSharding(mesh.abstract_mesh, jax.sharding.PartitionSpec(None, "context"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    a = {name: struct(1, 16384, heads, 128) for name, heads in (("q", 16), ("k", 8), ("v", 8), ("g", 16))}
    a |= {name: struct(1, 16384, dtype=jnp.int32) for name in ("segments", "positions")}
    case = Case(packed=True)
    run = jax.jit(lambda a: case.both(lambda *of: attention(*of, execution), a))
    text = absent.compiled(run, mesh, a).as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == calls
    exchanged = r" collective-permute(?:-start)?\(" if exchange == "ring" else r" all-to-all(?:-start)?\("
    assert re.search(exchanged, text)
