"""The kernels of paged attention for Hopper, on a machine without a GPU: in Pallas' interpreter, which also looks for races, against float64;
and compiled for an H100 that is not there."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lmx.kernels import devices, paged, paged_gpu, paged_work
from lmx.kernels.paged import View
from lmx.kernels.paged_work import Cut
from lmx.parallel import absent
from lmx.parallel.layout import Layout

POOL = 16
BF16, F16, INT8, FP8 = jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn
RACE = "RACE DETECTED"
"""Printed by jax 0.11, raised by 0.12."""
SLOPES = np.array([0.5, 0.25, 0.1, 0.05], np.float32)


def layout(rng, lengths, new, singles, page, padding=2):
    """Pages of rows, in no order, and a `View` of their last `new` tokens."""
    free = list(rng.permutation(np.arange(1, POOL)))
    pages = [[free.pop() for _ in range(-(-n // page))] for n in lengths]
    first, queries = np.cumsum([0, *map(len, pages)]), np.cumsum([0, *(1 if r < singles else n for r, n in enumerate(new))])
    flat = [p for row in pages for p in row]
    view = View(*(jnp.asarray(a, jnp.int32) for a in (flat + [0] * (POOL - len(flat)), first, lengths, queries)), singles)
    return view, int(queries[-1]) + padding


def contents(rng, count, heads, kv_heads, page, dim, kind, held):
    """Queries, a cache, and keys and values as the cache holds them, in float64."""
    q = jnp.asarray(rng.normal(size=(count, heads, dim)), kind)
    cache, plain = {}, []
    for name in ("key", "value"):
        a = rng.normal(size=(POOL, kv_heads, page, dim)).astype(np.float32)
        if jnp.dtype(held).itemsize > 1:
            cache[name] = jnp.asarray(a, held)
            plain.append(np.asarray(cache[name], np.float64))
            continue
        scale = np.abs(a).max(-1) / (127 if held == INT8 else 448)
        cache |= {name: jnp.asarray(np.round(a / scale[..., None]) if held == INT8 else a / scale[..., None]).astype(held)}
        cache[f"{name}_scale"] = jnp.asarray(scale)
        plain.append(np.asarray(cache[name], np.float64) * scale[..., None].astype(np.float64))
    return q, cache, *plain


def reference(q, keys, values, view, kind, *, scale, causal=True, window=None, softcap=None, slopes=None):
    """Row by row and head by head, in NumPy, every step in one type."""
    q, keys, values = (np.asarray(a).astype(kind) for a in (q, keys, values))
    out, group = np.zeros(q.shape, kind), q.shape[1] // keys.shape[1]
    first, queries = np.asarray(view.first), np.asarray(view.queries)
    for r, n in enumerate(np.asarray(view.lengths)):
        if n == 0:
            continue
        ids, tokens = np.asarray(view.pages)[first[r] : first[r + 1]], slice(queries[r], queries[r + 1])
        at = n - np.arange(queries[r + 1] - queries[r], 0, -1)[:, None]
        distance = (at if causal else n - 1) - np.arange(n)
        allowed = (distance >= 0) & (distance < (window or n + 1))
        if view.prefix is not None:
            allowed |= np.arange(n) < int(view.prefix[r])
        for h in range(q.shape[1]):
            k, v = (np.concatenate(list(a[ids, h // group]))[:n] for a in (keys, values))
            scores = (q[tokens, h] @ k.T) * np.asarray(scale, kind)
            if softcap is not None:
                scores = np.asarray(softcap, kind) * np.tanh(scores / np.asarray(softcap, kind))
            if slopes is not None:
                scores = scores - np.asarray(slopes[h], kind) * distance.astype(kind)
            scores = np.where(allowed, scores, np.asarray(-1e30 if kind != np.float16 else -6e4, kind))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[tokens, h] = (weights / weights.sum(1, keepdims=True).astype(kind)) @ v
    return out.astype(np.float64)


def interpreted(**options):
    """Races are found between what different copying threads do; that there are many makes none go unseen."""
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=16)
    return jax.jit(partial(paged_gpu.attention.__wrapped__, interpret=params, **options))


MIXED = {"lengths": [70, 0, 23], "new": [1, 0, 5], "singles": 2, "heads": 4, "kv_heads": 2, "page": 16, "dim": 64}
DECODING = {"lengths": [200, 1, 129], "new": [1, 1, 1], "singles": 3, "heads": 8, "kv_heads": 1, "page": 128, "dim": 128}
CHUNKS = {"lengths": [90, 0, 40], "new": [40, 0, 7], "singles": 0, "heads": 4, "kv_heads": 2, "page": 32, "dim": 64}
CASES = {
    "decoding": (DECODING, BF16, BF16, {}),
    "mixed, within a window": (MIXED, BF16, BF16, {"window": 20}),
    "chunks, a soft cap and ALiBi": (CHUNKS, F16, F16, {"softcap": 2.0, "slopes": SLOPES}),
    "chunks, a prefix and ALiBi": (CHUNKS, BF16, BF16, {"prefix": [90, 0, 36], "slopes": SLOPES}),
    "an encoder's, int8 pages": (CHUNKS, BF16, INT8, {"causal": False}),
    "fp8 pages": (DECODING | {"lengths": [90, 0, 7], "new": [1, 0, 1], "page": 16, "dim": 64}, F16, FP8, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_its_type_allows_and_without_races(case, capfd):
    shape, kind, held, asked = CASES[case]
    asked = dict(asked)
    rng = np.random.default_rng(len(case))
    view, count = layout(rng, shape["lengths"], shape["new"], shape["singles"], shape["page"])
    count = shape["singles"] if len(shape["lengths"]) == shape["singles"] else count
    q, cache, keys, values = contents(rng, count, *(shape[n] for n in ("heads", "kv_heads", "page", "dim")), kind, held)
    if "prefix" in asked:
        view = view.replace(prefix=jnp.array(asked.pop("prefix")))
    scale = shape["dim"] ** -0.5
    given = {name: jnp.asarray(a) if name == "slopes" else a for name, a in asked.items()}
    found = interpreted(scale=scale, cut=Cut(3, 1), **given)(q, cache, view)
    found.block_until_ready()
    assert RACE not in capfd.readouterr().out
    found = np.asarray(found, np.float64)
    exact, coarse = (reference(q, keys, values, view, t, scale=scale, **asked) for t in (np.float64, jnp.dtype(kind)))
    for norm in (np.max, np.mean):
        assert norm(np.abs(found - exact)) <= 2 * norm(np.abs(coarse - exact)), norm
    assert np.abs(found - exact).max() < 0.02
    gone = [i for r, n in enumerate(shape["lengths"]) if n == 0 for i in range(*(int(view.queries[r + j]) for j in (0, 1)))]
    assert not found[gone].any()
    assert not found[int(view.queries[-1]) :].any()  # padding


@pytest.mark.parametrize("forgotten", [2, 3])
def test_a_race_would_be_found(forgotten, monkeypatch, capfd):
    """A kernel that does not wait for keys, or for values, reads what is still being written."""
    wait, calls = plgpu.barrier_wait, []

    def forgetful(barrier):
        calls.append(barrier)
        if len(calls) != forgotten:
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", forgetful)
    rng = np.random.default_rng(0)
    view, _ = layout(rng, [20], [1], 1, 16)
    q, cache, *_ = contents(rng, 1, 1, 1, 16, 64, BF16, BF16)
    try:
        interpreted(scale=1.0, cut=Cut(1, 1))(q, cache, view).block_until_ready()
        said = capfd.readouterr().out
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    assert RACE in said
    assert len(calls) == 3


@pytest.mark.parametrize("window", [None, 300])
def test_items_cover_what_each_tile_sees_once(window):
    """Every block that a token of a tile sees is in one item, none is in two, and none is beyond the text; and every token is in a tile."""
    singles, rows, page, group, count, cut = 3, 7, 16, 5, 300, Cut(20, 2)

    def cutting(view):
        kinds = paged_work.single_tiles(view, group), paged_work.chunk_tiles(view, count, group, 64, True)
        items = [paged_work.items(view, tiles, window, cut) for tiles in kinds]
        return (
            [(t.owner, t.last, i.table, i.bounds) for t, i in zip(kinds, items, strict=True)],
            kinds[1].place,
            view.tokens(singles + count),
        )

    cutting = jax.jit(cutting)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 2000, rows) * (rng.random(rows) < 0.8)
        new = np.where(np.arange(rows) < singles, 1, np.minimum(rng.integers(1, 70, rows), lengths))
        first, queries = np.cumsum([0, *-(-lengths // page)]), np.cumsum([0, *new])
        view = View(*(jnp.asarray(a, jnp.int32) for a in (np.arange(900), first, lengths, queries)), singles)
        kinds, place, (owners, positions) = jax.tree.map(np.asarray, cutting(view))
        seen = set()
        for owner, last, table, bounds in kinds:
            assert bounds[-1] <= len(table)
            assert not table[bounds[-1] :].any()
            for t in range(len(owner)):
                mine, here = table[bounds[t] : bounds[t + 1]], last[t][last[t] >= 0]
                seen |= {(int(owner[t]), int(p)) for p in here}
                if not len(here):
                    assert not len(mine)
                    continue
                assert (mine[:, 0] == t).all()
                assert (mine[:, 3:5] == first[[owner[t], owner[t] + 1]]).all()
                blocks = [b for _, start, stop, *_ in mine for b in range(start, stop)]
                begin = 0 if window is None else max(here.min() - window + 1, 0)
                assert blocks == list(range(begin // 64, here.max() // 64 + 1))
                for b in range(*mine[0, 5:7]):  # said to be seen by all
                    keys = np.arange(b * 64, b * 64 + 64)
                    assert (keys <= here.min()).all()
                    assert window is None or (here.max() - keys < window).all()
        assert seen == {(r, int(n) - 1 - i) for r, n in enumerate(lengths) if n for i in range(new[r])}
        owners, positions, (tile, at) = owners[singles:], positions[singles:], place
        there = (owners < rows) & (lengths[np.minimum(owners, rows - 1)] > 0)
        np.testing.assert_array_equal(at >= 0, there)
        np.testing.assert_array_equal(last[tile[there], at[there]], positions[there])


def on_absent(kind="NVIDIA H100 80GB HBM3", size=1):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("data",), (AxisType.Auto,), abstract_device=device))


def abstract(rows=4, singles=4, tokens=4, heads=8, kv_heads=1, dim=128, page=16, kind=BF16, held=BF16):
    s = jax.ShapeDtypeStruct
    cache = {name: s((64, kv_heads, page, dim), held) for name in ("key", "value")}
    if jnp.dtype(held).itemsize == 1:
        cache |= {f"{name}_scale": s((64, kv_heads, page), jnp.float32) for name in ("key", "value")}
    view = View(*(s(shape, jnp.int32) for shape in ((64,), (rows + 1,), (rows,), (rows + 1,))), singles)
    return s((tokens, heads, dim), kind), cache, view


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"kind": jnp.float32, "held": jnp.float32}, "computes in bfloat16 or float16, not float32"),
        ({"held": F16}, "takes pages of bfloat16 or of int8 or float8_e4m3fn, not float16"),
        ({"dim": 80}, "head dimensions that are multiples of 64 up to 256"),
        ({"page": 4}, "pages of 8 tokens or more that divide 64 or are its multiples, not 4"),
        ({"page": 96}, "not 96"),
        ({"heads": 65}, "up to 64 query heads of dimension 128 for one key head of bfloat16, not 65"),
        ({"heads": 24, "dim": 256, "held": INT8, "page": 32}, "up to 16 query heads of dimension 256 for one key head of int8, not 24"),
    ],
)
def test_what_it_cannot_do_is_refused_and_left_to_xla(shape, reason):
    q, cache, view = abstract(**shape)
    attend = partial(paged.attention, scale=1.0)
    with on_absent():
        with pytest.raises(ValueError, match=f"paged attention='gpu' .*{reason}.*; use auto or xla"):
            jax.eval_shape(partial(attend, implementation="gpu"), q, cache, view)
        assert "lmx_paged" not in str(jax.make_jaxpr(attend)(q, cache, view))


def test_the_door_takes_it_by_name_on_one_hopper_gpu_alone():
    q, cache, view = abstract()
    attend = partial(paged.attention, scale=1.0)
    with on_absent():
        assert "lmx_paged_attention" in str(jax.make_jaxpr(partial(attend, implementation="gpu"))(q, cache, view))
        for other in ("xla", "auto"):
            assert "lmx_paged_attention" not in str(jax.make_jaxpr(partial(attend, implementation=other))(q, cache, view))
        with pytest.raises(ValueError, match="takes no learned bias"):
            jax.eval_shape(partial(attend, implementation="gpu", bias=lambda index, keys: 0), q, cache, view)
    with on_absent(size=2), pytest.raises(ValueError, match=r"is one device's: .* call it within jax.shard_map"):
        jax.eval_shape(partial(attend, implementation="gpu"), q, cache, view)
    with pytest.raises(ValueError, match=r"is for Hopper GPUs \(H100, H200\), not cpu"):
        jax.eval_shape(partial(attend, implementation="gpu"), q, cache, view)
    with pytest.raises(ValueError, match="paged attention='triton' is not one of auto, xla, gpu"):
        jax.eval_shape(partial(attend, implementation="triton"), q, cache, view)
    assert not devices.on_hopper()


def test_it_lowers_for_an_absent_gpu():
    shapes = abstract(rows=6, tokens=40, page=64, held=INT8)
    with on_absent():
        attend = partial(paged.attention, scale=1.0, window=100, implementation="gpu")
        text = jax.jit(attend).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu_v2", text)) == 4  # each of two kernels, for rows that decode and for chunks


def test_layers_that_call_it_alike_share_what_is_lowered():
    """A kernel takes about a second to lower, and a model may have a hundred layers."""
    shapes = abstract(rows=6, tokens=6, page=64)

    def layers(q, cache, view):
        for _ in range(5):
            q = paged.attention(q, cache, view, scale=1.0, implementation="gpu")
        return q

    with on_absent():
        text = jax.jit(layers).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    once = jax.jit(partial(paged.attention, scale=1.0, implementation="gpu"))
    with on_absent():
        alone = once.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    found, one = (len(re.findall(r"custom_call @mosaic_gpu_v2", t)) for t in (text, alone))
    assert 0 < found <= 2 * one  # the first call's queries are an argument, whose type says so


def on(mesh, shapes):
    """Shapes of arrays of which each device has a whole."""
    sharding = NamedSharding(mesh.abstract_mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


EVERYTHING = {"window": 100, "softcap": 30.0, "slopes": True}


@pytest.fixture
def uncached():
    """A program that comes from the cache says nothing of registers."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.aot
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("shape", "asked"),
    [
        ({"dim": 64, "kind": F16, "held": F16, "heads": 32, "kv_heads": 32}, {}),
        ({"page": 64, "tokens": 40, "rows": 6}, EVERYTHING),
        ({"page": 128, "tokens": 40, "rows": 6, "dim": 256, "kv_heads": 2}, EVERYTHING),
        ({"page": 8, "tokens": 40, "rows": 6, "held": INT8}, EVERYTHING),
        ({"page": 64, "tokens": 40, "rows": 6, "dim": 256, "held": INT8}, EVERYTHING),
        ({"page": 64, "tokens": 40, "rows": 6, "dim": 192, "held": FP8}, EVERYTHING),
    ],
)
def test_it_compiles_for_an_h100_without_spilling(h100, shape, asked, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    shapes = abstract(**shape)
    slopes = jax.ShapeDtypeStruct((shapes[0].shape[1],), jnp.float32) if asked.get("slopes") else None
    asked = {name: value for name, value in asked.items() if name != "slopes"}

    def attend(q, cache, view, slopes):
        return paged.attention(q, cache, view, scale=1.0, implementation="gpu", slopes=slopes, **asked)

    mesh = absent.mesh(Layout(), h100)
    text = absent.compiled(jax.jit(attend), mesh, *on(mesh, (*shapes, slopes))).as_text()
    assert "mosaic_gpu_v2" in text
    said = capfd.readouterr()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said.out + said.err)
    assert spills
    assert set(spills) == {("0", "0")}


@pytest.mark.aot
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("held", [BF16, INT8])
def test_pages_are_written_in_place(h100, held):
    """No kernel is needed for this: XLA scatters into donated pages, with no copy of them."""
    q, cache, _ = abstract(tokens=32, kv_heads=8, heads=8, page=32, held=held)
    write = jax.jit(paged.write, donate_argnums=0)
    mesh = absent.mesh(Layout(), h100)
    program = absent.compiled(write, mesh, *on(mesh, (cache, q, q, jax.ShapeDtypeStruct((32,), jnp.int32))))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == sum(a.size * a.dtype.itemsize for a in cache.values())
    assert memory.temp_size_in_bytes < 10_000
