"""Tokens per second of a training step, against the same model in PyTorch (transformers' GPT-2), side by side.

    python -m experiments.bench.train_step [--peer-python PATH] [--sizes small 124m] [--precisions fp32 bf16]

Each contender is its own process and takes turns with the others, a few steps at a time, so that a machine whose speed drifts slows all
alike; the ratio to quote is the one of medians. The peer needs `pip install 'lmx[bench]'`, or an interpreter that has torch and transformers given
by --peer-python; without it the row says that it is absent.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable

from experiments.bench.turns import Contender, cpu_name, serve, timed

SIZES = {"small": (4, 128, 4, 64, 12, 256), "124m": (12, 768, 12, 256, 2, 50264)}
"""Layers, width, heads, context, rows, vocabulary (a multiple of 8, for both)."""
CONTENDERS = ("lmx", "torch eager", "torch compiled")


def lmx_step(size: str, precision: str) -> Callable[[], None]:
    """One step of lmx's own program: the same functions that `lmx.train.loop` runs."""
    import jax
    import numpy as np

    from lmx.data.recipe import Data
    from lmx.models.config import Transformer
    from lmx.parallel.feed import batch_sharding, place
    from lmx.train.experiment import Experiment
    from lmx.train.optimizers import AdamW, Schedule
    from lmx.train.program import build

    layers, embed, heads, context, rows, vocab = SIZES[size]
    model = Transformer(
        vocab=vocab, layers=layers, embed=embed, heads=heads, context=context, positions="learned", norm="layernorm",
        activation="gelu_tanh", gated=False, bias=True,
    )  # fmt: skip
    optimizer = AdamW(learning_rate=3e-4, schedule=Schedule(kind="constant", warmup=0))
    program = build(Experiment(name="bench", data=Data(train=""), model=model, optimizer=optimizer, precision=precision, batch=rows))
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, context + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, context), np.float32),
        "segments": np.ones((rows, context), np.int32),
        "positions": np.tile(np.arange(context, dtype=np.int32), (rows, 1)),
        "example_id": np.arange(rows, dtype=np.uint32),
    }
    state, sharding = program.initial(), batch_sharding(program.mesh, microbatches=True)

    def step() -> None:
        nonlocal state
        state, metrics = program.step(state, place(batch, np.arange(rows), (1, rows), sharding))
        jax.block_until_ready((state, metrics))

    return step


def torch_step(size: str, precision: str, *, compiled: bool) -> Callable[[], None]:
    """One step of transformers' GPT-2: scaled-dot-product attention, fused AdamW, gradients clipped to norm 1; bf16 by autocast."""
    import torch
    import transformers

    layers, embed, heads, context, rows, vocab = SIZES[size]
    torch.set_num_threads(os.cpu_count())
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=embed, n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(input_ids=tokens, labels=tokens).loss

    loss_of = torch.compile(loss_of) if compiled else loss_of
    tokens = torch.randint(0, vocab, (rows, context))

    def step() -> None:
        loss_of(tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(contender: str, size: str, precision: str) -> None:
    """A contender's process: warms up, then runs as many steps as each line of its input says and prints their seconds."""
    step = lmx_step(size, precision) if contender == "lmx" else torch_step(size, precision, compiled=contender == "torch compiled")
    for _ in range(3):
        step()
    serve(lambda steps: timed(step, int(steps)))


def compare(size: str, precision: str, peer_python: str, rounds: int) -> list[dict]:
    """Runs all contenders in turns and gives a row for each."""
    pythons = {name: sys.executable if name == "lmx" else peer_python for name in CONTENDERS}
    contenders = [Contender(name, pythons[name], "experiments.bench.train_step", name, size, precision) for name in CONTENDERS]
    steps = "10" if size == "small" else "2"
    for _ in range(rounds):
        for contender in contenders:
            if not contender.absent:
                contender.run(steps)
    tokens = SIZES[size][3] * SIZES[size][4]
    rows = []
    for contender in contenders:
        contender.close()
        row = {"size": size, "precision": precision, "contender": contender.name, "absent": contender.absent}
        if not contender.absent:
            row |= {"median": tokens / statistics.median(contender.seconds), "best": tokens / min(contender.seconds)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=3, metavar=("CONTENDER", "SIZE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    print(cpu_name())
    print("| size | precision | contender | tokens/s, median | best | lmx / it, by medians |\n| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        for precision in options.precisions:
            rows = compare(size, precision, options.peer_python, options.rounds)
            for row in rows:
                where = f"| {size} | {precision} | {row['contender']} |"
                if row["absent"]:
                    print(f"{where} absent: {row['absent']} | | |")
                else:
                    print(
                        f"{where} {row['median']:,.0f} | {row['best']:,.0f} | {rows[0].get('median', 0) / row['median']:.2f} |", flush=True
                    )
    return None


if __name__ == "__main__":
    main()
