"""The engine on one GPU: against transformers' `generate` at 64 requests at a time, and decoding of an 8B-shaped model against the speed of memory.

    python -m experiments.bench.serving_gpu [--models gpt2-124m] [--peer-python PATH] [--rounds 3]
    python -m experiments.bench.serving_gpu --floor [--batches 1 64 256]

The first: a random checkpoint in bf16, 64 requests of mixed prompts and mixed numbers of new tokens at once, greedily. transformers is given
them in batches of 64 and of 16 as they come, padded left (the best counts), and by its own continuous batching (`generate_batch`'s manager),
where that runs. Contenders are processes that take turns, each warmed up by the work itself; the tokens of all are compared first. In bf16
roundings differ, and a text that has once taken another turn goes on elsewhere, so that how many agree says little but that they begin alike.

The second: random weights made on the device, rows of 1,025 tokens and some, of which each is one step from its next token. Their keys and
values are random numbers put into pages of their own, not computed from the prompts: what decoding costs is the same, and computing them
takes longer than all that is measured. The floor is what a step must read, each weight but the embedding's table once and the keys and
values of every row, over the bandwidth of a copy in the same process. A step is from one return of `Engine.step` to the next, all that the
host does for it included.

`--device cpu --models tiny` (or `--floor --shape tiny`) says whether the script works, no more.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from experiments.bench.serving import MODELS, agreeing, generated, mixed, write
from experiments.bench.turns import Contender, cpu_name, gpu_name, serve, timed

CHECKPOINTS = {
    "tiny": MODELS["llama"] | {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "gpt2-124m": MODELS["gpt2-124m"],
    "llama-1b": MODELS["llama"] | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
WORK = {"cuda": (64, (32, 512), (32, 192)), "cpu": (4, (4, 12), (2, 6))}
"""Requests, and from how many to how many tokens their prompts have and they are continued by."""
BATCHES = (64, 16)
SHAPES = {"tiny": (2, 64, 2, 1, 128, 256), "8b": (32, 4096, 32, 8, 14336, 128256)}
"""Layers, width, heads, key heads, width within, vocabulary."""
PAGE = 64
PAGES_READ = {"cuda": 16, "cpu": 2}
"""Full pages of each row when decoding begins."""
WARM = 4
PATIENCE = 30
"""Seconds until continuous batching must be warm."""


def requests_of(model: str, device: str) -> list[tuple[list[int], int]]:
    return mixed(CHECKPOINTS[model]["vocab_size"], *WORK[device])


def execution():
    """How lmx computes: in bf16, by its own kernels where the chip is theirs."""
    from lmx.core.execution import Execution
    from lmx.core.precision import POLICIES
    from lmx.kernels import devices

    return Execution(precision=POLICIES["bf16"], attention="flash" if devices.on_hopper() else "auto")


def ours(folder: str, model: str, device: str) -> None:
    """The process of lmx."""
    from lmx import interop
    from lmx.infer.engine import Engine

    number, (_, longest), (_, most) = WORK[device]
    read, params = interop.load(folder)
    engine = Engine(
        read, params, rows=number, page=PAGE, longest=longest + most, chunk=2048, prompts=16, reuse=False, execution=execution()
    )

    def run() -> list[list[int]]:
        jobs = [engine.submit(prompt, max_new_tokens=new) for prompt, new in requests_of(model, device)]
        engine.run()
        return [job.completions[0].tokens for job in jobs]

    run()
    serve(lambda asked: run() if asked == "tokens" else timed(run))


def theirs(folder: str, model: str, device: str) -> None:
    """The process of transformers' `generate`."""
    import torch
    import transformers

    language = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    run = partial(generated, language.to(device).eval(), requests_of(model, device))
    texts = run(BATCHES[0])
    took = {batch: timed(partial(run, batch))[0] for batch in BATCHES}
    best = min(took, key=took.get)
    serve(lambda asked: texts if asked == "tokens" else timed(partial(run, best)))


def continuous(folder: str, model: str, device: str) -> None:
    """The process of transformers' continuous batching."""
    import torch
    import transformers

    language = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    work = requests_of(model, device)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max(new for _, new in work), eos_token_id=-1, pad_token_id=0, use_cache=True
    )

    def given_up(*_) -> None:
        print(f"it was not warm after {PATIENCE} s", file=sys.stderr, flush=True)
        os._exit(1)  # its threads do not end

    signal.signal(signal.SIGALRM, given_up)
    signal.alarm(PATIENCE)
    manager = language.to(device).eval().init_continuous_batching(generation_config=settings)
    manager.start()

    def run() -> list[list[int]]:
        asked = [manager.add_request(prompt, max_new_tokens=new) for prompt, new in work]
        found = {}
        while len(found) < len(asked):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended before its requests did")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching: {result.error}")
                found[result.request_id] = list(result.generated_tokens)
        texts = [found[name] for name in asked]
        if [len(text) for text in texts] != [new for _, new in work]:
            raise RuntimeError("continuous batching gave other numbers of tokens than were asked for")
        return texts

    run()
    signal.alarm(0)
    serve(lambda asked: run() if asked == "tokens" else timed(run))
    os._exit(0)


CONTENDERS = {"lmx": ours, "transformers": theirs, "transformers, continuous": continuous}


def compare(model: str, options: argparse.Namespace) -> None:
    """Prints the rows of a model."""
    work = requests_of(model, options.device)
    new, seconds, texts, absent = sum(count for _, count in work), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), CHECKPOINTS[model])
        contenders = {}
        for who in ("lmx", *options.against):
            python = sys.executable if who == "lmx" else options.peer_python
            one = Contender(who, python, "experiments.bench.serving_gpu", who, folder, model, options.device)
            if one.absent:
                absent[who] = one.absent
            else:
                contenders[who], seconds[who] = one, []
        if "lmx" in absent:
            sys.exit(f"lmx did not run: {absent['lmx']}")
        for who, one in contenders.items():
            texts[who] = one.ask("tokens")
        for _ in range(options.rounds):
            for who, one in contenders.items():
                seconds[who] += one.ask("seconds")
        for one in contenders.values():
            one.close()
    lengths = [len(text) for text in texts["lmx"]]
    if lengths != [count for _, count in work]:
        sys.exit(f"lmx gave {lengths} tokens, not as many as were asked for")
    took = {who: statistics.median(found) for who, found in seconds.items()}
    for who in ("lmx", *options.against):
        if who in absent:
            print(f"| {model} | {who} | absent: {absent[who]} | | |", flush=True)
            continue
        same = agreeing(texts[who], texts["lmx"])
        print(f"| {model} | {who} | {new / took[who]:,.0f} | {took[who] / took['lmx']:.2f} | {same} of {new} |", flush=True)


def floor(options: argparse.Namespace) -> None:
    """Prints how near to the speed of memory rows are decoded."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.bench.decode import copied
    from lmx.core.params import is_spec
    from lmx.core.tree import map_named, size
    from lmx.infer.engine import Engine
    from lmx.infer.pages import chain, root
    from lmx.models import stack
    from lmx.models.config import Transformer
    from lmx.models.families import functions

    began = time.perf_counter()
    layers, embed, heads, key_heads, within, vocab = SHAPES[options.shape]
    prompt, rows, steps = PAGES_READ[options.device] * PAGE + 1, max(options.batches), min(options.steps, PAGE - 2 - WARM)
    model = Transformer(
        vocab=vocab, layers=layers, embed=embed, heads=heads, kv_heads=key_heads, mlp=within, context=prompt + PAGE - 1, positions="rope",
        rope_theta=500_000.0, norm="rmsnorm", activation="silu", gated=True, bias=False,
    )  # fmt: skip
    bandwidth = copied(3, 1 << (30 if options.device == "cuda" else 22))
    keys = iter(jax.random.split(jax.random.key(0), 8192))

    @partial(jax.jit, static_argnums=1)
    def random(key, shape: tuple[int, ...]):
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    def weight(name: str, shape: jax.ShapeDtypeStruct):
        return jnp.ones(shape.shape, shape.dtype) if name.endswith("scale") else random(next(keys), shape.shape)

    @partial(jax.jit, donate_argnums=0)
    def filled(pages, key):
        return pages + jax.random.normal(key, pages.shape, pages.dtype)

    def unrolled(params):
        return params | {"layers": stack.unstack(params["layers"])}

    table = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), functions(model).specs(model), is_leaf=is_spec)
    params = map_named(weight, jax.eval_shape(unrolled, table))
    pool = 1 + rows * (1 + -(-model.context // PAGE))  # one more for each row than it fills, since the scheduler keeps that much free
    engine = Engine(model, params, rows=rows, page=PAGE, pages=pool, chunk=max(512, rows), execution=execution())
    weights = 2 * (size(params) - vocab * embed)
    del params
    (stage,) = engine._runner.stages  # what a prompt's keys and values are is nobody else's business
    held, kind = jax.tree.flatten(stage.layers)
    stage.layers = None
    for i, pages in enumerate(held):
        held[i] = filled(pages, next(keys))
    del pages
    stage.layers = jax.tree.unflatten(kind, held)
    del held
    rng = np.random.default_rng(0)

    def submitted() -> None:
        """A row that has all but its last token in pages."""
        tokens = rng.integers(0, vocab, prompt).tolist()
        job = engine.submit(tokens, max_new_tokens=WARM + steps)
        names = chain(job.request.fingerprint, tokens[:-1], PAGE)
        pages = engine.pages.allocate(len(names))
        for page, before, name in zip(pages, [root(job.request.fingerprint), *names], names, strict=False):
            engine.pages.register(page, before, name)
        engine.pages.release(pages)

    jax.block_until_ready(stage.layers)
    print(f"A copy moves {bandwidth / 1e12:.2f} TB/s; weights and pages are there after {time.perf_counter() - began:.0f} s.\n", flush=True)
    print("| rows | tokens of each | ms a step | tokens/s | floor, ms | of the floor's speed | CPU ms of the main thread | s until warm |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.batches:
        began = time.perf_counter()
        for _ in range(batch):
            submitted()
        for _ in range(WARM):
            engine.step()
        warm, ends, busy = time.perf_counter() - began, [time.perf_counter()], time.thread_time()
        for _ in range(steps - 1):
            drawn = engine.step()
            ends.append(time.perf_counter())
            if len(drawn) != batch:
                sys.exit(f"a step drew {len(drawn)} tokens for {batch} rows")
        host = (time.thread_time() - busy) / (steps - 1)
        while engine.busy:
            engine.step()
        took, length = statistics.median(np.diff(ends)), prompt + WARM + steps / 2
        least = (weights + batch * length * 4 * layers * key_heads * model.head_size) / bandwidth
        print(
            f"| {batch} | {length:.0f} | {1e3 * took:.2f} | {batch / took:,.0f} | {1e3 * least:.2f} | {least / took:.0%} | {1e3 * host:.2f} "
            f"| {warm:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=4, metavar=("CONTENDER", "FOLDER", "MODEL", "DEVICE"), help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--against", nargs="*", default=list(CONTENDERS)[1:], choices=list(CONTENDERS)[1:], help="contenders beside lmx")
    parser.add_argument("--models", nargs="+", default=["gpt2-124m"], choices=CHECKPOINTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--floor", action="store_true", help="an 8B-shaped model against the speed of memory")
    parser.add_argument("--shape", default="8b", choices=SHAPES, help="of --floor")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256], help="rows that decode at a time, of --floor")
    parser.add_argument("--steps", type=int, default=30, help="of each, of --floor")
    options = parser.parse_args()
    if options.work:
        who, folder, model, device = options.work
        return CONTENDERS[who](folder, model, device)
    print(f"{date.today()}, {chip(options)}; jax {version('jax')}\n")
    if options.floor:
        return floor(options)
    print("| model | by | tokens/s | it / lmx | tokens as lmx's |")
    print("| --- | --- | --- | --- | --- |")
    for model in options.models:
        compare(model, options)
    return None


def chip(options: argparse.Namespace) -> str:
    """What computes. Before JAX starts: the memory that it takes of a GPU is said here."""
    if options.device == "cpu":
        return cpu_name()
    try:
        found = ", ".join(gpu_name())
    except (OSError, subprocess.CalledProcessError):
        sys.exit("this measures on an NVIDIA GPU, and nvidia-smi finds none; --device cpu --models tiny says whether the script works")
    os.environ |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if options.floor else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return found


if __name__ == "__main__":
    main()
