"""The forward pass of flash attention for Hopper (Dao, 2023; Shah et al., 2024), in Pallas' Mosaic GPU dialect.

A program holds a tile of queries for each of two warpgroups and walks over blocks of keys and values. The two take turns with the tensor
cores: one multiplies while the other is at its softmax.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from lmx.kernels import flash_pipeline as pipeline
from lmx.kernels import flash_sight as sights
from lmx.kernels.flash_blocks import Blocks
from lmx.kernels.flash_pipeline import WORKERS
from lmx.kernels.masks import Mask

NONE = -1e30
"""The log-sum-exp of a query that sees no key, and the largest score before the first."""
TINY = 1.1754944e-38
ROWS = plgpu.Layout.WGMMA.reduce(1)


def forward(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    slopes: Float[Array, "heads"] | None,
    *,
    scale: float,
    softcap: float | None,
    blocks: Blocks,
    interpret: object = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """The output, and each query's log-sum-exp (`NONE` of one that sees nothing). `interpret`: Pallas' parameters, to run without a GPU."""
    (batch, queries, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    rows, width, stages, tile = blocks.queries, blocks.keys, blocks.stages, WORKERS * blocks.queries
    tiles, steps = pl.cdiv(queries, tile), pl.cdiv(keys, width)
    sight, said = sights.walked(mask, q, k, (tiles, tile), (steps, width), slopes)
    q = pipeline.padded(q, tiles * tile)
    k, v = (pipeline.padded(a, steps * width) for a in (k, v))
    out, lse = pipeline.kernel(
        partial(_kernel, sight=sight, scale=scale, softcap=softcap, blocks=blocks, tiles=tiles, steps=steps, group=heads // kv_heads),
        "lmx_flash_forward",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tiles * tile), jnp.float32)),
        {
            "held": pipeline.tiled((WORKERS, rows, head_dim), q.dtype),
            "lse_smem": plgpu.SMEM((WORKERS, rows), jnp.float32),
            "q_here": plgpu.Barrier(num_barriers=WORKERS),
            "of_keys": pipeline.room(stages, width, head_dim, k.dtype),
            "of_values": pipeline.room(stages, width, head_dim, v.dtype),
            "turn": plgpu.Barrier(num_arrivals=WORKERS),
            **pipeline.staging((rows, width), v.dtype, interpret),
        },
        grid=(batch, heads, tiles),
        carrier=blocks.carrier,
        interpret=interpret,
    )(q, k, v, slopes, *said)
    return out[:, :queries], lse[:, :, :queries]


def _kernel(
    q_gmem, k_gmem, v_gmem, slopes, of_q, of_k, table, out_gmem, lse_gmem,
    *, held, lse_smem, q_here, of_keys, of_values, turn, staging=None,
    sight, scale, softcap, blocks, tiles, steps, group,
):  # fmt: skip
    batch, head, me = (lax.axis_index(name) for name in ("batch", "heads", "warpgroup"))
    rows, width = blocks.queries, blocks.keys
    tile, run, belt = pipeline.over_keys(sight, table, blocks, tiles, steps, group, (k_gmem, of_keys), (v_gmem, of_values))
    (k_smem, k_here, k_used), (v_smem, v_here, v_used) = of_keys, of_values

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def await_keys(step):
        @pl.when(step < belt.total)
        def _():
            plgpu.barrier_wait(k_here.at[belt.slot(step)])

    def work(done):
        start = tile * (WORKERS * rows) + me * rows
        q_smem, staged = held.at[me], None if staging is None else staging.at[me]
        here = (batch, pl.ds(start, rows), head)
        plgpu.copy_gmem_to_smem(q_gmem.at[here], q_smem, q_here.at[me])
        slope = None if slopes is None else slopes[head]
        sides = [{name: ref.at[batch] for name, ref in side.items()} for side in (of_q, of_k)]
        plgpu.barrier_wait(q_here.at[me])

        def step(n, carry):
            mixed, top, total = carry
            at, slot = run.first + n, belt.slot(n)

            def product(scores):
                plgpu.wgmma(scores, q_smem, k_smem.at[slot].T)
                take_turns()
                return scores[...]

            scores = pl.run_scoped(product, plgpu.ACC((rows, width), jnp.float32))
            plgpu.barrier_arrive(k_used.at[slot])
            block = sights.Block(sight, *sides, (rows, width), 0, start, at * width)
            biases = [] if slope is None else [block.along(block.alibi(mine, slope), 1 - mine) for mine in (False, True)]
            scores, factor = sights.logits(scores, scale, softcap, biases)
            scores = lax.cond(run.masked(at), block.hide, lambda scores: scores, scores)
            # The factor stays apart from the scores, so that it and the subtraction are one instruction.
            higher = jnp.maximum(top, scores.max(1) * factor)
            shrink = jnp.exp2(top - higher)
            weights = jnp.exp2(scores * factor - block.along(higher, 0))
            mixed *= lax.broadcast_in_dim(shrink, mixed.shape, [0])
            total = total * shrink + weights.sum(1)
            narrow = weights.astype(v_smem.dtype)
            mixed, higher, total, narrow = lax.optimization_barrier((mixed, higher, total, narrow))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)
            mixed = pipeline.add_product(mixed, narrow, v_smem.at[slot], staged, lambda: await_keys(n + 1))
            plgpu.barrier_arrive(v_used.at[slot])
            done(n)
            return mixed, higher, total

        await_keys(jnp.int32(0))
        pl.when(me == 1)(take_turns)
        top = plgpu.layout_cast(jnp.full((rows,), NONE, jnp.float32), ROWS)
        total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROWS)
        mixed = plgpu.layout_cast(jnp.zeros((rows, held.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        mixed, top, total = lax.fori_loop(0, belt.total, step, (mixed, top, total))
        pl.when(me == 0)(take_turns)

        total = jnp.maximum(total, TINY)  # zeros over this, of a query that sees nothing
        mixed *= lax.broadcast_in_dim(1 / total, mixed.shape, [0])
        q_smem[...] = mixed.astype(q_smem.dtype)
        lse_smem[me] = jnp.where(top > NONE, top * math.log(2) + jnp.log(total), NONE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[here], commit_group=False)
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_gmem.at[batch, head, pl.ds(start, rows)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(belt, me, blocks.carrier, work)
