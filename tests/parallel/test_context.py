"""Attention over sequences that are split: long ones against exact rows, and what a device needs for them."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import interop
from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.kernels import chunked, dense, reference
from lmx.kernels.attention import attention as kernel
from lmx.kernels.masks import Mask
from lmx.models import rwkv, transformer
from lmx.models.config import RWKV, Transformer
from lmx.parallel.attention import attention
from lmx.parallel.context import arrange, as_read
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules

pytestmark = pytest.mark.usefixtures("compiled_here", "optimised")

LENGTH, HEADS, KV_HEADS, DIM = 32768, 8, 2, 32


def inputs(length: int) -> dict[str, np.ndarray]:
    """One packed row: three texts of different lengths, and padding at the end."""
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=(1, length, h, DIM)).astype(np.float32) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    ends = [0, length // 8, length // 2, length - length // 16]
    segments = np.zeros((1, length), np.int32)
    positions = np.zeros((1, length), np.int32)
    for segment, (start, end) in enumerate(itertools.pairwise(ends), 1):
        segments[0, start:end], positions[0, start:end] = segment, np.arange(end - start)
    return arrays | {"segments": segments, "positions": positions}


def exact_row(a: dict, i: int, window: int | None) -> np.ndarray:
    """One query's output, `[heads, head_dim]`, in float64."""
    first = 0 if window is None else max(0, i - window + 1)
    seen = np.arange(first, i + 1)
    seen = seen[a["segments"][0, seen] == a["segments"][0, i]]
    if a["segments"][0, i] == 0:
        return np.zeros((HEADS, DIM))
    k, v = (np.repeat(a[n][0, seen].astype(np.float64), HEADS // KV_HEADS, 1) for n in "kv")
    scores = np.einsum("hd,khd->hk", a["q"][0, i].astype(np.float64), k) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(-1, keepdims=True), v)


class Run:
    """The attention of a layout: its function, its arguments in place, and the order in which it gives rows."""

    def __init__(self, layout: Layout, a: dict, window: int | None):
        self.mesh = make_mesh(layout)
        execution = Execution(rules=rules(layout), exchange=layout.exchange)

        def run(q, k, v, segments, positions):
            mask = Mask(window=window, query_segments=segments, key_segments=segments, query_positions=positions, key_positions=positions)
            return attention(q, k, v, mask, execution)

        with jax.set_mesh(self.mesh):
            order = jax.jit(partial(arrange, execution=execution))({"x": jnp.arange(LENGTH)[None]})["x"]
            self.order = np.asarray(order)[0]
            self.arguments = [jax.device_put(x[:, self.order], NamedSharding(self.mesh, P(None, "context"))) for x in a.values()]
        self.function = run

    def __call__(self) -> np.ndarray:
        """The output, `[length, heads, head_dim]`, in order."""
        out = np.empty((LENGTH, HEADS, DIM), np.float32)
        with jax.set_mesh(self.mesh):
            out[self.order] = np.asarray(jax.jit(self.function)(*self.arguments))[0]
        return out

    def bytes_to_train(self) -> int:
        """What a device needs for the gradient."""
        with jax.set_mesh(self.mesh):
            gradient = jax.jit(jax.grad(lambda *a: jnp.sum(self.function(*a) ** 2), (0, 1, 2)))
            memory = gradient.lower(*self.arguments).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3000])
@pytest.mark.parametrize("exchange", ["ring", "alltoall"])
def test_32k_tokens_on_eight_devices(exchange, window, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 256)  # what a tile needs does not shrink with the devices
    a = inputs(LENGTH)
    split, alone = Run(Layout(context=8, exchange=exchange), a, window), Run(Layout(), a, window)
    if window is None:
        most = 2 if exchange == "ring" else 1.6  # a ring's first and last hop are written out beside the loop over the others
        assert split.bytes_to_train() < most / 8 * alone.bytes_to_train()
    out = split()
    for i in np.random.default_rng(1).choice(LENGTH, 24, replace=False):
        np.testing.assert_allclose(out[i], exact_row(a, i, window), atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exchange", ["ring", "alltoall"])
@pytest.mark.parametrize(("heads", "kv_heads", "devices"), [(6, 3, 2), (8, 2, 8), (8, 1, 4), (4, 4, 2), (12, 4, 6)])
def test_however_many_query_heads_share_a_key_head(exchange, heads, kv_heads, devices, causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 48, h, 4)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    positions = np.tile(np.arange(48, dtype=np.int32), (2, 1))
    layout = Layout(context=devices, exchange=exchange)
    execution = Execution(rules=rules(layout), exchange=exchange)

    @jax.jit
    def run(q, k, v, positions):
        placed = arrange({"q": q, "k": k, "v": v, "positions": positions}, execution)
        mask = Mask(causal, query_positions=placed["positions"], key_positions=placed["positions"])
        return attention(placed["q"], placed["k"], placed["v"], mask, execution), placed["positions"]

    with jax.set_mesh(make_mesh(layout)):
        found, order = map(np.asarray, run(q, k, v, positions))
    expected = np.asarray(kernel(q, k, v, Mask(causal)))
    np.testing.assert_allclose(found, expected[:, order[0]], atol=1e-5)


@pytest.mark.parametrize("exchange", ["ring", "alltoall"])
def test_prefixes_go_where_keys_go(exchange):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 32, 4, 4)).astype(np.float32) for _ in range(3))
    segments = np.repeat([[1, 2], [1, 1]], 16, axis=1).astype(np.int32)
    about = {
        "positions": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
        "segments": segments,
        "prefix": ((np.arange(32) % 16 < 9) & (segments < 2)).astype(np.int32),
    }
    layout = Layout(context=4, exchange=exchange)
    execution = Execution(rules=rules(layout), exchange=exchange)

    def mask(of) -> Mask:
        return Mask(
            query_positions=of["positions"],
            key_positions=of["positions"],
            query_segments=of["segments"],
            key_segments=of["segments"],
            key_prefix=of["prefix"],
        )

    @jax.jit
    def run(q, k, v, about):
        placed = arrange({"q": q, "k": k, "v": v} | about, execution)
        return attention(placed["q"], placed["k"], placed["v"], mask(placed), execution), placed["positions"]

    with jax.set_mesh(make_mesh(layout)):
        found, order = map(np.asarray, run(q, k, v, about))
    expected = np.asarray(kernel(q, k, v, mask(about), implementation="reference"))
    np.testing.assert_allclose(found, expected[:, order[0]], atol=1e-5)


@pytest.mark.parametrize("implementation", ["cudnn", "dense", "reference", "single", "flesh"])
def test_a_ring_refuses_what_it_does_not_go_by(implementation):
    layout = Layout(context=4)
    execution = Execution(rules=rules(layout), attention=implementation)
    q = jnp.zeros((1, 16, 4, 8))
    with (
        jax.set_mesh(make_mesh(layout)),
        pytest.raises(ValueError, match=f"attention=.{implementation}. cannot go on .* layout.exchange='ring' .*; use auto or xla"),
    ):
        attention(q, q, q, Mask(), execution)


@pytest.mark.parametrize("implementation", ["reference", "dense", "chunked"])
def test_heads_that_are_traded_take_what_is_named(implementation, monkeypatch):
    taken = []
    for module, name in ((reference, "reference"), (dense, "dense"), (chunked, "chunked")):
        real = module.attention
        monkeypatch.setattr(module, "attention", lambda *args, real=real, name=name, **how: taken.append(name) or real(*args, **how))
    layout = Layout(context=4, exchange="alltoall")
    execution = Execution(rules=rules(layout), exchange="alltoall", attention=implementation)
    q = jax.random.normal(jax.random.key(0), (1, 16, 4, 8))
    with jax.set_mesh(make_mesh(layout)):
        found = attention(q, q, q, Mask(), execution)
    assert taken == [implementation]
    np.testing.assert_allclose(np.asarray(found), np.asarray(kernel(q, q, q, Mask(), implementation="xla")), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "q", "k", "said"),
    [
        (Layout(context=2), (6, 4), (6, 4), "a length of 6 is not divisible by 2 x layout.context=2"),
        (Layout(context=4, exchange="alltoall"), (8, 6), (8, 6), "trades a device's 6 heads among layout.context=4"),
        (Layout(context=2, tensor=2, exchange="alltoall"), (8, 6), (8, 6), "trades a device's 3 heads among layout.context=2"),
        (Layout(tensor=4), (8, 12), (8, 6), "6 key heads are not divisible by layout.tensor=4"),
    ],
    ids=str,
)
def test_what_attention_cannot_split_is_refused(layout, q, k, said):
    q, k = (jnp.zeros((1, length, heads, 8)) for length, heads in (q, k))
    with jax.set_mesh(make_mesh(layout)), pytest.raises(ValueError, match=said):
        attention(q, k, k, Mask(), Execution(rules=rules(layout), exchange=layout.exchange))


def test_what_is_not_of_tokens_is_not_put_in_their_order():
    layout = Layout(context=2)
    images = {"tokens": jnp.zeros((2, 8), int), "pixels": jnp.zeros((2, 4, 8, 8))}
    with jax.set_mesh(make_mesh(layout)), pytest.raises(ValueError, match=r"second dimensions are {'tokens': 8, 'pixels': 4}; leave out"):
        arrange(images, Execution(rules=rules(layout)))


def test_an_order_that_does_not_divide_is_refused_both_ways():
    execution, a = Execution(rules=rules(Layout(context=2))), jnp.zeros((2, 6, 4))
    with jax.set_mesh(make_mesh(Layout(context=2))):
        for order in (lambda a, _: arrange({"tokens": a}, execution), as_read):
            with pytest.raises(ValueError, match=r"a length of 6 is not divisible by 2 x layout\.context=2"):
                order(a, execution)


def test_a_call_by_a_peers_names_is_refused_a_rings_order():
    layout = Layout(context=2)
    with jax.set_mesh(make_mesh(layout)), pytest.raises(ValueError, match=r"layout.exchange=ring .* use alltoall"):
        interop.call(None, {}, {}, execution=Execution(rules=rules(layout)))


@pytest.mark.parametrize("taps", [(), ("layers/*/attention/weights",)], ids=["as it is", "with its weights"])
def test_a_forward_in_a_rings_order_that_is_told_no_positions(taps):
    model = Transformer(vocab=16, layers=1, embed=8, heads=2, mlp=8, context=16, positions="learned", init_std=0.5)
    params, tokens = initial_values(jax.random.key(0), transformer.specs(model)), jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
    layout = Layout(context=2)
    execution = Execution(rules=rules(layout), taps=taps)
    alone = jax.jit(lambda tokens: transformer.forward(params, model, tokens).hidden)(tokens)

    @jax.jit
    def run(tokens):
        placed = arrange({"tokens": tokens}, execution)
        return as_read(transformer.forward(params, model, placed["tokens"], execution=execution).hidden, execution)

    with jax.set_mesh(make_mesh(layout)):
        np.testing.assert_allclose(run(tokens), alone, atol=1e-5)


def test_an_rwkv_does_not_read_a_rings_order():
    layout = Layout(context=2)
    with jax.set_mesh(make_mesh(layout)), pytest.raises(ValueError, match=r"layout.exchange=ring .* set layout.context to 1"):
        rwkv.forward({}, RWKV(), jnp.zeros((2, 8), int), execution=Execution(rules=rules(layout)))
