"""Attention over arrays against a float64 loop over rows, heads and queries."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import chunked
from lmx.kernels.attention import IMPLEMENTATIONS, attention
from lmx.kernels.masks import Mask

WHOLE = [name for name in IMPLEMENTATIONS if name not in ("auto", "xla", "single", "cudnn", "flash")]
"""Implementations that take any number of queries, on any device."""
PAIRS = [(name, queries) for name in WHOLE for queries in (4, 1)] + [("single", 1)]
BATCH, KEYS, HEADS, KV_HEADS, DIM = 2, 7, 6, 2, 4


@dataclass(frozen=True)
class Case:
    """One call, for as many queries as the implementation takes."""

    softcap: float | None = None
    alibi: bool = False
    window: int | None = None
    segments: bool = False
    prefix: bool = False
    scale: float | None = None
    kv_heads: int = KV_HEADS
    causal: bool = True

    def inputs(self, queries: int) -> dict:
        rng = np.random.default_rng(queries)
        shapes = {"q": (BATCH, queries, HEADS, DIM), "k": (BATCH, KEYS, self.kv_heads, DIM), "v": (BATCH, KEYS, self.kv_heads, DIM)}
        arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        keys = np.tile(np.arange(KEYS, dtype=np.int32), (BATCH, 1))
        mask = Mask(self.causal, self.window, order="positions", query_positions=keys[:, KEYS - queries :], key_positions=keys)
        if self.prefix:
            mask = mask.replace(key_prefix=np.array([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]], np.int32))
        if self.segments:
            # The last queries of row 0 see two keys, those of row 1 none: their segment is padding.
            segments = np.array([[1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0, 0]], np.int32)
            mask = mask.replace(query_segments=segments[:, KEYS - queries :], key_segments=segments)
        return arrays | {"mask": mask, "slopes": 2.0 ** -np.arange(1.0, HEADS + 1).astype(np.float32) if self.alibi else None}


CASES = {
    "plain": Case(),
    "multi-query": Case(kv_heads=1, scale=0.7),
    "one key head a head": Case(kv_heads=6),
    "capped": Case(softcap=0.5),
    "alibi": Case(alibi=True),
    "window": Case(window=3),
    "both ways": Case(causal=False),
    "both ways, packed": Case(causal=False, segments=True),
    "both ways, capped": Case(causal=False, softcap=0.5, segments=True),
    "all but a cap": Case(alibi=True, window=4, segments=True),
    "prefix": Case(prefix=True),
    "prefixes of packed texts": Case(prefix=True, segments=True, alibi=True),
    "everything": Case(softcap=1.5, alibi=True, window=4, segments=True),
}


def loop(q, k, v, mask: Mask, slopes, *, scale=None, softcap=None, keep=None) -> np.ndarray:
    """Vaswani et al. (2017), equation 1, for each row, head and query by itself."""
    batch, queries, heads, dim = q.shape
    share = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                terms = []
                for j in range(k.shape[1]):
                    behind = int(mask.query_positions[b, i]) - int(mask.key_positions[b, j])
                    shown = mask.key_prefix is not None and mask.key_prefix[b, j] == 1
                    if not shown and ((mask.causal and behind < 0) or (mask.window is not None and behind >= mask.window)):
                        continue
                    if mask.query_segments is not None and not mask.query_segments[b, i] == mask.key_segments[b, j] != 0:
                        continue
                    score = float(q[b, i, h] @ k[b, j, h // share]) * (dim**-0.5 if scale is None else scale)
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    score -= 0.0 if slopes is None else float(slopes[h]) * behind
                    terms.append((math.exp(score), 1.0 if keep is None else keep[b, h, i, j], v[b, j, h // share]))
                total = sum(weight for weight, _, _ in terms)
                for weight, kept, value in terms:
                    out[b, i, h] += weight / total * kept * value
    return out


@partial(jax.jit, static_argnames=("scale", "softcap", "implementation"))
def value_and_pullback(q, k, v, mask, slopes, cotangent, *, scale, softcap, implementation):
    def run(q, k, v):
        return attention(q, k, v, mask, slopes=slopes, scale=scale, softcap=softcap, implementation=implementation)

    out, pullback = jax.vjp(run, q, k, v)
    return out, pullback(cotangent)


def refused(implementation: str, case: Case) -> bool:
    """Whether an implementation says that it has no soft cap."""
    if implementation != "dense" or case.softcap is None:
        return False
    with pytest.raises(ValueError, match=f"'{implementation}' takes .*soft cap"):
        attention(**case.inputs(4), softcap=case.softcap, implementation=implementation)
    return True


@pytest.mark.parametrize(("implementation", "queries"), PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_loop_in_float64(name, implementation, queries):
    case = CASES[name]
    if refused(implementation, case):
        return
    inputs = case.inputs(queries)
    cotangent = np.random.default_rng(9).normal(size=inputs["q"].shape).astype(np.float32)
    knobs = {"scale": case.scale, "softcap": case.softcap}
    found, gradients = jax.device_get(value_and_pullback(**inputs, cotangent=cotangent, **knobs, implementation=implementation))
    wide = inputs | {n: inputs[n].astype(np.float64) for n in "qkv"}
    expected = loop(**wide, **knobs)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    rng, step = np.random.default_rng(1), 1e-6
    for n, gradient in zip("qkv", gradients, strict=True):
        direction = rng.normal(size=gradient.shape)
        up, down = (loop(**wide | {n: wide[n] + sign * step * direction}, **knobs) for sign in (1, -1))
        slope = float((cotangent * (up - down)).sum()) / (2 * step)
        size = float(np.abs(gradient * direction).sum())
        assert abs(float((gradient * direction).sum()) - slope) <= 1e-5 * size + 1e-7


@pytest.mark.parametrize(("implementation", "queries"), PAIRS)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(implementation, queries):
    case = CASES["everything"]
    inputs = case.inputs(queries)
    for softcap in (None,) if refused(implementation, case) else (None, 1.5):
        for size in (1.0, 1e6):
            cotangent = np.full(inputs["q"].shape, size, np.float32)
            out, gradients = jax.device_get(
                value_and_pullback(**inputs, cotangent=cotangent, scale=None, softcap=softcap, implementation=implementation)
            )
            assert np.array_equal(out[1], np.zeros_like(out[1]))
            assert out[0].any()
            assert all(np.isfinite(g).all() for g in gradients)
            assert all(not g[1].any() for g in gradients)
            assert all(g[0].any() for g in gradients)


def test_scores_that_overflow_an_exponential_do_not():
    inputs = CASES["plain"].inputs(4)
    inputs["q"] = inputs["q"] * 1e4
    out = np.asarray(attention(inputs["q"], inputs["k"], inputs["v"], inputs["mask"]))
    assert np.isfinite(out).all()
    # So far apart, the largest score takes all: each output is one of the values.
    values = inputs["v"].repeat(HEADS // KV_HEADS, 2)
    nearest = np.abs(out[:, :, None] - values[:, None]).max(-1).min(2)
    assert (nearest < 1e-5).mean() > 0.9


def test_weights_are_multiplied_by_keep_after_the_softmax():
    inputs = CASES["plain"].inputs(4)
    keep = np.random.default_rng(2).integers(0, 2, (BATCH, HEADS, 4, KEYS)).astype(np.float32) * 2
    found = attention(inputs["q"], inputs["k"], inputs["v"], inputs["mask"], keep=keep)
    expected = loop(**inputs, keep=keep)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("implementation", "queries"), PAIRS)
def test_in_bfloat16_scores_and_sums_are_float32(implementation, queries):
    case = CASES["everything"]
    case = CASES["all but a cap"] if refused(implementation, case) else case
    inputs = case.inputs(queries)
    narrow = inputs | {n: jnp.asarray(inputs[n] * 3, jnp.bfloat16) for n in "qkv"}
    found = attention(**narrow, softcap=case.softcap, implementation=implementation)
    assert found.dtype == jnp.bfloat16
    expected = loop(**inputs | {n: np.asarray(narrow[n], np.float64) for n in "qkv"}, softcap=case.softcap)
    # One rounding of the weights and one of the result; scores in bfloat16 would be several times as far off.
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= 2**-7 * np.abs(expected).max()


def test_auto_takes_the_single_query_where_it_applies():
    def traced(queries, implementation, keep=None, softcap=None):
        inputs = CASES["plain"].inputs(queries)

        def run(q):
            return attention(**inputs | {"q": q}, keep=keep, softcap=softcap, implementation=implementation)

        return str(jax.make_jaxpr(run)(inputs["q"]))

    assert traced(1, "auto") == traced(1, "single") != traced(1, "reference")
    assert traced(1, "auto", softcap=1.0) == traced(1, "single", softcap=1.0)
    assert traced(4, "auto") in [traced(4, name) for name in WHOLE]
    assert traced(4, "auto", softcap=1.0) == traced(4, "chunked", softcap=1.0)
    for queries in (1, 4):
        keep = np.ones((BATCH, HEADS, queries, KEYS), np.float32)
        assert traced(queries, "auto", keep) == traced(queries, "reference", keep)


@pytest.mark.parametrize(("implementation", "queries"), [*PAIRS, ("auto", 16)])
def test_a_cache_of_bfloat16_is_attended_to(implementation, queries):
    """A cache is stored with its heads first, which makes other products of the same mathematics."""
    rng, slots = np.random.default_rng(0), 32
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, queries, 2, 8), (2, 2, slots, 8), (2, 2, slots, 8)))
    places = np.tile(np.arange(slots, dtype=np.int32), (2, 1))
    mask = Mask(order="positions", query_positions=places[:, slots - queries :], key_positions=places)

    @jax.jit
    def run(q, k, v):
        return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, implementation=implementation)

    found = np.asarray(run(q, k, v), np.float64)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    expected = loop(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, None)
    assert np.abs(found - expected).max() <= 2**-6 * np.abs(expected).max()


def test_what_cannot_be_done_is_refused_by_name():
    inputs = CASES["plain"].inputs(4)
    with pytest.raises(ValueError, match=f"attention='flesh' is not one of {', '.join(IMPLEMENTATIONS)}"):
        attention(**inputs, implementation="flesh")
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        attention(inputs["q"], inputs["k"].repeat(2, 2), inputs["v"].repeat(2, 2), inputs["mask"])
    with pytest.raises(ValueError, match="6 query heads cannot share 12 key heads"):
        attention(inputs["q"], inputs["k"].repeat(6, 2), inputs["v"].repeat(6, 2), inputs["mask"])
    with pytest.raises(ValueError, match=r"'single' takes one query .*not 4"):
        attention(**inputs, implementation="single")
    one, keep = CASES["plain"].inputs(1), np.ones((BATCH, HEADS, 1, KEYS), np.float32)
    with pytest.raises(ValueError, match=r"'single' takes one query .*dropout"):
        attention(**one, keep=keep, implementation="single")


@pytest.mark.parametrize("tile", [1, 2, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_tiles_change_nothing_but_memory(monkeypatch, tile, shuffled):
    monkeypatch.setattr(chunked, "TILE", tile)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(BATCH, 8, heads, DIM)), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 0, 0]], np.int32)
    mask = Mask(window=3, query_segments=segments, key_segments=segments, query_positions=positions, key_positions=positions)
    slopes = 2.0 ** -np.arange(1.0, HEADS + 1).astype(np.float32)
    g = rng.normal(size=q.shape).astype(np.float32)

    def pull(implementation, mask, q, k, v, g):
        run = partial(attention, mask=mask, softcap=1.5, slopes=slopes, implementation=implementation)
        out, vjp = jax.vjp(run, q, k, v)
        return out, *vjp(g)

    expected = pull("reference", mask, q, k, v, g)
    order = rng.permutation(8) if shuffled else np.arange(8)
    if shuffled:  # places are told, not counted
        taken = {n: getattr(mask, n)[:, order] for n in ("query_segments", "key_segments", "query_positions", "key_positions")}
        mask = mask.replace(query_index=jnp.asarray(order), key_index=jnp.asarray(order), **taken)
    found = pull("chunked", mask, *(a[:, order] for a in (q, k, v, g)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("remat", [False, True])
def test_tiles_take_no_memory_of_the_whole_masks_size_under_a_scan_over_layers(monkeypatch, remat):
    """Twice the length takes about twice the memory: the masks of tiles depend on no layer, and are not all made ahead of them."""
    monkeypatch.setattr(chunked, "TILE", 32)

    def temporary(length: int) -> int:
        def loss(x, segments):
            mask = Mask(query_segments=segments, key_segments=segments)

            def layer(x, _):
                return x + attention(x, x, x, mask, implementation="chunked"), None

            return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, length=3)[0].sum()

        x, segments = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(x, segments).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(512), temporary(1024)
    assert long < 2.2 * short
    assert long < 4 * 1024**2 / 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_the_length_up_to_32k_tokens(backward):
    """Temporaries of the compiled program, with the tiles that a CPU uses: a matrix of scores alone would be 4 GB at the longest."""

    def temporary(length: int) -> int:
        def run(q, k, v):
            return attention(q, k, v, Mask(), implementation="auto").sum()

        shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (2, 1, 1)]
        return jax.jit(jax.grad(run, (0, 1, 2)) if backward else run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    sizes = {length: temporary(length) for length in (8192, 16384, 32768)}
    assert sizes[16384] < 2.1 * sizes[8192]
    assert sizes[32768] < 2.1 * sizes[16384]
    assert sizes[32768] < 2**28
