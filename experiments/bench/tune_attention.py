"""Measures the flash kernels' block sizes on the Hopper GPU at hand and writes the table that they are taken from.

    python -m experiments.bench.tune_attention [--head-dims 64 128 ...] [--length 4096] [--dry]

Every cut that compiles is timed (CUPTI, medians) for each kernel, head dimension and kind of mask, after its result has been held against that of
the table as it stands; what does not compile, wants more shared memory than there is, or computes something else is passed over. Without a
Hopper GPU the script ends with that. `lmx/kernels/flash_blocks.json` is written unless `--dry`; `pytest -m aot tests/kernels/test_flash.py` then says
whether what won keeps within registers.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial

import jax
import jax.numpy as jnp

from lmx.kernels import chunked, devices, flash, flash_blocks
from lmx.kernels.flash_backward import keys_gradient, queries_gradient
from lmx.kernels.flash_blocks import Blocks
from lmx.kernels.flash_forward import forward
from lmx.kernels.masks import Mask

TOKENS, WIDTH = 16384, 2048
TOLERANCE = 0.02
"""Between results of two cuts, relative to the largest: sums in another order, of products of bf16."""


def cuts(kernel: str) -> Iterator[Blocks]:
    """What is tried: what a tile holds is 64 or 128 a worker, of which only forward has registers for the second."""
    held = (64, 128) if kernel == "forward" else (64,)
    for mine, walked, stages, carrier in itertools.product(held, (64, 128, 256), (2, 3, 4), (True, False)):
        yield Blocks(walked, mine, stages, carrier) if kernel == "keys" else Blocks(mine, walked, stages, carrier)


def calls(head_dim: int, kind: str, length: int) -> dict:
    """Each kernel as a function of its blocks alone, on random arrays."""
    rows, heads = max(1, TOKENS // length), WIDTH // head_dim
    q, k, v, g = (jax.random.normal(key, (rows, length, heads, head_dim), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    mask = Mask()
    if kind == "reading":
        segments = jnp.tile(jnp.arange(length, dtype=jnp.int32) // (length // 2) + 1, (rows, 1))
        mask = mask.replace(query_segments=segments, key_segments=segments)
    knobs = {"scale": head_dim**-0.5, "softcap": None}
    out, lse = flash.with_lse(q, k, v, mask, **knobs)
    lines = lse.swapaxes(1, 2), chunked.weigh(g, out).swapaxes(1, 2)
    arguments = {"forward": (forward, (q, k, v, mask, None))}
    if head_dim <= flash.BACKWARD:
        arguments |= {
            "queries": (queries_gradient, (q, k, v, mask, None, *lines, g)),
            "keys": (keys_gradient, (q, k, v, mask, None, *lines, g)),
        }
    return {name: (partial(run, **knobs), given) for name, (run, given) in arguments.items()}


def compiled(run, arguments, blocks: Blocks):
    """The kernel so cut; None where it does not compile."""
    try:
        return jax.jit(partial(run, blocks=blocks)).lower(*arguments).compile()
    except Exception as error:  # of many kinds: shared memory, registers, layouts
        print(f"  {blocks}: {str(error).splitlines()[0][:100]}", flush=True)
        return None


def timed(program, arguments, blocks: Blocks, expected, times: int = 20) -> float | None:
    """Milliseconds; None where the cut does not do."""
    from jax.experimental.mosaic.gpu import profiler

    if program is None:
        return None
    found, took = profiler.measure(program, iterations=times)(*arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        difference = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b.astype(jnp.float32)).max()
        if not difference < TOLERANCE:
            print(f"  {blocks}: its result is {float(difference):.3f} off", flush=True)
            return None
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(flash.WIDTHS), choices=flash.WIDTHS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    if not devices.on_hopper():
        raise SystemExit(f"this needs a Hopper GPU, and JAX has {devices.kind()}")
    entries = dict(flash_blocks.table())
    for head_dim, kind in itertools.product(options.head_dims, flash_blocks.KINDS):
        for kernel, (run, arguments) in calls(head_dim, kind, options.length).items():
            before = entries[kernel, head_dim, kind]
            tried = list({*cuts(kernel), before})
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiling takes a second, measuring a hundredth
                programs = dict(zip(tried, pool.map(partial(compiled, run, arguments), tried), strict=True))
            if programs[before] is None:
                raise SystemExit(f"{kernel} {head_dim} {kind}: the table's own {before} does not compile")
            expected = programs[before](*arguments)
            took = {blocks: timed(program, arguments, blocks, expected) for blocks, program in programs.items()}
            best = min((b for b in took if took[b] is not None), key=took.get)
            print(f"{kernel} {head_dim} {kind}: {best} {took[best]:.3f} ms, {before} {took[before]:.3f} ms", flush=True)
            entries[kernel, head_dim, kind] = best
    if not options.dry:
        flash_blocks.write(entries, f"{date.today()}, {devices.kind()}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
