"""Paged attention for Hopper GPUs, in Pallas' Mosaic GPU dialect (Kwon et al., 2023; flash-decoding: Dao et al., 2023)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from lmx.kernels import paged_work as work
from lmx.kernels.paged import View
from lmx.kernels.paged_work import KEYS, ROWS, Cut, Items, Tiles

NONE, LEAST = -1e30, -1e20
"""The score of what is hidden, and the largest score before the first: so far above it that 2 to the power of their difference is 0."""
WIDE = 64
"""Columns of a result that are written at once."""
PROCESSORS, RESIDENT, WAVES = 132, 2, 2
"""Of an H100; programs that run on one at a time; and how many each has to run where there is enough to read."""


def attention(q, cache, view: View, *, scale, causal=True, window=None, softcap=None, slopes=None, cut: Cut | None = None, interpret=None):
    kv_heads = cache["key"].shape[1]
    group = q.shape[1] // kv_heads
    cut = cut or Cut(-(-WAVES * RESIDENT * PROCESSORS // kv_heads))
    call = partial(_tiled, cache=cache, view=view, scale=scale, window=window, softcap=softcap, slopes=slopes, cut=cut, interpret=interpret)
    found = []
    if view.singles:
        found.append(call(q[: view.singles], work.single_tiles(view, group, causal)))
    if (count := q.shape[0] - view.singles) > 0:
        out = call(q, work.chunk_tiles(view, count, group, causal))
        found.append(jnp.where(work.known(view, count)[:, None, None], out, 0))
    return jnp.concatenate(found)


def _tiled(q, tiles: Tiles, *, cache, view, window, cut, slopes, **options):
    kv_heads = cache["key"].shape[1]
    group = q.shape[1] // kv_heads
    items = work.items(view, tiles, window, cut)
    if slopes is not None:
        slopes = jnp.tile(slopes.astype(jnp.float32).reshape(kv_heads, group), (1, tiles.per))
        slopes = jnp.pad(slopes, ((0, 0), (0, tiles.rows - slopes.shape[1])))
    last = tiles.along_rows(tiles.last, group, -1)
    parts = partials(tiles.gathered(q, kv_heads), last, cache, view.pages, items, slopes, window=window, **options)
    return tiles.scattered(combined(*parts, items), group).astype(q.dtype)


def combined(out, stats, items: Items):
    places = jnp.arange(out.shape[0])
    mine = (places >= items.bounds[:-1, None]) & (places < items.bounds[1:, None])  # [tiles, items]
    top, total = stats[:, :, 0], stats[:, :, 1]
    highest = jnp.max(jnp.where(mine[:, :, None, None], top, LEAST), 1)  # [tiles, kv_heads, rows]
    factor = jnp.where(mine[:, :, None, None], jnp.exp2(top - highest[:, None]), 0)
    total = jnp.sum(jnp.where(factor > 0, factor * total, 0), 1)
    mixed = jnp.sum(jnp.where(factor[..., None] > 0, factor[..., None] * out, 0), 1)
    return mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def tiled(shape, dtype):
    """Shared memory as the tensor cores and their copies want it."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)))


def partials(q, last, cache, pages, items: Items, slopes, *, scale, window, softcap, interpret):
    (_, kv_heads, rows, dim), page = q.shape, cache["key"].shape[2]
    count, stages = items.table.shape[0], 2
    copies = max(1, KEYS // page)
    return plgpu.kernel(
        partial(_kernel, scale=scale, window=window, softcap=softcap, stages=stages),
        out_type=(
            jax.ShapeDtypeStruct((count, kv_heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((count, kv_heads, 2, rows), jnp.float32),
        ),
        grid=(count, kv_heads),
        grid_names=("items", "kv_heads"),
        scratch_types={
            "q_smem": tiled((ROWS, dim), q.dtype),
            "last_smem": plgpu.SMEM((ROWS,), jnp.int32),
            "slopes_smem": None if slopes is None else plgpu.SMEM((ROWS,), jnp.float32),
            "k_smem": tiled((stages, KEYS, dim), cache["key"].dtype),
            "v_smem": tiled((stages, KEYS, dim), cache["value"].dtype),
            "weights_smem": tiled((ROWS, KEYS), q.dtype),
            "out_smem": tiled((ROWS, WIDE), jnp.float32),
            "stats_smem": plgpu.SMEM((2, ROWS), jnp.float32),
            "here": plgpu.Barrier(num_arrivals=2 if slopes is None else 3),
            "k_here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "v_here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lmx_paged_attention",
        interpret=interpret,
    )(q, last, cache["key"], cache["value"], pages, items.table, slopes)


def _kernel(
    q_gmem, last_gmem, k_gmem, v_gmem, pages, table, slopes, out_gmem, stats_gmem,
    *, q_smem, last_smem, slopes_smem, k_smem, v_smem, weights_smem, out_smem, stats_smem, here, k_here, v_here,
    scale, window, softcap, stages,
):  # fmt: skip
    item, head = lax.axis_index("items"), lax.axis_index("kv_heads")
    tile, first, end, begin, behind = (table[item, i] for i in range(5))
    rows, dim, page = q_gmem.shape[2], q_gmem.shape[3], k_gmem.shape[2]
    copies, inside = max(1, KEYS // page), max(1, page // KEYS)
    size = min(page, KEYS)

    def ids(block):
        """Of a block's pages; where the text has ended, that of its last page once more."""
        at = begin + (block * copies if inside == 1 else lax.div(block, jnp.int32(inside)))
        return [pages[jnp.minimum(at + i, behind - 1)] for i in range(copies)]

    def fetch(gmem, smem, arrived, block, ids):
        slot = lax.rem(block - first, jnp.int32(stages))
        start = 0 if inside == 1 else lax.rem(block, jnp.int32(inside)) * KEYS
        for i, page_id in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                gmem.at[page_id, head, pl.ds(start, size)], smem.at[slot, pl.ds(i * size, size)], arrived.at[slot]
            )

    @pl.when(first < end)
    def _():
        plgpu.copy_gmem_to_smem(q_gmem.at[tile, head], q_smem.at[pl.ds(0, rows)], here)
        plgpu.copy_gmem_to_smem(last_gmem.at[tile], last_smem.at[pl.ds(0, rows)], here)
        if slopes is not None:
            plgpu.copy_gmem_to_smem(slopes.at[head], slopes_smem.at[pl.ds(0, rows)], here)
        for i in range(stages):

            @pl.when(first + i < end)
            def _():
                block = first + i
                fetch(k_gmem, k_smem, k_here, block, ids(block))
                fetch(v_gmem, v_smem, v_here, block, ids(block))

        plgpu.barrier_wait(here)

        def step(block, carry):
            mixed, top, total, *coming = carry
            slot = lax.rem(block - first, jnp.int32(stages))
            plgpu.barrier_wait(k_here.at[slot])

            def product(acc):
                plgpu.wgmma(acc, q_smem, k_smem.at[slot].T)
                plgpu.wgmma_wait(0)
                return acc[...]

            scores = pl.run_scoped(product, plgpu.ACC((ROWS, KEYS), jnp.float32))
            along = lambda a: lax.broadcast_in_dim(a, (ROWS, KEYS), [0])
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA) + block * KEYS
            behind = along(last_smem[...]) - keys
            factor = math.log2(math.e)
            if softcap is not None:
                doubled = jnp.exp2(scores * (2 * scale * factor / softcap))
                scores = softcap * factor - (2 * softcap * factor) / (doubled + 1)
            else:
                scores = scores * (scale * factor)
            if slopes is not None:
                scores -= along(slopes_smem[...]) * (behind.astype(jnp.float32) * factor)
            allowed = behind >= 0
            if window is not None:
                allowed &= behind < window
            scores = jnp.where(allowed, scores, NONE)
            higher = jnp.maximum(top, scores.max(1))
            shrink = jnp.exp2(top - higher)
            weights = jnp.exp2(scores - along(higher))
            total = total * shrink + weights.sum(1)
            weights_smem[...] = weights.astype(weights_smem.dtype)
            plgpu.commit_smem()

            @pl.when(block + stages < end)
            def _():
                fetch(k_gmem, k_smem, k_here, block + stages, coming)

            plgpu.barrier_wait(v_here.at[slot])

            def product(acc):
                plgpu.wgmma(acc, weights_smem, v_smem.at[slot])
                plgpu.wgmma_wait(0)
                return acc[...]

            new = pl.run_scoped(product, plgpu.ACC((ROWS, dim), jnp.float32))
            mixed = mixed * lax.broadcast_in_dim(shrink, (ROWS, dim), [0]) + new
            plgpu.commit_smem()

            @pl.when(block + stages < end)
            def _():
                fetch(v_gmem, v_smem, v_here, block + stages, coming)

            return mixed, higher, total, *ids(block + stages + 1)

        line = plgpu.Layout.WGMMA.reduce(1)
        top = plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), line)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), line)
        mixed = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
        mixed, top, total, *_ = lax.fori_loop(first, end, step, (mixed, top, total, *ids(first + stages)))

        stats_smem[0] = top
        stats_smem[1] = total
        for at in range(0, dim, WIDE):
            if at:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = mixed[:, at : at + WIDE]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_gmem.at[item, head, :, pl.ds(at, WIDE)])
        for i in range(2):
            plgpu.copy_smem_to_gmem(stats_smem.at[i, pl.ds(0, rows)], stats_gmem.at[item, head, i])
        plgpu.wait_smem_to_gmem(0)
