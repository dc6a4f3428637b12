"""The backward pass of flash attention for Hopper, in Pallas' Mosaic GPU dialect: one kernel for the gradient of queries, one for those of keys
and values. Each forms the scores anew from the log-sum-exp that the forward pass kept, and sums in an order of its own: nothing is random.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmx.kernels import flash_pipeline as pipeline
from lmx.kernels import flash_sight as sights
from lmx.kernels.flash_blocks import Blocks
from lmx.kernels.flash_pipeline import WORKERS
from lmx.kernels.flash_sight import LOG2E
from lmx.kernels.masks import Mask

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def queries_gradient(q, k, v, mask: Mask, slopes, lse, delta, g, *, scale, softcap, blocks: Blocks, interpret=None) -> Array:
    """The gradient of the queries, of what `flash.gradients` takes; but `lse` and `delta` are `[batch, heads, queries]`."""
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    rows, width, stages, tile = blocks.queries, blocks.keys, blocks.stages, WORKERS * blocks.queries
    tiles, steps = pl.cdiv(queries, tile), pl.cdiv(keys, width)
    sight, said = sights.walked(mask, q, k, (tiles, tile), (steps, width), slopes)
    q, g = (pipeline.padded(a, tiles * tile) for a in (q, g))
    k, v = (pipeline.padded(a, steps * width) for a in (k, v))
    lse, delta = _lines(lse, delta, tiles * tile)
    group = heads // k.shape[2]
    dq = pipeline.kernel(
        partial(_queries_kernel, sight=sight, scale=scale, softcap=softcap, blocks=blocks, tiles=tiles, steps=steps, group=group),
        "lmx_flash_queries_gradient",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        {
            "q_held": pipeline.tiled((WORKERS, rows, head_dim), q.dtype),
            "g_held": pipeline.tiled((WORKERS, rows, head_dim), g.dtype),
            "held_here": plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
            "of_keys": pipeline.room(stages, width, head_dim, k.dtype),
            "of_values": pipeline.room(stages, width, head_dim, v.dtype),
            **pipeline.staging((rows, width), k.dtype, interpret),
        },
        grid=(batch, heads, tiles),
        carrier=blocks.carrier,
        interpret=interpret,
    )(q, k, v, g, lse, delta, slopes, *said)
    return dq[:, :queries]


def _queries_kernel(
    q_gmem, k_gmem, v_gmem, g_gmem, lse_gmem, delta_gmem, slopes, of_q, of_k, table, dq_gmem,
    *, q_held, g_held, held_here, of_keys, of_values, staging=None,
    sight, scale, softcap, blocks, tiles, steps, group,
):  # fmt: skip
    batch, head, me = (lax.axis_index(name) for name in ("batch", "heads", "warpgroup"))
    rows, width = blocks.queries, blocks.keys
    tile, run, belt = pipeline.over_keys(sight, table, blocks, tiles, steps, group, (k_gmem, of_keys), (v_gmem, of_values))
    (k_smem, k_here, k_used), (v_smem, v_here, v_used) = of_keys, of_values

    def work(done):
        start = tile * (WORKERS * rows) + me * rows
        q_smem, g_smem, staged = q_held.at[me], g_held.at[me], None if staging is None else staging.at[me]
        here = (batch, pl.ds(start, rows), head)
        plgpu.copy_gmem_to_smem(q_gmem.at[here], q_smem, held_here.at[me])
        plgpu.copy_gmem_to_smem(g_gmem.at[here], g_smem, held_here.at[me])
        line = (batch, head, pl.ds(start, rows))
        lse, delta = (plgpu.load(a.at[line], layout=ROWS, optimized=False) for a in (lse_gmem, delta_gmem))
        slope = None if slopes is None else slopes[head]
        sides = [{name: ref.at[batch] for name, ref in side.items()} for side in (of_q, of_k)]
        plgpu.barrier_wait(held_here.at[me])

        def sum_up(total):
            @pl.loop(0, belt.total)
            def _(n):
                at, slot = run.first + n, belt.slot(n)
                block = sights.Block(sight, *sides, (rows, width), 0, start, at * width)

                def products(scores, d_weights):
                    plgpu.barrier_wait(k_here.at[slot])
                    plgpu.wgmma(scores, q_smem, k_smem.at[slot].T)
                    plgpu.barrier_wait(v_here.at[slot])
                    plgpu.wgmma(d_weights, g_smem, v_smem.at[slot].T)
                    found = plgpu.wgmma_accumulator_load(scores, wait_n=1)  # the second product goes on under the exponentials
                    biases = [] if slope is None else [block.along(block.alibi(mine, slope), 1 - mine) for mine in (False, True)]
                    _, steep = _weights(block, found, run.masked(at), scale, softcap, biases, lambda: block.along(lse, 0))
                    return steep * (d_weights[...] - block.along(delta, 0))

                accumulator = plgpu.ACC((rows, width), jnp.float32)
                d_scores = pl.run_scoped(products, accumulator, accumulator)
                plgpu.barrier_arrive(v_used.at[slot])
                pipeline.multiply(total, d_scores.astype(k_smem.dtype), k_smem.at[slot], staged)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_used.at[slot])
                done(n)

            return total[...]

        dq = pl.run_scoped(sum_up, plgpu.ACC((rows, q_held.shape[-1]), jnp.float32))
        q_smem[...] = (dq * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_gmem.at[here])
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(belt, me, blocks.carrier, work)


def keys_gradient(q, k, v, mask: Mask, slopes, lse, delta, g, *, scale, softcap, blocks: Blocks, interpret=None) -> tuple[Array, Array]:
    """The gradients of keys and values, summed over the query heads that share them, of the same."""
    (batch, queries, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    rows, width, stages, tile = blocks.keys, blocks.queries, blocks.stages, WORKERS * blocks.keys
    tiles, steps = pl.cdiv(keys, tile), pl.cdiv(queries, width)
    # Places and runs are read, where other kernels compute them: what is computed stays in registers all along, and here there are none to spare.
    of_q, of_k = sights.about(mask, q, k, steps * width, tiles * tile, slopes, spelled=True)
    sight = sights.sight(mask, keys, tiles * tile)
    some, clear = sights.blocks_seen(sight, of_q, of_k, (steps, width), (tiles, tile))
    table = sights.runs(some.swapaxes(1, 2), clear.swapaxes(1, 2))
    q, g = (pipeline.padded(a, steps * width) for a in (q, g))
    k, v = (pipeline.padded(a, tiles * tile) for a in (k, v))
    lse, delta = _lines(lse, delta, steps * width)
    dk, dv = pipeline.kernel(
        partial(_keys_kernel, sight=sight, scale=scale, softcap=softcap, blocks=blocks, group=heads // kv_heads),
        "lmx_flash_keys_gradient",
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        {
            "k_held": pipeline.tiled((WORKERS, rows, head_dim), k.dtype),
            "v_held": pipeline.tiled((WORKERS, rows, head_dim), v.dtype),
            "q_smem": pipeline.tiled((stages, width, head_dim), q.dtype),
            "g_smem": pipeline.tiled((stages, width, head_dim), g.dtype),
            "lse_smem": plgpu.SMEM((stages, width), jnp.float32),
            "delta_smem": plgpu.SMEM((stages, width), jnp.float32),
            "held_here": plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
            "q_here": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "g_here": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "q_used": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "g_used": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            **pipeline.staging((rows, width), q.dtype, interpret),
        },
        grid=(batch, kv_heads, tiles),
        carrier=blocks.carrier,
        interpret=interpret,
    )(q, k, v, g, lse, delta, slopes, of_q, of_k, table)
    return dk[:, :keys], dv[:, :keys]


def _keys_kernel(
    q_gmem, k_gmem, v_gmem, g_gmem, lse_gmem, delta_gmem, slopes, of_q, of_k, table, dk_gmem, dv_gmem,
    *, k_held, v_held, q_smem, g_smem, lse_smem, delta_smem, held_here, q_here, g_here, q_used, g_used, staging=None,
    sight, scale, softcap, blocks, group,
):  # fmt: skip
    batch, kv_head, tile, me = (lax.axis_index(name) for name in ("batch", "heads", "tiles", "warpgroup"))
    rows, width = blocks.keys, blocks.queries
    run = sights.read_run(table, batch, tile)

    # All heads that share these keys, then the next block: dividing by what is known takes no registers.
    def head_and_block(step):
        return kv_head * group + lax.rem(step, jnp.int32(group)), run.first + lax.div(step, jnp.int32(group))

    def rows_of(gmem):
        def source(step):
            head, block = head_and_block(step)
            return gmem.at[batch, pl.ds(block * width, width), head]

        return source

    def line_of(gmem):
        def source(step):
            head, block = head_and_block(step)
            return gmem.at[batch, head, pl.ds(block * width, width)]

        return source

    of_scores = pipeline.Lane((rows_of(q_gmem), line_of(lse_gmem)), (q_smem, lse_smem), q_here, q_used)
    of_weights = pipeline.Lane((rows_of(g_gmem), line_of(delta_gmem)), (g_smem, delta_smem), g_here, g_used)
    belt = pipeline.Belt((of_scores, of_weights), (run.last - run.first) * group, blocks.stages)

    def work(done):
        start = tile * (WORKERS * rows) + me * rows
        k_smem, v_smem, staged = k_held.at[me], v_held.at[me], None if staging is None else staging.at[me]
        here = (batch, pl.ds(start, rows), kv_head)
        plgpu.copy_gmem_to_smem(k_gmem.at[here], k_smem, held_here.at[me])
        plgpu.copy_gmem_to_smem(v_gmem.at[here], v_smem, held_here.at[me])
        sides = [{name: ref.at[batch] for name, ref in side.items()} for side in (of_q, of_k)]
        plgpu.barrier_wait(held_here.at[me])

        def sum_up(dk, dv):
            @pl.loop(0, belt.total)
            def _(n):
                (head, at), slot = head_and_block(n), belt.slot(n)
                block = sights.Block(sight, *sides, (rows, width), 1, at * width, start)
                slope = None if slopes is None else slopes[head]

                def first(scores):
                    plgpu.barrier_wait(q_here.at[slot])
                    plgpu.wgmma(scores, k_smem, q_smem.at[slot].T)

                    def lse():
                        line = plgpu.load(lse_smem.at[slot], layout=COLUMNS)
                        return block.along(line if slope is None else line - block.alibi(True, slope), 1)

                    biases = [] if slope is None else [block.along(block.alibi(False, slope), 0)]
                    found = _weights(block, scores[...], run.masked(at), scale, softcap, biases, lse)
                    return tuple(a.astype(g_smem.dtype) for a in found)  # in fp32 they would not find room beside all that follows

                accumulator = plgpu.ACC((rows, width), jnp.float32)
                weights, steep = pl.run_scoped(first, accumulator)

                def second(d_weights):
                    plgpu.barrier_wait(g_here.at[slot])
                    plgpu.wgmma(d_weights, v_smem, g_smem.at[slot].T)
                    pipeline.multiply(dv, weights, g_smem.at[slot], staged)
                    d_weights = plgpu.wgmma_accumulator_load(d_weights, wait_n=1)  # what follows goes on under the product with g
                    delta = plgpu.load(delta_smem.at[slot], layout=COLUMNS)
                    return steep.astype(jnp.float32) * (d_weights - block.along(delta, 1))

                d_scores = pl.run_scoped(second, accumulator)
                pipeline.multiply(dk, d_scores.astype(q_smem.dtype), q_smem.at[slot], staged)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(g_used.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_used.at[slot])
                done(n)

            return dk[...], dv[...]

        accumulator = plgpu.ACC((rows, k_held.shape[-1]), jnp.float32)
        dk, dv = pl.run_scoped(sum_up, accumulator, accumulator)
        k_smem[...] = (dk * scale).astype(k_smem.dtype)
        v_smem[...] = dv.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem, dk_gmem.at[here], commit_group=False)
        plgpu.copy_smem_to_gmem(v_smem, dv_gmem.at[here], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(belt, me, blocks.carrier, work)


def _lines(lse: Array, delta: Array, length: int) -> tuple[Array, Array]:
    """Both to a length; the log-sum-exp to base 2, and such that queries which are not there weigh nothing."""
    return pipeline.padded(lse * LOG2E, length, 2, 1e30), pipeline.padded(delta, length, 2)


def _weights(block, scores, masked, scale, softcap, biases, lse) -> tuple[Array, Array]:
    """Attention weights, and those times the derivative of the soft cap. `lse` loads: until it is needed there is no register for it."""
    found, factor = sights.logits(scores, scale, softcap, biases)
    hidden = lax.cond(masked, block.hide, lambda found: found, found)
    weights = jnp.exp2(hidden * factor - lse())
    return weights, weights if softcap is None else weights * (1 - jnp.square(jnp.tanh(scores * (scale / softcap))))
