"""MFU of a training step on one GPU: lmx, the same step by hand in bare JAX, and a compiled PyTorch model, side by side.

    python -m experiments.bench.train_gpu [--sizes 124m 350m 1.3b] [--peer-python PATH] [--rounds 3] [--together]

GPT-2 shapes in bf16 with fp32 master weights, AdamW and clipping; one batch, the same for all. Contenders take turns, each time as a
process of its own that has the GPU's memory to itself, or, `--together`, as one that stays. All start from lmx's initial weights, and
their losses there, and after the steps of warming up, must agree, or the script ends with what differs: a faster step that computes
something else is no faster step. PyTorch runs with each of its attention backends; those that are not there are named. `--device cpu
--sizes tiny` says whether the script works, no more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from experiments.bench.turns import Contender, cpu_name, gpu_name, serve, timed

SIZES = {
    "tiny": (2, 64, 2, 32, 4, 256),
    "124m": (12, 768, 12, 1024, 24, 50304),
    "350m": (24, 1024, 16, 1024, 12, 50304),
    "1.3b": (24, 2048, 16, 2048, 4, 50304),
}
"""Layers, width, heads, context, rows, vocabulary."""
WARM = 4
TOLERANCE = 1e-3
"""Of losses, relative: means over many tokens, each rounded to bf16 on its way."""


def data(size: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets."""
    _, _, _, context, rows, vocab = SIZES[size]
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, context + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def model(size: str):
    """lmx's configuration of the size."""
    from lmx.models.config import Transformer

    layers, embed, heads, context, _, vocab = SIZES[size]
    return Transformer(
        vocab=vocab, layers=layers, embed=embed, heads=heads, context=context, positions="learned", norm="layernorm",
        activation="gelu_tanh", gated=False, bias=True,
    )  # fmt: skip


def lmx_stepper(size: str, weights: Path):
    """lmx's own program; its initial weights are written for the others."""
    import jax

    from lmx.core.tree import map_named
    from lmx.data.recipe import Data
    from lmx.parallel.feed import batch_sharding, place
    from lmx.train.experiment import Experiment
    from lmx.train.optimizers import AdamW, Schedule
    from lmx.train.program import build

    tokens, targets = data(size)
    rows, context = tokens.shape
    optimizer = AdamW(learning_rate=3e-4, schedule=Schedule(kind="constant", warmup=0), b2=0.95, weight_decay=0.1, clip=1.0)
    program = build(
        Experiment(
            name="bench", data=Data(train="", packing="stream"), model=model(size), optimizer=optimizer, precision="bf16", batch=rows
        )
    )
    state, named = program.initial(), {}
    map_named(lambda name, a: named.__setitem__(name, np.asarray(a)), state.params)
    if not weights.exists():
        np.savez(weights, **named)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones((rows, context), np.float32),
        "positions": np.tile(np.arange(context, dtype=np.int32), (rows, 1)),
        "example_id": np.arange(rows, dtype=np.uint32),
    }
    batch = place(batch, np.arange(rows), (1, rows), batch_sharding(program.mesh, microbatches=True))

    def run() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return run


def work(contender: str, size: str, weights: str, device: str) -> None:
    """A contender's process: warms up, then answers `losses` with those of warming up, and a number with the seconds of as many steps."""
    kind, _, backend = contender.partition(" ")
    if kind == "lmx":
        run = lmx_stepper(size, Path(weights))
    else:
        with np.load(weights) as file:
            given = dict(file)
        if kind == "jax":
            from experiments.bench.gpt2_jax import stepper

            run = stepper(given, *data(size))
        else:
            from experiments.bench.gpt2_torch import stepper

            run = stepper(given, *data(size), heads=SIZES[size][2], backend=backend, device=device)
    losses = [run() for _ in range(WARM)]
    serve(lambda asked: losses if asked == "losses" else timed(run, int(asked)))


def compare(size: str, names: list[str], options: argparse.Namespace) -> list[dict]:
    """Runs contenders in turns and gives a row for each; lmx first, whose weights the others take."""
    seconds, losses, absent, waiting = {name: [] for name in names}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        if options.together:
            os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        for _ in range(options.rounds):
            for name in (n for n in names if n not in absent):
                python = options.peer_python if name.startswith("torch") else sys.executable
                start = ("experiments.bench.train_gpu", name, size, f"{folder}/weights.npz", options.device)
                one = waiting.pop(name, None) or Contender(name, python, *start)
                if one.absent:
                    absent[name] = one.absent
                else:
                    losses[name] = losses.get(name) or one.ask("losses")
                    seconds[name] += one.ask(str(options.steps))
                if options.together and not one.absent:
                    waiting[name] = one
                else:
                    one.close()
        for one in waiting.values():
            one.close()
    if "lmx" in absent:
        raise SystemExit(f"lmx did not run at {size}: {absent['lmx']}")
    for name, found in losses.items():
        if not np.allclose(found, losses["lmx"], rtol=TOLERANCE):
            raise SystemExit(f"{name} and lmx do not compute the same at {size}: losses {found} and {losses['lmx']}")
    return [
        {"name": n, "absent": absent.get(n), "loss": losses.get(n), "seconds": statistics.median(seconds[n]) if seconds[n] else None}
        for n in names
    ]


def chip(device: str) -> tuple[str, float | None]:
    """What computes, with its driver; and its peak in bf16, where it is known."""
    if device == "cpu":
        return cpu_name(), None
    from lmx.parallel import chips

    name, driver = gpu_name()
    return f"{name}, driver {driver}", chips.peak_flops(name, "bfloat16")


def versions(peer_python: str) -> str:
    """Of the libraries that compute."""

    def own(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} absent"

    peer = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.backends.cudnn.version()]))"
    asked = subprocess.run([peer_python, "-c", peer], capture_output=True, text=True)
    theirs = "torch {}, its CUDA {} and cuDNN {}".format(*json.loads(asked.stdout)) if asked.returncode == 0 else "torch absent"
    return ", ".join([*map(own, ("jax", "jaxlib", "nvidia-cudnn-cu13")), theirs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=4, metavar=("CONTENDER", "SIZE", "WEIGHTS", "DEVICE"), help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--sizes", nargs="+", default=[s for s in SIZES if s != "tiny"], choices=SIZES)
    parser.add_argument(
        "--against", nargs="*", help="contenders beside lmx: jax, 'torch cudnn', 'torch flash', 'torch math' (default: all)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--together", action="store_true", help="keep all contenders of a size in the GPU's memory at once: quicker")
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    from lmx.models.transformer import flops_per_token

    backends = ("cudnn", "flash") if options.device == "cuda" else ("math",)
    against = ["jax", *(f"torch {b}" for b in backends)] if options.against is None else options.against
    name, peak = chip(options.device)
    print(f"{date.today()}, {name}; {versions(options.peer_python)}\n")
    print("| size | contender | ms a step, median | tokens/s | MFU | lmx / it | losses before the first and the last step of warming up |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        tokens = SIZES[size][3] * SIZES[size][4]
        rows = compare(size, ["lmx", *against], options)
        for row in rows:
            if row["absent"]:
                print(f"| {size} | {row['name']} | absent: {row['absent']} | | | | |")
                continue
            rate, loss = tokens / row["seconds"], row["loss"]
            mfu = f"{rate * flops_per_token(model(size), SIZES[size][3]) / peak:.1%}" if peak else "peak unknown"
            ratio = row["seconds"] / rows[0]["seconds"]
            print(
                f"| {size} | {row['name']} | {1e3 * row['seconds']:.1f} | {rate:,.0f} | {mfu} | {ratio:.2f} | {loss[0]:.4f}, {loss[-1]:.4f} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
