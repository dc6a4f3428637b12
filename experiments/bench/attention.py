"""Attention on one GPU: our own kernel against cuDNN's, XLA's tiles and PyTorch's (its backends of SDPA, and compiled flex_attention).

    python -m experiments.bench.attention [--cases causal window ...] [--lengths 1024 4096 ...] [--peer-python PATH] [--rounds 3]

bf16, 16,384 tokens and 2,048 / head_dim heads a call, random contents. Two processes, lmx's and PyTorch's, take turns; times are of the GPU alone
(CUPTI, or CUDA's events), medians over rounds, and a difference below the spread is a tie. Before anything is timed, the kernel is held
against float32 and repeated twenty times, bit for bit: a moving result is a race, or an assembler (of CUDA before 13.3) that breaks
products from registers. TFLOP/s count what the mask shows. Without a GPU the script ends with that.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import cache, partial

import numpy as np

from experiments.bench.turns import Contender, gpu_name, serve

TOKENS, WIDTH = 16384, 2048
WINDOW, TEXT, CAP = 1024, 1024, 30.0
"""Of the cases: a window, the length of a packed text, a soft cap."""
CASES = ("causal", "full", "window", "packed", "softcap", "alibi", "grouped")
PEERS = {"causal": ("cudnn", "flash"), "full": ("cudnn", "flash"), "grouped": ("cudnn", "flash")}
"""PyTorch's backends of SDPA that can do a case; the others are for flex_attention."""
OURS = ("flash", "cudnn", "chunked")


def shape(case: str, length: int, head_dim: int) -> tuple[int, int, int]:
    """Rows, query heads and key heads."""
    heads = WIDTH // head_dim * (2 if case == "grouped" else 1)
    return max(1, TOKENS // length), heads, heads // 4 if case == "grouped" else heads


def flops(case: str, length: int, head_dim: int) -> float:
    """Of a forward pass, of what the mask shows; a backward pass has 2.5 times as many."""
    rows, heads, _ = shape(case, length, head_dim)
    seen = {"full": length**2, "window": length * min(length, WINDOW), "packed": length * min(length, TEXT) / 2}.get(case, length**2 / 2)
    return 4 * rows * heads * head_dim * seen


def inputs(case: str, length: int, head_dim: int):
    """A case for lmx: arrays, and what the door is told."""
    import jax
    import jax.numpy as jnp

    from lmx.kernels.masks import Mask

    rows, heads, kv_heads = shape(case, length, head_dim)
    keys = jax.random.split(jax.random.key(length), 4)
    arrays = [
        jax.random.normal(key, (rows, length, h, head_dim), jnp.bfloat16)
        for key, h in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]
    mask = Mask(causal=case != "full", window=WINDOW if case == "window" else None)
    if case == "packed":
        segments = jnp.tile(jnp.arange(length, dtype=jnp.int32) // TEXT + 1, (rows, 1))
        mask = mask.replace(query_segments=segments, key_segments=segments)
    slopes = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads) if case == "alibi" else None
    return arrays, mask, {"softcap": CAP if case == "softcap" else None, "slopes": slopes}


def passes(case: str, length: int, head_dim: int, implementation: str):
    """The forward pass and both passes of an implementation, jitted, and their arguments."""
    import jax

    from lmx.kernels.attention import attention

    (q, k, v, g), mask, knobs = inputs(case, length, head_dim)
    run = partial(attention, mask=mask, **knobs, implementation=implementation)

    def both(q, k, v, g):
        out, pullback = jax.vjp(run, q, k, v)
        return out, *pullback(g)

    return {"forward": (jax.jit(run), (q, k, v)), "both": (jax.jit(both), (q, k, v, g))}


@cache
def compiled(case: str, length: int, head_dim: int, implementation: str) -> dict:
    """Each pass, compiled; or what is refused."""
    try:
        return {name: f.lower(*given).compile() for name, (f, given) in passes(case, length, head_dim, implementation).items()}
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return {"refused": str(error).splitlines()[0][:120]}


def prepared(cases: list[list]) -> int:
    """Compiles many at a time, since one takes seconds and its measurement none: how many."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return len(list(pool.map(lambda case: compiled(*case), cases)))


def measured(case: str, length: int, head_dim: int, implementation: str, times: int) -> dict:
    """Milliseconds of the GPU for each pass; or what is refused."""
    from jax.experimental.mosaic.gpu import profiler

    programs = compiled(case, length, head_dim, implementation)
    if "refused" in programs:
        return programs
    given = inputs(case, length, head_dim)[0]
    try:
        return {name: profiler.measure(f, iterations=times)(*given[: 3 if name == "forward" else 4])[1] for name, f in programs.items()}
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0][:120]}


def checked(case: str, length: int, head_dim: int) -> dict:
    """The largest error of the kernel's output and gradients against float32, relative to the largest value, beside cuDNN's or XLA's in bf16;
    and how many of twenty repeats differ in any bit."""
    import jax
    import jax.numpy as jnp

    from lmx.kernels import reference

    f, arguments = passes(case, length, head_dim, "flash")["both"]
    (q, k, v, g), mask, knobs = inputs(case, length, head_dim)
    out, pullback = jax.vjp(
        partial(reference.attention, mask=mask, scale=head_dim**-0.5, **knobs), *(a[:1].astype(jnp.float32) for a in (q, k, v))
    )
    true = (out, *pullback(g[:1].astype(jnp.float32)))
    first, other = f(*arguments), passes(case, length, head_dim, "chunked")["both"][0](*arguments)
    errors = {
        name: [float(jnp.abs(a[:1].astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in zip(found, true, strict=True)]
        for name, found in (("flash", first), ("chunked", other))
    }
    moved = sum(any(bool((a != b).any()) for a, b in zip(first, f(*arguments), strict=True)) for _ in range(20))
    return {"errors": errors, "moved": moved}


def work() -> None:
    """lmx's process."""
    import jax

    from lmx.kernels import devices

    if not devices.on_nvidia():
        raise SystemExit(f"this needs an NVIDIA GPU, and JAX has {jax.devices()[0].device_kind}")

    def answer(request: str):
        asked = json.loads(request)
        if "prepare" in asked:
            return prepared(asked["prepare"])
        return checked(*asked["check"]) if "check" in asked else measured(**asked)

    serve(answer)


def milliseconds(contenders: dict[str, Contender], case: str, length: int, head_dim: int, options) -> dict[str, dict]:
    """Medians and spreads of each implementation, by `lmx flash`, `torch cudnn`, ..., in turns."""
    names = [f"lmx {name}" for name in OURS] + [f"torch {name}" for name in PEERS.get(case, ("flex",))]
    found = {name: {"forward": [], "both": []} for name in names if name.split()[0] in contenders}
    for _ in range(options.rounds):
        for name, passes in found.items():
            if "refused" in passes:
                continue
            who, implementation = name.split()
            asked = {"case": case, "length": length, "head_dim": head_dim, "implementation": implementation, "times": options.times}
            answer = contenders[who].ask(json.dumps(asked))
            if "refused" in answer:
                passes |= answer
                found[name] = passes
            else:
                for which, times in answer.items():
                    passes[which] += times
    return found


def table(found: dict[str, dict], case: str, length: int, head_dim: int) -> None:
    ours = {which: statistics.median(times) for which, times in found["lmx flash"].items() if which != "refused" and times}
    for name, passes in found.items():
        if "refused" in passes:
            print(f"| {case} | {length} | {head_dim} | {name} | {passes['refused']} | | | | |", flush=True)
            continue
        forward, both = (statistics.median(passes[which]) for which in ("forward", "both"))
        spread = max(np.ptp(np.percentile(passes[which], (25, 75))) / statistics.median(passes[which]) for which in ("forward", "both"))
        work = flops(case, length, head_dim) / 1e9
        ratios = [f"{time / ours[which]:.2f}" if ours else "" for which, time in (("forward", forward), ("both", both))]
        print(
            f"| {case} | {length} | {head_dim} | {name} | {forward:.3f} ({work / forward:.0f}) | {both:.3f} ({3.5 * work / both:.0f}) "
            f"| {ratios[0]} | {ratios[1]} | {spread:.1%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--times", type=int, default=10, help="calls of a turn")
    options = parser.parse_args()
    if options.work is not None:
        return work()
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    lmx = Contender("lmx", sys.executable, "experiments.bench.attention")
    if lmx.absent:
        raise SystemExit(lmx.absent)
    torch = Contender("torch", options.peer_python, "experiments.bench.attention_torch")
    contenders = {"lmx": lmx} | ({} if torch.absent else {"torch": torch})
    chip = ", ".join(gpu_name())
    print(f"{date.today()}, {chip}{f'; torch is absent: {torch.absent}' if torch.absent else ''}\n")
    for case in options.cases:
        for head_dim in options.head_dims:
            found = lmx.ask(json.dumps({"check": [case, min(2048, *options.lengths), head_dim]}))
            print(f"{case}, head_dim {head_dim}: errors of out, dq, dk, dv {found['errors']}; {found['moved']} of 20 repeats moved")
            if found["moved"]:
                raise SystemExit(f"the kernel's results move from call to call at {case}, head_dim {head_dim}: nothing is worth timing")
    shapes = [(case, n, dim) for case, dim, n in itertools.product(options.cases, options.head_dims, options.lengths)]
    lmx.ask(json.dumps({"prepare": [(*shape, name) for shape in shapes for name in OURS]}))
    print("\n| case | length | head_dim | contender | forward, ms (TFLOP/s) | both, ms | forward / ours | both / ours | spread |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in shapes:
        table(milliseconds(contenders, *shape, options), *shape)
    for contender in contenders.values():
        contender.close()
    return None


if __name__ == "__main__":
    main()
