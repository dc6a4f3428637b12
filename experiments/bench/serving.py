"""Tokens per second of the engine against transformers' `generate`, on a CPU, side by side; and how near one text is to the speed of memory.

    python -m experiments.bench.serving [--peer-python PATH] [--models gpt2-124m llama] [--rounds 3]

Random checkpoints are written once and read by all. A round is every contender doing the same work in turn: 16 requests of mixed prompts
and mixed numbers of new tokens, and one text alone, greedily. transformers is given the requests in batches of 1, of 8 and of 16 as they
come, padded left (the best counts); what it draws beyond a request's own number is not counted, for it is not wanted. Warmed up before; the
tokens of all are compared first. The floor is the bytes that a token needs (weights, and its keys and values) over the bandwidth at which
this machine's cores read memory, measured in the same minute. Figures are in `experiments/bench/README.md`. The peer needs
`pip install 'lmx[bench]'`, or an interpreter that has torch and transformers given by --peer-python; without it the row says that it is
absent.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.turns import Contender, cpu_name, serve, timed

MODELS = {
    "gpt2-124m": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
        "n_head": 12, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    },
}  # fmt: skip
REQUESTS, ALONE = 16, (16, 64)
"""How many there are in the mixed work; and the prompt and new tokens of the text alone."""
BATCHES = (1, 8, 16)


def mixed(vocab: int, number: int, lengths: tuple[int, int], new: tuple[int, int]) -> list[tuple[list[int], int]]:
    """Prompts and how many tokens each is to be continued by, both from a least to a most, without a library that a peer may lack."""
    found = []
    for i in range(number):
        length = lengths[0] + (37 * i * i + 11 * i) % (lengths[1] - lengths[0] + 1)
        count = new[0] + (53 * i + 7 * i * i) % (new[1] - new[0] + 1)
        found.append(([(7919 * (i + 1) * (j + 3) + 13 * j * j) % vocab for j in range(length)], count))
    return found


def work_of(model: str) -> list[tuple[list[int], int]]:
    return mixed(MODELS[model]["vocab_size"], REQUESTS, (8, 192), (16, 80))


def alone(model: str) -> list[tuple[list[int], int]]:
    return [(work_of(model)[0][0][:1] * 2 + list(range(5, 3 + ALONE[0])), ALONE[1])]


def write(folder: Path, config: dict[str, Any]) -> None:
    """A random checkpoint of a configuration as transformers reads it."""
    import jax
    import numpy as np

    from lmx.core.params import is_spec
    from lmx.core.tree import map_named
    from lmx.interop.checkpoint import read_config, save
    from lmx.models.families import functions

    config = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0} | config
    (folder / "config.json").write_text(json.dumps(config))
    found, rng = read_config(folder), np.random.default_rng(0)

    def random(name: str, spec) -> Any:
        centre = 1.0 if name.endswith("scale") else 0.0
        return centre + rng.normal(scale=0.08, size=spec.shape).astype(np.float32)

    params = map_named(random, functions(found.config).specs(found.config), is_leaf=is_spec)
    save(found, jax.device_put(params), folder)


def bandwidth() -> float:
    """Bytes a second at which all cores read memory: the best of a few passes over 1 GB."""
    import numpy as np

    parts = [np.ones(2**28 // os.cpu_count(), np.float32) for _ in range(os.cpu_count())]
    with ThreadPoolExecutor(len(parts)) as pool:

        def once() -> None:
            list(pool.map(lambda part: float(part @ part), parts))

        return sum(part.nbytes for part in parts) / min(timed(once, 7))


def ours(folder: str, kind: str) -> None:
    """The process of lmx."""
    import jax
    import numpy as np

    from lmx import interop
    from lmx.core.execution import Execution
    from lmx.core.precision import POLICIES
    from lmx.core.tree import size
    from lmx.infer.engine import Engine

    model, params = interop.load(folder)
    name = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    name = next(n for n, config in MODELS.items() if config["model_type"] == name)
    execution = Execution(precision=POLICIES[kind])
    engine = Engine(model, params, rows=REQUESTS, page=32, longest=384, chunk=256, reuse=False, trace=True, execution=execution)
    engine.warm_up()

    def run(requests: list[tuple[list[int], int]]) -> list[list[int]]:
        jobs = [engine.submit(prompt, max_new_tokens=new) for prompt, new in requests]
        engine.run()
        return [job.completions[0].tokens for job in jobs]

    def floor() -> list[float]:
        """Seconds of one token alone, and what they would be at the speed of memory."""
        engine.timeline.clear()
        before = bandwidth()
        run(alone(name))
        took = statistics.median(m.end - m.start for m in engine.timeline if m.decoded)
        config, width = model.config, jax.numpy.dtype(execution.precision.compute).itemsize
        table = config.vocab * config.embed
        read = size(params) - (0 if config.tied else table) - (config.context * config.embed if config.positions == "learned" else 0)
        held = 2 * config.layers * config.key_heads * config.head_size * (ALONE[0] + ALONE[1] / 2)
        return [took, (read + held) * width / max(before, bandwidth())]

    answers = {
        "tokens": lambda: run(work_of(name)),
        "mixed": lambda: timed(lambda: run(work_of(name))),
        "alone": lambda: timed(lambda: run(alone(name))),
        "floor": floor,
    }
    for warm in ("tokens", "alone"):
        answers[warm]()
    np.testing.assert_array_equal([len(text) for text in answers["tokens"]()], [new for _, new in work_of(name)])
    serve(lambda request: answers[request]())


def generated(model, requests: list[tuple[list[int], int]], batch: int) -> list[list[int]]:
    """What transformers' `generate` continues prompts by, so many at a time, padded left, each batch to its longest wish."""
    import torch

    found = {}
    for start in range(0, len(requests), batch):
        some = range(start, min(start + batch, len(requests)))
        longest, most = max(len(requests[i][0]) for i in some), max(requests[i][1] for i in some)
        ids = torch.tensor([[0] * (longest - len(requests[i][0])) + requests[i][0] for i in some], device=model.device)
        mask = torch.tensor([[0] * (longest - len(requests[i][0])) + [1] * len(requests[i][0]) for i in some], device=model.device)
        new = model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, use_cache=True)
        found |= {i: new[row, longest : longest + requests[i][1]].tolist() for row, i in enumerate(some)}
    return [found[i] for i in range(len(requests))]


def agreeing(texts: list[list[int]], others: list[list[int]]) -> int:
    """How many tokens come before the first that differs, of all texts together."""
    return sum((*(a == b for a, b in zip(x, y, strict=True)), False).index(False) for x, y in zip(texts, others, strict=True))


def theirs(folder: str, kind: str) -> None:
    """The process of transformers."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    name = next(n for n, config in MODELS.items() if config["model_type"] == model.config.model_type)

    run = partial(generated, model)
    answers = {
        "tokens": lambda: run(work_of(name), max(BATCHES)),
        "mixed": lambda: [min(timed(partial(run, work_of(name), batch))[0] for batch in BATCHES)],
        "alone": lambda: timed(lambda: run(alone(name), 1)),
    }
    answers["alone"]()
    serve(lambda request: answers[request]())


def compare(model: str, peer_python: str, rounds: int) -> None:
    """Prints the rows of a model."""
    new = sum(count for _, count in work_of(model))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), MODELS[model])
        contenders = {}
        for kind in ("fp32", "bf16"):
            for who, python in (("lmx", sys.executable), ("transformers", peer_python)):
                contenders[who, kind] = Contender(f"{who}, {kind}", python, "experiments.bench.serving", who, folder, kind)
        present = {key: one for key, one in contenders.items() if not one.absent}
        texts = {key: one.ask("tokens") for key, one in present.items()}
        seconds = {key: {"mixed": [], "alone": []} for key in present}
        for _ in range(rounds):
            for what in ("mixed", "alone"):
                for key, one in present.items():
                    seconds[key][what] += one.ask(what)
        for kind in ("fp32", "bf16"):
            if ("lmx", kind) not in present:
                sys.exit(f"lmx, {kind}: {contenders['lmx', kind].absent}")
            took, least = present["lmx", kind].ask("floor")
            for who in ("lmx", "transformers"):
                if (who, kind) not in present:
                    print(f"| {model} | {who}, {kind} | absent: {contenders[who, kind].absent} | | | |", flush=True)
                    continue
                mixed, one = (statistics.median(seconds[who, kind][what]) for what in ("mixed", "alone"))
                ratios = [statistics.median(seconds[who, kind][w]) / statistics.median(seconds["lmx", kind][w]) for w in ("mixed", "alone")]
                same = agreeing(texts[who, kind], texts["lmx", kind])
                near = f"{least / took:.0%} of the floor's speed, {1 / took:.1f} tokens/s" if who == "lmx" else ""
                print(
                    f"| {model} | {who}, {kind} | {new / mixed:,.1f} ({ratios[0]:.2f}) | {ALONE[1] / one:,.1f} ({ratios[1]:.2f}) |"
                    f" {same} of {new} | {near} |",
                    flush=True,
                )
        for one in contenders.values():
            one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=3, metavar=("CONTENDER", "FOLDER", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    options = parser.parse_args()
    if options.work:
        who, folder, kind = options.work
        return (ours if who == "lmx" else theirs)(folder, kind)
    started = time.perf_counter()
    print(f"{cpu_name()}, {os.cpu_count()} cores; reads {bandwidth() / 1e9:.1f} GB/s")
    print("| model | by | 16 mixed requests, tokens/s (lmx / it) | one text (lmx / it) | tokens as lmx's | decoding one text |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in options.models:
        compare(model, options.peer_python, options.rounds)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return None


if __name__ == "__main__":
    main()
