"""What XLA is told so that devices talk while they compute: one table, set on a run's step and nowhere else.

Options differ between versions of XLA, and one that is not known refuses to compile. So each is asked for by compiling nothing with it,
and where only its older name is known, that is used.
"""

from functools import lru_cache

import jax
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from lmx.parallel import absent
from lmx.parallel.layout import Layout

Value = bool | int | str

PIPELINED = "COLLECTIVE_PIPELINING_MODE_ON"

SCHEDULED: dict[str, Value] = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""Puts products between a collective's start and its end. XLA 0.12 does so by default; older ones did not."""

GRADIENTS: tuple[dict[str, Value], ...] = (
    {"xla_gpu_pipeline_reduce_scatter": PIPELINED, "xla_gpu_enable_pipelined_reduce_scatter": True},
    {"xla_gpu_pipeline_all_reduce": PIPELINED, "xla_gpu_enable_pipelined_all_reduce": True},
)
"""A backward scan sums one layer's gradients while it recomputes the layer before, not at the end of the trip. A sum is an all-reduce when
XLA looks at loops and a reduce-scatter only later, so both are needed. Each option under its names, newest first.
"""

PARAMETERS: dict[str, Value] = {"xla_gpu_pipeline_all_gather": PIPELINED, "xla_gpu_enable_pipelined_all_gather": True}
"""A scan gathers the next layer's parameters in this one's trip, which takes a layer more of memory.

Bytes that move while products run, in a step of 8 layers of width 2048 compiled for eight H100s (ZeRO-3, remat full, 8 rows of 2,048 tokens
each, jax 0.12.0.1), and temporaries of a device:

| | all-gathers | reduce-scatters | temporaries |
| --- | --- | --- | --- |
| no scheduler | 0% | 0% | 3.15 GB |
| scheduler | 64% | 24% | 3.15 GB |
| and gradients in the next trip | 60% | 2% | 3.49 GB |
| and the next layer's parameters in this trip (what is set) | 70% | 85% | 3.83 GB |
| the last without gradients in the next trip | 33% | 29% | 3.55 GB |

With jax 0.11.2 what is set hides 74% and 68%, in 3.90 GB.

A trip has one collective on its way at a time, and begins with the last one's sums: these are behind products only where what the first
products read is there. Where a layer's gathers are small enough to be one, all of it is before the first product, unless it was gathered
ahead (16 layers of width 512: 0% and 87 to 94%). On tensor devices XLA would then move a fifth more, all-reduces in place of reduce-scatters,
and a pipeline's ticks are short: there it is not asked for, and a 70B decoder on 1,024 hides 41% of its gathers over fsdp and 97% of its sums.
Several collectives at a time hide all sums on paper, where no two share a wire. Double-buffered loops and larger combined collectives hide
less or the same. Without remat a trip begins with gathers, behind which nothing of the last one's sums is hidden (30% of them where only
scheduled, 0% pipelined), so neither is asked for.
"""


def options(mesh: Mesh | AbstractMesh, layout: Layout) -> dict[str, Value] | None:
    """Compiler options of a step on a layout's mesh, an abstract one being of absent GPUs; None where there is nothing to say: on CPUs, and on
    one device."""
    if mesh.size == 1:
        return None
    if isinstance(mesh, Mesh):
        device = next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), mesh.devices.flat[0])
    elif absent.prepared():
        (device,) = absent.devices(1)
    else:
        return None
    if device.platform == "cpu":
        return None
    wanted = [SCHEDULED]
    if layout.formed_again:
        wanted += GRADIENTS
    if layout.ahead:
        wanted.append(PARAMETERS)
    chosen = (next(((name, value) for name, value in names.items() if known(device, name, value)), None) for names in wanted)
    return dict(filter(None, chosen))


@lru_cache
def known(device: jax.Device, name: str, value: Value) -> bool:
    """Whether the compiler of a device has an option."""
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).lower(nothing).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error) and "not a valid" not in str(error):
            raise
        return False
    return True
