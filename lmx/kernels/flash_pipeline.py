"""What the flash kernels have in common: bringing blocks to shared memory ahead of their use, and products with accumulators.

Blocks are brought by a warpgroup of its own, the carrier, or by the last of those that compute. The first disturbs nobody. The second leaves
half as many registers again to each thread: PTX's `setmaxnreg`, which would give the carrier's to the others, is ignored where nvJitLink
assembles, and that is where JAX's wheels have it do so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmx.kernels import flash_sight as sights
from lmx.kernels.flash_blocks import Blocks

WORKERS = 2
"""Warpgroups that compute."""


@dataclass(frozen=True)
class Lane:
    """Arrays whose blocks come and go together.

    Attributes:
      sources: for each array, a function of the step that gives what to bring.
      slots: where to; the first dimension is the stage.
      here, used: barriers, one a stage: all have come, and every worker is done with them.
    """

    sources: tuple[Callable[[Array], object], ...]
    slots: tuple
    here: object
    used: object


@dataclass(frozen=True)
class Belt:
    """Lanes that `total` steps use one after the other, `stages` of them there at a time."""

    lanes: tuple[Lane, ...]
    total: Array
    stages: int

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.stages))

    def fetch(self, lane: Lane, step: Array) -> None:
        slot = self.slot(step)
        for source, room in zip(lane.sources, lane.slots, strict=True):
            plgpu.copy_gmem_to_smem(source(step), room.at[slot], lane.here.at[slot])

    def start(self) -> None:
        """Brings what the first steps use."""

        @pl.loop(0, lax.min(self.total, jnp.int32(self.stages)))
        def _(step):
            for lane in self.lanes:
                self.fetch(lane, step)

    def renew(self, step: Array) -> None:
        """Waits until a step is done with its blocks, and brings others in their place. Every step wants it: a barrier may not end with a
        completion that nobody has waited for."""
        for lane in self.lanes:
            plgpu.barrier_wait(lane.used.at[self.slot(step)])

            @pl.when(step + self.stages < self.total)
            def _(lane=lane):
                self.fetch(lane, step + self.stages)

    def carry(self) -> None:
        """All of it, for a warpgroup that does nothing else."""
        self.start()
        pl.loop(0, self.total)(self.renew)


def over_keys(sight, table, blocks: Blocks, tiles: int, steps: int, group: int, *keys_and_values: tuple) -> tuple[Array, sights.Run, Belt]:
    """In a kernel whose programs are of `(batch, heads, tiles)` of queries: which tile its is, the blocks of keys that it walks over, and what
    brings these; of keys and of values, where they are and what `room` gives."""
    batch, head = lax.axis_index("batch"), lax.axis_index("heads")
    # Under a causal mask the last tiles have the most to do, and so they come first.
    tile = tiles - 1 - lax.axis_index("tiles") if sight.causal else lax.axis_index("tiles")
    size, width = WORKERS * blocks.queries, blocks.keys
    run = sights.keys_run(sight, tile * size, size, width, steps) if table is None else sights.read_run(table, batch, tile)
    kv_head = lax.div(head, jnp.int32(group))

    def source(gmem):
        return lambda step: gmem.at[batch, pl.ds((run.first + step) * width, width), kv_head]

    lanes = tuple(Lane((source(gmem),), (slots,), here, used) for gmem, (slots, here, used) in keys_and_values)
    return tile, run, Belt(lanes, run.last - run.first, blocks.stages)


def room(stages: int, width: int, head_dim: int, dtype) -> tuple:
    """Of a lane of one array: slots for its blocks, and the barriers `here` and `used`."""
    barriers = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages)
    return tiled((stages, width, head_dim), dtype), *barriers


def run(belt: Belt, me: Array, carrier: bool, work: Callable[[Callable[[Array], None]], None]) -> None:
    """Runs a kernel: `work` in each worker, which is to call the function it is given at the end of every step."""
    if not carrier:
        last = me == WORKERS - 1
        pl.when(last)(belt.start)
        work(lambda step: pl.when(last)(lambda: belt.renew(step)))
        return

    @pl.when(me < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        work(lambda step: None)

    @pl.when(me == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        belt.carry()


def kernel(body: Callable, name: str, out_type, scratch: dict, *, grid: tuple[int, int, int], carrier: bool, interpret: object) -> Callable:
    """The function of arrays that a kernel is, of programs of `(batch, heads, tiles)`."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("batch", "heads", "tiles"),
        num_threads=WORKERS + carrier,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )


def tiled(shape: tuple[int, ...], dtype):
    """Shared memory in the form that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def staging(shape: tuple[int, ...], dtype, interpret: object) -> dict:
    """Where `multiply` puts what Pallas' interpreter, whose wgmma takes nothing from registers, is to multiply; nothing on a GPU."""
    return {} if interpret is None else {"staging": plgpu.SMEM((WORKERS, *shape), dtype)}


def multiply(accumulator, a: Array, b, staged) -> None:
    """Adds the product of registers with shared memory to an accumulator; to be waited for."""
    if staged is not None:
        staged[...] = a
        plgpu.commit_smem()
        a = staged
    plgpu.wgmma(accumulator, a, b)


def add_product(total: Array, a: Array, b, staged, meanwhile: Callable[[], None]) -> Array:
    """`total + a @ b` of registers with shared memory; `meanwhile` runs while the tensor cores do.

    Pallas' interpreter knows no accumulator that starts from something, so there the sum is another step.
    """

    def product(accumulator):
        multiply(accumulator, a, b, staged)
        meanwhile()
        return None if staged is None else accumulator[...]

    if staged is None:
        return pl.run_state(product)(plgpu.ACC.init(total))
    return total + pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))


def padded(a: Array, length: int, axis: int = 1, value: float = 0.0) -> Array:
    """An array with its axis filled up to a length."""
    missing = length - a.shape[axis]
    if not missing:
        return a
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], constant_values=value)
