"""The forward pass of flash attention for Hopper (Dao, 2023; Shah et al., 2024), in Pallas' Mosaic GPU dialect.

A program holds a tile of queries for each of two computing warpgroups, while a third brings keys and values, block by block. The two take
turns with the tensor cores: one multiplies while the other is at its softmax.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from lmx.kernels import flash_sight as sights
from lmx.kernels.flash_blocks import Blocks
from lmx.kernels.masks import Mask

NONE = -1e30
"""The log-sum-exp of a query that sees no key, and the largest score before the first."""
WORKERS = 2
"""Warpgroups that compute."""
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
    tile = WORKERS * blocks.queries
    tiles, steps = pl.cdiv(queries, tile), pl.cdiv(keys, blocks.keys)
    of_q, of_k = sights.about(mask, q, k, tiles * tile, steps * blocks.keys, slopes)
    sight = sights.sight(mask, keys, steps * blocks.keys)
    table = None
    if sights.told(of_q, of_k):
        table = sights.runs(*sights.blocks_seen(sight, of_q, of_k, (tiles, tile), (steps, blocks.keys)))
    q = sights.padded(q, tiles * tile)
    k, v = (sights.padded(a, steps * blocks.keys) for a in (k, v))
    kernel = partial(_kernel, sight=sight, scale=scale, softcap=softcap, blocks=blocks, steps=steps, group=heads // kv_heads)
    stages = blocks.stages
    out, lse = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tiles * tile), jnp.float32)),
        grid=(batch, heads, tiles),
        grid_names=("batch", "heads", "tiles"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "held": sights.tiled((WORKERS, blocks.queries, head_dim), q.dtype),
            "k_smem": sights.tiled((stages, blocks.keys, head_dim), k.dtype),
            "v_smem": sights.tiled((stages, blocks.keys, head_dim), v.dtype),
            "lse_smem": plgpu.SMEM((WORKERS, blocks.queries), jnp.float32),
            "q_here": plgpu.Barrier(num_barriers=WORKERS),
            "k_here": plgpu.Barrier(num_barriers=stages),
            "v_here": plgpu.Barrier(num_barriers=stages),
            "k_used": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "v_used": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=WORKERS),
            **sights.staging((WORKERS, blocks.queries, blocks.keys), v.dtype, interpret),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lmx_flash_forward",
        interpret=interpret,
    )(q, k, v, of_q, of_k, slopes, table)
    return out[:, :queries], lse[:, :, :queries]


def _kernel(
    q_gmem, k_gmem, v_gmem, of_q, of_k, slopes, table, out_gmem, lse_gmem,
    *, held, k_smem, v_smem, lse_smem, q_here, k_here, v_here, k_used, v_used, turn,
    sight, scale, softcap, blocks, steps, group, staging=None,
):  # fmt: skip
    batch, head, me = (lax.axis_index(name) for name in ("batch", "heads", "warpgroup"))
    # Under a causal mask the last tiles have the most to do, and so they come first.
    tile = lax.axis_size("tiles") - 1 - lax.axis_index("tiles") if sight.causal else lax.axis_index("tiles")
    rows, width, stages = blocks.queries, blocks.keys, blocks.stages
    if table is None:
        run = sights.keys_run(sight, tile * (WORKERS * rows), WORKERS * rows, width, steps)
    else:
        run = sights.read_run(table, batch, tile)
    slot_of = lambda step: lax.rem(step - run.first, jnp.int32(stages))

    @pl.when(me < WORKERS)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        start = tile * (WORKERS * rows) + me * rows
        q_smem = held.at[me]
        here = (batch, pl.ds(start, rows), head)
        plgpu.copy_gmem_to_smem(q_gmem.at[here], q_smem, q_here.at[me])
        staged = None if staging is None else staging.at[me]
        slope = None if slopes is None else slopes[head]
        sides = [{name: ref.at[batch] for name, ref in side.items()} for side in (of_q, of_k)]
        plgpu.barrier_wait(q_here.at[me])

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def await_keys(step):
            @pl.when(step < run.last)
            def _():
                plgpu.barrier_wait(k_here.at[slot_of(step)])

        def step(at, carry):
            mixed, top, total = carry
            slot = slot_of(at)

            def product(scores):
                plgpu.wgmma(scores, q_smem, k_smem.at[slot].T)
                take_turns()
                return scores[...]

            scores = pl.run_scoped(product, plgpu.ACC((rows, width), jnp.float32))
            plgpu.barrier_arrive(k_used.at[slot])
            block = sights.Block(sight, *sides, (rows, width), 0, start, at * width)
            scores, factor = sights.logits(block, scores, scale, softcap, slope)
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
            mixed = add_product(mixed, narrow, v_smem.at[slot], staged, lambda: await_keys(at + 1))
            plgpu.barrier_arrive(v_used.at[slot])
            return mixed, higher, total

        await_keys(run.first)
        pl.when(me == 1)(take_turns)
        top = plgpu.layout_cast(jnp.full((rows,), NONE, jnp.float32), ROWS)
        total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROWS)
        mixed = plgpu.layout_cast(jnp.zeros((rows, held.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        mixed, top, total = lax.fori_loop(run.first, run.last, step, (mixed, top, total))
        pl.when(me == 0)(take_turns)

        total = jnp.maximum(total, TINY)  # a query that sees nothing: zeros over this, and a log-sum-exp of about NONE
        mixed *= lax.broadcast_in_dim(1 / total, mixed.shape, [0])
        q_smem[...] = mixed.astype(q_smem.dtype)
        lse_smem[me] = jnp.where(top > NONE, top * math.log(2) + jnp.log(total), NONE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[here], commit_group=False)
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_gmem.at[batch, head, pl.ds(start, rows)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == WORKERS)
    def bring():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        @pl.loop(run.first, run.last)
        def _(at):
            slot, block = slot_of(at), (batch, pl.ds(at * width, width), kv_head)
            for gmem, smem, arrived, used in ((k_gmem, k_smem, k_here, k_used), (v_gmem, v_smem, v_here, v_used)):

                @pl.when(at - run.first >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                plgpu.copy_gmem_to_smem(gmem.at[block], smem.at[slot], arrived.at[slot])

        # No barrier may end with a completion that nobody has waited for.
        @pl.loop(lax.max(run.first, run.last - stages), run.last)
        def _(at):
            for used in (k_used, v_used):
                plgpu.barrier_wait(used.at[slot_of(at)])


def add_product(total: Array, a: Array, b, staging, meanwhile=lambda: None) -> Array:
    """`total + a @ b` of registers with shared memory; `meanwhile` runs while the tensor cores do.

    Pallas' interpreter knows no accumulator that starts from something, so for it, which `staging` is for, the sum is another step.
    """

    def product(accumulator):
        sights.multiply(accumulator, a, b, staging)
        meanwhile()
        return None if staging is None else accumulator[...]

    if staging is None:
        return pl.run_state(product)(plgpu.ACC.init(total))
    return total + pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))
