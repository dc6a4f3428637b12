"""The two kernels of paged attention for Hopper, in Pallas' Mosaic GPU dialect; `paged_gpu` calls them.

A program of the first has a tile of queries and one work item: it walks over the item's blocks of keys, the next few of which are on their
way to shared memory, page by page. It is one warpgroup and holds little, so that two or three programs fit a processor, and while one
computes or starts, the others read: reading is what takes the time.

Products are turned round: keys are on the left of the first and columns of values on the left of the second, 64 at a time as the tensor cores
want it, and the tile is on the right, where 8 rows will do. With the tile on the left a token that decodes would pay for 64 rows, and int8
pages would be read no faster than they are computed with. Both sides lie in shared memory: assemblers before CUDA 13.3 get products wrong
whose left side is in registers. What the items of a tile found, the second kernel puts together.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from lmx.kernels.paged_work import KEYS, Items

NONE, LEAST = -1e30, -1e20
"""The score of what is hidden, and the largest score before the first: so far above it that 2 to the power of their difference is 0."""
TINY = 1.1754944e-38
LOG2E = math.log2(math.e)
MOST_PROGRAMS = 3
"""That share a processor."""
SHARED, RESERVED = 233_472, 1024
"""Bytes of a processor's shared memory, and of it what each program has no use of."""
MOST_STAGES = 4
SOME, AT_ONCE = 8, 8
"""Rows that a program of the second kernel puts together, and of how many items at a time."""

Partials = tuple[Float[Array, "items kv_heads rows head_dim"], Float[Array, "items kv_heads 2 rows"]]


def tiled(shape: tuple[int, ...], dtype) -> object:
    """Shared memory as the tensor cores and their copies want it."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)))


def room(rows: int, dim: int, dtype, held) -> tuple[int, int]:
    """How many programs share a processor, and how many blocks of keys and values each has in shared memory at a time."""
    size, narrow = jnp.dtype(dtype).itemsize, jnp.dtype(held).itemsize == 1
    fixed = (rows * (dim + KEYS) + narrow * KEYS * dim) * size + rows * 64 * 4 + 4096
    each = 2 * KEYS * (dim * jnp.dtype(held).itemsize + 4 * narrow)
    for programs in range(MOST_PROGRAMS if rows <= 16 else 2, 0, -1):
        stages = min(MOST_STAGES, (SHARED // programs - RESERVED - fixed) // each)
        if stages >= 2:
            return programs, stages
    raise ValueError(f"head_dim={dim} is too wide for two blocks of {held} pages in shared memory")


def partials(
    q: Float[Array, "tiles kv_heads rows head_dim"],
    last: Int[Array, "tiles rows"],
    slopes: Float[Array, "kv_heads rows"] | None,
    cache: dict[str, Array],
    pages: Int[Array, "n"],
    items: Items,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: object,
) -> Partials:
    """Of each item the sum of values, weighted, and of each row the largest score, in units of log 2, and the sum of weights.

    Args:
      last: the last position that a row may see.
      interpret: Pallas' parameters, to run without a GPU.
    """
    (_, kv_heads, rows, dim), (key, value) = q.shape, (cache["key"], cache["value"])
    count, scales = items.table.shape[0], tuple(cache.get(f"{name}_scale") for name in ("key", "value"))
    (_, ahead), copies = room(rows, dim, q.dtype, key.dtype), max(1, KEYS // key.shape[2])
    arrivals = copies * (1 if scales[0] is None else 2)
    return plgpu.kernel(
        partial(_attend, scale=scale, window=window, softcap=softcap, interpreted=interpret is not None),
        out_type=(
            jax.ShapeDtypeStruct((count, kv_heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((count, kv_heads, 2, rows), jnp.float32),
        ),
        grid=(count, kv_heads),
        grid_names=("items", "kv_heads"),
        scratch_types={
            "q_smem": tiled((rows, dim), q.dtype),
            "last_smem": plgpu.SMEM((rows,), jnp.int32),
            "slopes_smem": None if slopes is None else plgpu.SMEM((rows,), jnp.float32),
            "pages_smem": [tiled((ahead, KEYS, dim), a.dtype) for a in (key, value)],
            "scales_smem": [None if scales[0] is None else plgpu.SMEM((ahead, KEYS), jnp.float32)] * 2,
            "wide_smem": tiled((KEYS, dim), q.dtype) if key.dtype != q.dtype else None,
            "weights_smem": tiled((rows, KEYS), q.dtype),
            "out_smem": tiled((rows, 64), jnp.float32),
            "stats_smem": [plgpu.SMEM((rows,), jnp.float32)] * 2,
            "here": plgpu.Barrier(num_arrivals=2 if slopes is None else 3),
            "arrived": [plgpu.Barrier(num_arrivals=arrivals, num_barriers=ahead)] * 2,
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lmx_paged_attention",
        interpret=interpret,
    )(q, last, slopes, (key, value), scales, pages, items.table)


def _attend(
    q_gmem, last_gmem, slopes_gmem, pages_gmem, scales_gmem, pages, table, out_gmem, stats_gmem,
    *, q_smem, last_smem, slopes_smem, pages_smem, scales_smem, wide_smem, weights_smem, out_smem, stats_smem, here, arrived,
    scale, window, softcap, interpreted,
):  # fmt: skip
    item, head = lax.axis_index("items"), lax.axis_index("kv_heads")
    tile, first, end, begin, behind, clear, unclear = (table[item, i] for i in range(7))
    rows, dim, page, ahead = q_gmem.shape[2], q_gmem.shape[3], pages_gmem[0].shape[2], pages_smem[0].shape[0]
    copies, parts, size = max(1, KEYS // page), max(1, page // KEYS), min(page, KEYS)

    def slot_of(block):
        return lax.rem(block - first, jnp.int32(ahead))

    def across(line, shape=(KEYS, rows)):
        """What is known of rows, said of every key."""
        return lax.broadcast_in_dim(line, shape, [1])

    def ids(block):
        """A block's pages; where the text has ended, its last page once more."""
        at = begin + (block * copies if parts == 1 else lax.div(block, jnp.int32(parts)))
        return [pages[jnp.minimum(at + i, behind - 1)] for i in range(copies)]

    def fetch(which, block, ids):
        """Keys or values (0 or 1) of a block are sent for."""
        slot, start = slot_of(block), 0 if parts == 1 else lax.rem(block, jnp.int32(parts)) * KEYS
        for i, number in enumerate(ids):
            here, there = (number, head, pl.ds(start, size)), (slot, pl.ds(i * size, size))
            plgpu.copy_gmem_to_smem(pages_gmem[which].at[here], pages_smem[which].at[there], arrived[which].at[slot])
            if scales_gmem[which] is not None:
                copy_line(scales_gmem[which].at[here], scales_smem[which].at[there], arrived[which].at[slot])

    def widened(which, slot):
        """What the tensor cores can take of a block that has arrived."""
        if wide_smem is None:
            return pages_smem[which].at[slot]
        columns = 128 if dim % 128 == 0 else 64
        for at in range(0, dim, columns):  # a part at a time, for want of registers
            part = (slice(None), pl.ds(at, columns))
            held = plgpu.layout_cast(pages_smem[which].at[slot][part], eights(columns))
            if held.dtype == jnp.float8_e4m3fn:  # Hopper converts it to float16 alone
                held = held.astype(jnp.float16).astype(jnp.float32)
            wide_smem[part] = plgpu.layout_cast(held.astype(wide_smem.dtype), eights(columns))
        return wide_smem

    def scaled(a, which, slot):
        """By the scales of keys or values, where they have some."""
        return a if scales_smem[which] is None else a * lax.broadcast_in_dim(scales_smem[which][slot], a.shape, [0])

    @pl.when(first < end)
    def _():
        plgpu.copy_gmem_to_smem(q_gmem.at[tile, head], q_smem, here)
        copy_line(last_gmem.at[tile], last_smem, here)
        if slopes_gmem is not None:
            copy_line(slopes_gmem.at[head], slopes_smem, here)

        @pl.loop(first, jnp.minimum(first + ahead, end))
        def _(block):
            numbers = ids(block)
            fetch(0, block, numbers)
            fetch(1, block, numbers)

        plgpu.barrier_wait(here)
        last, slopes = last_smem[...], None if slopes_smem is None else slopes_smem[...]

        def step(block, carry):
            mixed, top, total, coming = carry
            slot = slot_of(block)

            def after(which):
                """What comes next is sent for; all have read what it takes the place of."""

                @pl.when(block + ahead < end)
                def _():
                    fetch(which, block + ahead, coming)

            def distance():
                keys = plgpu.broadcasted_iota(jnp.int32, (KEYS, rows), 0, layout=plgpu.Layout.WGMMA)
                return across(last - block * KEYS) - keys

            def hidden(scores):
                allowed = distance() >= 0
                if window is not None:
                    allowed &= distance() < window
                return jnp.where(allowed, scores, NONE)

            plgpu.barrier_wait(arrived[0].at[slot])
            keys = widened(0, slot)
            if wide_smem is not None:
                plgpu.commit_smem()
            scores = scaled(product(keys, q_smem, interpreted), 0, slot)
            if softcap is None:
                scores *= scale * LOG2E
            else:  # the hyperbolic tangent by an exponential: that of the hardware is too coarse
                scores = softcap * LOG2E - 2 * softcap * LOG2E / (jnp.exp2(scores * (2 * scale * LOG2E / softcap)) + 1)
            if slopes is not None:
                scores -= across(slopes * LOG2E) * distance().astype(jnp.float32)
            scores = lax.cond((block < clear) | (block >= unclear), hidden, lambda scores: scores, scores)
            higher = jnp.maximum(top, scores.max(0))
            shrink = jnp.exp2(top - higher)
            weights = jnp.exp2(scores - across(higher))
            total = total * across(shrink) + weights

            plgpu.barrier_wait(arrived[1].at[slot])
            narrow = scaled(weights, 1, slot).astype(weights_smem.dtype)
            weights_smem.T[...] = plgpu.layout_cast(narrow, plgpu.Layout.WGMMA)
            values = widened(1, slot)
            plgpu.commit_smem()
            after(0)
            mixed = add_product(mixed * across(shrink, mixed.shape), values, weights_smem, interpreted)
            plgpu.commit_smem()
            after(1)
            return mixed, higher, total, ids(block + ahead + 1)

        top = plgpu.layout_cast(jnp.full((rows,), LEAST, jnp.float32), plgpu.Layout.WGMMA.reduce(0))
        total = plgpu.layout_cast(jnp.zeros((KEYS, rows), jnp.float32), plgpu.Layout.WGMMA)
        mixed = plgpu.layout_cast(jnp.zeros((dim, rows), jnp.float32), plgpu.Layout.WGMMA)
        mixed, top, total, _ = lax.fori_loop(first, end, step, (mixed, top, total, ids(first + ahead)))

        for i, line in enumerate((top, total.sum(0))):
            stats_smem[i][...] = line
        for at in range(0, dim, 64):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.T[...] = plgpu.layout_cast(mixed[at : at + 64], plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[item, head, :, pl.ds(at, 64)])
        for i in range(2):
            plgpu.copy_smem_to_gmem(stats_smem[i], stats_gmem.at[item, head, i])
        plgpu.wait_smem_to_gmem(0)


def eights(columns: int) -> object:
    """How threads hold a block to convert it: eight neighbours each, whose conversion takes the fewest instructions."""
    rows = 8 * 128 // columns
    tiling = plgpu.Tiling(((rows, columns), (rows // 4, columns), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def copy_line(gmem, smem, arrived) -> None:
    """Of what lies in one piece. That it is within its array is said since the copy may then begin at any 16 bytes, not at 128."""
    plgpu.copy_gmem_to_smem(gmem, smem, arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def product(keys, q, interpreted: bool) -> Array:
    """Of keys with queries: `[keys, rows]`."""
    if interpreted:  # Pallas' interpreter looks for races of loads, but not of products
        lax.optimization_barrier((keys[...], q[...]))

    def multiply(accumulator):
        plgpu.wgmma(accumulator, keys, q.T)
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((keys.shape[0], q.shape[0]), jnp.float32))


def add_product(total: Array, values, weights, interpreted: bool) -> Array:
    """`total` and values times weights, `[head_dim, rows]`, in the same registers."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, values.T, weights.T)
        if interpreted:
            plgpu.wgmma_wait(0)
            return accumulator[...]

    if not interpreted:
        return pl.run_state(multiply)(plgpu.ACC.init(total))
    lax.optimization_barrier((values[...], weights[...]))
    return total + pl.run_scoped(
        multiply, plgpu.ACC(total.shape, jnp.float32)
    )  # the interpreter knows no accumulator that starts from something


def combined(out, stats, items: Items, dtype, interpret: object) -> Float[Array, "tiles kv_heads rows head_dim"]:
    """What the items of each tile found, together; zeros of rows that saw nothing."""
    _, kv_heads, rows, dim = out.shape
    tiles = items.bounds.shape[0] - 1
    return plgpu.kernel(
        _combine,
        out_type=jax.ShapeDtypeStruct((tiles, kv_heads, rows, dim), dtype),
        grid=(tiles, kv_heads, rows // SOME),
        grid_names=("tiles", "kv_heads", "rows"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lmx_paged_combine",
        interpret=interpret,
    )(out, stats, items.bounds)


def _combine(parts, stats, bounds, out):
    tile, head, some = lax.axis_index("tiles"), lax.axis_index("kv_heads"), pl.ds(lax.axis_index("rows") * SOME, SOME)
    dim, begin, end = parts.shape[-1], bounds[tile], bounds[tile + 1]
    # Each thread has two neighbouring columns of every second or fourth row, so that what is known of a row is known to all who need it.
    if dim % 128 == 0:
        tiling, warps = ((2, 128), (64,), (2,)), (-4, -3)
    else:
        tiling, warps = ((4, 64), (2,)), (-3,)
    grid = plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=warps, lane_dims=(-2,), vector_dim=-1)
    at_once = max(1, AT_ONCE * 128 // max(dim, 128))

    def along(line):
        return lax.broadcast_in_dim(line, (SOME, dim), [0])

    def step(i, carry):
        mixed, top, total = carry
        at = [begin + i * at_once + n for n in range(at_once)]
        real = [jnp.where(a < end, 1.0, 0.0) for a in at]
        at = [jnp.minimum(a, end - 1) for a in at]
        tops, totals = ([plgpu.load(stats.at[a, head, n, some], layout=grid.reduce(1), optimized=False) for a in at] for n in range(2))
        found = [plgpu.load(parts.at[a, head, some], layout=grid, optimized=False) for a in at]
        higher = top
        for new in tops:
            higher = jnp.maximum(higher, new)
        shrink = jnp.exp2(top - higher)
        mixed, total = mixed * along(shrink), total * shrink
        for new, weight, part, yes in zip(tops, totals, found, real, strict=True):
            factor = jnp.exp2(new - higher) * yes
            mixed, total = mixed + part * along(factor), total + weight * factor
        return mixed, higher, total

    top, total = (plgpu.layout_cast(jnp.full((SOME,), a, jnp.float32), grid.reduce(1)) for a in (LEAST, 0))
    mixed = plgpu.layout_cast(jnp.zeros((SOME, dim), jnp.float32), grid)
    mixed, _, total = lax.fori_loop(0, lax.div(end - begin + at_once - 1, jnp.int32(at_once)), step, (mixed, top, total))
    mixed *= along(1 / jnp.maximum(total, TINY))
    out[tile, head, some] = mixed.astype(out.dtype)
