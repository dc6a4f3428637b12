"""The peer of the first experiment: what a nanoGPT-style PyTorch model learns from the same text in the same seconds.

    python -m experiments.bench.nanogpt [--peer-python PATH] [--run runs/shakespeare] [--seconds 180]

A GPT of 4 layers, 4 heads and width 128 over bytes, context 64, 12 rows a step, AdamW at 1e-3: nanoGPT's settings for a CPU. It trains
for as long as the finished lmx run took from its start to its last step, its evaluations and compiling included; the peer's own compiling
and evaluation are not counted. Expect the two losses in nats per byte over the whole validation split side by side, lmx's the lower by
far. The peer needs `pip install 'lmx[bench]'`, or an interpreter that has torch given by --peer-python; without it it is said to be absent.
"""

import argparse
import json
import lzma
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path

from experiments.bench.turns import Contender, cpu_name, serve

TEXT = Path(__file__).parents[1] / "data" / "shakespeare"
LAYERS, HEADS, WIDTH, CONTEXT, ROWS = 4, 4, 128, 64, 12
RATE, FINAL, WARMUP, END = 1e-3, 1e-4, 100, 256
"""Peak and last learning rate, steps of warm-up, and the token after the 256 bytes that ends a text, as in lmx."""


def documents(split: str) -> list[bytes]:
    """The texts of a split."""
    with lzma.open(TEXT / f"{split}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"].encode() for line in file]


def gpt():
    """The model, its head tied to the embedding: tokens and targets to the mean loss of the targets that are not negative."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x):
            rows, length, _ = x.shape
            query, key, value = (
                part.view(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(WIDTH, 2)
            )
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(END + 1, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith(("out.weight", "down.weight")) else 0.02)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            rows = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(rows.flatten(0, 1), targets.flatten(), ignore_index=-1)

    torch.manual_seed(0)
    return GPT()


class Training:
    """A model being trained, eager or compiled. A class, because its parameters move."""

    def __init__(self, stream, *, compiled: bool):
        import torch

        self.stream, self.steps, self.model = stream, 0, gpt()
        self.loss = torch.compile(self.model) if compiled else self.model
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)

    def step(self, done: float) -> None:
        """One step, when the share `done` of the training is over."""
        import torch

        cosine = FINAL + (RATE - FINAL) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = cosine * min(1.0, (self.steps + 1) / WARMUP)
        windows = self.stream[torch.randint(len(self.stream) - CONTEXT, (ROWS, 1)) + torch.arange(CONTEXT + 1)]
        self.loss(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1


def fastest(stream) -> tuple[bool, int, dict[str, float]]:
    """Whether compiling pays and with how many threads (one where other work takes the cores), by the steps per second of throw-away
    models."""
    import torch

    speeds = {}
    for compiled in (False, True):
        for threads in sorted({1, os.cpu_count()}):
            torch.set_num_threads(threads)
            try:
                trial = Training(stream, compiled=compiled)
                for _ in range(5):
                    trial.step(0.0)
                start = time.perf_counter()
                while trial.steps < 10 or time.perf_counter() - start < 3.0:
                    trial.step(0.0)
                speeds[compiled, threads] = (trial.steps - 5) / (time.perf_counter() - start)
            except Exception as error:
                if not compiled:
                    raise
                print(f"torch.compile does not work here: {error}", file=sys.stderr)
    compiled, threads = max(speeds, key=speeds.get)
    names = {(c, t): f"{'compiled' if c else 'eager'}, {t} thread{'s' if t > 1 else ''}" for c, t in speeds}
    return compiled, threads, {names[key]: speed for key, speed in speeds.items()}


def nats_per_byte(model) -> float:
    """Losses over the whole validation split by its bytes: every byte but a text's first is predicted, and its end, from contexts of 64
    that do not overlap."""
    import torch
    from torch.nn.functional import pad

    windows = []
    for text in documents("validation"):
        tokens = torch.tensor([*text, END])
        length = -(-(len(tokens) - 1) // CONTEXT) * CONTEXT
        inputs, targets = (pad(part, (0, length - len(part)), value=fill) for part, fill in ((tokens[:-1], 0), (tokens[1:], -1)))
        windows.append(torch.stack([inputs, targets]).view(2, -1, CONTEXT))
    inputs, targets = torch.cat(windows, 1)
    total = 0.0
    with torch.inference_mode():
        for tokens, wanted in zip(inputs.split(256), targets.split(256), strict=True):
            total += model(tokens, wanted).item() * int((wanted >= 0).sum())
    return total / sum(map(len, documents("validation")))


def work() -> None:
    """The peer's process: for each number of seconds it is given, trains a model for so long and answers with how it went."""
    import torch

    stream = torch.tensor([token for text in documents("train") for token in (*text, END)])
    compiled, threads, speeds = fastest(stream)
    torch.set_num_threads(threads)

    def train(seconds: str) -> dict:
        training, limit = Training(stream, compiled=compiled), float(seconds)
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < limit:
            training.step(passed / limit)
        return {"speeds": speeds, "steps": training.steps, "nats_per_byte": nats_per_byte(training.model)}

    serve(train)


def of_run(run: str) -> tuple[float, float]:
    """Seconds between a run's start and its last step, and its last nats per byte. Exits when it has not finished."""
    from lmx.train.logging import read_metrics, read_record

    try:
        record, metrics = read_record(run), read_metrics(run)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}; train it with: python -m experiments.shakespeare")
    steps = [entry for entry in metrics if entry["split"] == "train"]
    scores = [entry for entry in metrics if "nats_per_byte" in entry]
    if not steps or not scores or steps[-1]["step"] < record["config"]["steps"] or scores[-1]["step"] < record["config"]["steps"]:
        sys.exit(f"{run} has not finished; go on with it by --start resume")
    return steps[-1]["time"] - datetime.fromisoformat(record["written"]).timestamp(), scores[-1]["nats_per_byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--run", default="runs/shakespeare", help="the finished run of lmx to compare with")
    parser.add_argument("--seconds", type=float, help="how long the peer trains, instead of as long as the run did")
    options = parser.parse_args()
    if options.work:
        return work()
    seconds, ours = of_run(options.run)
    print(f"{cpu_name()}\nlmx, {options.run}: {ours:.4f} nats per byte after {seconds:.0f} s", flush=True)
    peer = Contender("torch", options.peer_python, "experiments.bench.nanogpt")
    if peer.absent:
        print(f"torch: absent: {peer.absent}")
    else:
        seconds = seconds if options.seconds is None else options.seconds
        found = peer.ask(str(seconds))
        form = max(found["speeds"], key=found["speeds"].get)
        print(f"torch, {form}: {found['nats_per_byte']:.4f} nats per byte after {seconds:.0f} s, {found['steps']:,} steps")
        print("torch, bytes/s: " + "; ".join(f"{name} {speed * ROWS * CONTEXT:,.0f}" for name, speed in found["speeds"].items()))
        print(f"lmx / torch: {ours / found['nats_per_byte']:.3f}")
    peer.close()
    return None


if __name__ == "__main__":
    main()
