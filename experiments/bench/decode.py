"""Paged attention on one Hopper GPU: bytes of keys and values read a second, over what a copy moves on the same card in the same run.

    python -m experiments.bench.decode [--contexts 2048 8192 32768] [--batches 1 8 32 128] [--new 1 4 8 16] [--rounds 5]

First the kernel must agree with the XLA form on a small case, twenty times to the bit; then the copy is timed; then rows that decode (one new
token each), rows with several (`--new`), and int8 pages, each beside one new token and bf16 pages of the same shape. Keys and values are
random; a shape whose cache is larger than `--gib` is left out and said to be. Times are of one layer of a program of several, each with pages
of its own: so nothing is read from the chip's cache, how work is cut is paid for as often as in a model, and the host is not in the way.
"""

import argparse
import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

from lmx.kernels import devices, paged, paged_gpu
from lmx.kernels.paged import View

HEADS = {"gqa": (64, 8, 128), "mha": (32, 32, 128), "wide": (32, 2, 256)}
"""Query heads, key heads, head dimension."""
LAYERS = 4


def timed(call, rounds: int, calls: int = 20) -> float:
    """Seconds a call: the median of rounds of many calls, which the host has sent off long before they are done."""
    jax.block_until_ready(call())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def setting(shape: str, batch: int, context: int, page: int, new: int, narrow: bool, seed: int = 0):
    """Queries, a cache and a view of rows of about `context` tokens, the last `new` of which are new, their pages in no order."""
    heads, kv_heads, dim = HEADS[shape]
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    lengths = rng.integers(context * 7 // 8, context + 1, batch)
    number = -(-lengths // page)
    first = np.cumsum([0, *number])
    view = View(
        *(jnp.asarray(a, jnp.int32) for a in (rng.permutation(first[-1]), first, lengths, np.arange(batch + 1) * new)),
        batch if new == 1 else 0,
    )

    @jax.jit
    def cache(key):
        pair = zip(("key", "value"), jax.random.split(key), strict=True)
        size = (int(first[-1]), kv_heads, page, dim)
        if not narrow:
            return {name: jax.random.normal(k, size, jnp.bfloat16) for name, k in pair}
        return {
            part: a
            for name, k in pair
            for part, a in ((name, jax.random.randint(k, size, -127, 128, jnp.int8)), (f"{name}_scale", jnp.full(size[:3], 0.02)))
        }

    q = jax.random.normal(key, (batch * new, heads, dim), jnp.bfloat16)
    held = cache(key)
    read = int(lengths.sum()) * sum(a.nbytes // (a.shape[0] * page) for a in held.values())
    return q, held, view, read


def checked(attend) -> float:
    """How far the kernel is from the XLA form, at most; and that twenty runs are one to the bit."""
    worst = 0.0
    for new, narrow, page in ((1, False, 16), (6, False, 16), (6, True, 64)):
        q, cache, view, _ = setting("gqa", 5, 1500, page, new, narrow)
        found = [np.asarray(attend["gpu"](q, cache, view), np.float32) for _ in range(20)]
        if any(np.any(found[0] != a) for a in found):
            raise SystemExit(f"{new} new tokens, {'int8' if narrow else 'bf16'} pages: runs differ; there is a race")
        worst = max(worst, float(np.abs(found[0] - np.asarray(attend["xla"](q, cache, view), np.float32)).max()))
    if worst > 0.03:
        raise SystemExit(f"the kernel is {worst:.3f} off the XLA form: more than bf16 explains")
    return worst


def copied(rounds: int, count: int = 1 << 30) -> float:
    """Bytes a second that a copy of so many numbers reads and writes."""
    a = jax.random.normal(jax.random.key(1), (count,), jnp.bfloat16)
    return 2 * a.nbytes / timed(lambda copy=jax.jit(jnp.negative): copy(a), rounds, 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gqa", "mha"], choices=HEADS)
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--pages", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--new", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not devices.on_hopper():
        raise SystemExit(f"this measures kernels for Hopper GPUs (H100, H200); here is {devices.kind()}")
    attend = {
        name: jax.jit(lambda q, cache, view, name=name: paged.attention(q, cache, view, scale=q.shape[-1] ** -0.5, implementation=name))
        for name in ("gpu", "xla")
    }
    off, copy = checked(attend), copied(args.rounds)
    print(f"{date.today()}, {devices.kind()}, jax {jax.__version__}; a copy moves {copy / 1e12:.2f} TB/s; off the XLA form by {off:.4f}\n")
    print("| heads | page | pages of | context | rows | new | us | TB/s | / copy | time / 1 new, bf16 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    cases = []
    for case in itertools.product(args.shapes, args.contexts, args.batches, args.pages):
        shape, context, batch, page = case
        heads, kv_heads, dim = HEADS[shape]
        if 4 * batch * context * kv_heads * dim > args.gib * 2**30:
            print(f"| {heads}:{kv_heads}x{dim} | {page} | | {context} | {batch} | more than {args.gib} GiB | | | | |")
            continue
        cases += [(shape, batch, context, page, new, narrow) for new, narrow in ((1, False), *((n, False) for n in args.new), (1, True))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, program in zip(cases, pool.map(compiled, cases), strict=True):
            shape, batch, context, page, new, narrow = case
            said = f"| {'{}:{}x{}'.format(*HEADS[shape])} | {page} | {'int8' if narrow else 'bf16'} | {context} | {batch} | {new} |"
            if isinstance(program, str):
                print(f"{said} {program} | | | |", flush=True)
                continue
            q, cache, view, read = setting(*case)
            caches = [cache, *(jax.tree.map(jnp.copy, cache) for _ in range(LAYERS - 1))]
            took = timed(lambda program=program, q=q, caches=caches, view=view: program(q, caches, view), args.rounds) / LAYERS
            alone = took if (new, narrow) == (1, False) else alone
            print(
                f"{said} {took * 1e6:.0f} | {read / took / 1e12:.2f} | {read / took / copy:.2f} | {took / alone:.2f} |",
                flush=True,
            )


def compiled(case: tuple):
    """Layers one after another, compiled; or what is refused. Of many cases at a time, since one takes seconds."""
    q, cache, view = jax.eval_shape(lambda: setting(*case)[:3])
    if reason := paged_gpu.refusal(q, cache):
        return reason

    def layers(q, caches, view):
        for cache in caches:
            q = paged.attention(q, cache, view, scale=q.shape[-1] ** -0.5, implementation="gpu")
        return q

    return jax.jit(layers).lower(q, [cache] * LAYERS, view).compile()


if __name__ == "__main__":
    main()
