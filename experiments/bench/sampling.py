"""Tokens per second of sampling one sequence, against transformers' `generate` on the same weights, side by side.

    python -m experiments.bench.sampling [--peer-python PATH] [--sizes small 124m]

A GPT-2 with random weights is written as transformers reads it; both continue the same prompt greedily in f32 with a cache, warmed up,
taking turns, and what they write is compared token by token. The peer runs on all cores and on one: where other work takes the cores,
it is better off with one. Expect all tokens equal and ratios above 1; the figures are in `experiments/bench/README.md`. The peer needs
`pip install 'lmx[bench]'`, or an interpreter that has torch and transformers given by --peer-python; without it the row says that it is
absent.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench.turns import Contender, cpu_name, serve, timed

SIZES = {"small": (4, 128, 4, 512, 1024, 256), "124m": (12, 768, 12, 1024, 50264, 64)}
"""Layers, width, heads, context, vocabulary, new tokens of a call. Small is the size of `experiments.shakespeare`."""
PROMPT = 16
CONTENDERS = ("lmx", "transformers", "transformers, one thread")


def prompt(size: str) -> list[int]:
    """The tokens to continue."""
    return [(7919 * i + 13) % SIZES[size][4] for i in range(PROMPT)]


def random_model(size: str) -> tuple[Any, Any]:
    """GPT-2 as lmx says it, and random parameters, the same in every process; biases and scales are random too."""
    import jax

    from lmx.core.params import initial_values
    from lmx.core.tree import map_named
    from lmx.models.config import Transformer
    from lmx.models.transformer import specs

    layers, embed, heads, context, vocab, _ = SIZES[size]
    model = Transformer(
        vocab=vocab, layers=layers, embed=embed, heads=heads, context=context, positions="learned", norm="layernorm",
        activation="gelu_tanh", gated=False, bias=True, init_std=0.1,
    )  # fmt: skip

    def shaken(name: str, leaf: jax.Array) -> jax.Array:
        return leaf + 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape) if name.endswith(("bias", "scale")) else leaf

    return model, map_named(shaken, initial_values(jax.random.key(0), specs(model)))


def write_gpt2(folder: Path, size: str) -> None:
    """The random model as transformers' GPT-2: a config and a safetensors file."""
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from lmx.infer.weights import decoding_params

    model, params = random_model(size)
    params, tensors = jax.device_get(decoding_params(params)), {}

    def put(name: str, layer: dict, weight: str = "weight", shape: tuple[int, ...] = (-1,)) -> None:
        tensors[f"transformer.{name}.weight"] = np.ascontiguousarray(layer[weight].reshape(shape))
        tensors[f"transformer.{name}.bias"] = np.ascontiguousarray(layer["bias"].reshape(-1))

    tensors |= {"transformer.wte.weight": params["embed"], "transformer.wpe.weight": params["positions"]}
    put("ln_f", params["norm"], "scale")
    for i, layer in enumerate(params["layers"][0]):
        attention, feedforward = layer["attention"], layer["feedforward"]
        fused = [[attention[n][part].reshape(*lead, -1) for n in ("query", "key", "value")]
                 for part, lead in (("weight", (model.embed,)), ("bias", ()))]  # fmt: skip
        weight, bias = (np.concatenate(parts, -1) for parts in fused)
        put(f"h.{i}.ln_1", layer["attention_norm"], "scale")
        put(f"h.{i}.attn.c_attn", {"weight": weight, "bias": bias}, shape=weight.shape)
        put(f"h.{i}.attn.c_proj", attention["output"], shape=(-1, model.embed))
        put(f"h.{i}.ln_2", layer["feedforward_norm"], "scale")
        put(f"h.{i}.mlp.c_fc", feedforward["up"], shape=(model.embed, -1))
        put(f"h.{i}.mlp.c_proj", feedforward["down"], shape=(-1, model.embed))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": model.vocab, "n_positions": model.context,
        "n_embd": model.embed, "n_layer": model.layers, "n_head": model.heads, "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def work(contender: str, size: str, folder: str) -> None:
    """A contender's process: answers `tokens` with its continuation, `time` with the seconds of one call."""
    new, ids = SIZES[size][5], prompt(size)
    if contender == "lmx":
        from lmx.infer.dense import continued
        from lmx.infer.weights import decoding_params

        model, params = random_model(size)
        params = decoding_params(params)

        def call() -> list[int]:
            return continued(model, params, [ids], max_new_tokens=new)[0]
    else:
        import torch
        import transformers

        torch.set_num_threads(1 if "one thread" in contender else os.cpu_count())
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = torch.tensor([ids])
        options = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(tokens)}

        def call() -> list[int]:
            return model.generate(tokens, **options)[0, PROMPT:].tolist()

    call()
    serve(lambda request: call() if request == "tokens" else timed(call))


def compare(size: str, peer_python: str, rounds: int) -> tuple[list[Contender], dict[str, int]]:
    """All contenders after taking turns, and how many tokens of each present one are lmx's before the first that differs."""
    with tempfile.TemporaryDirectory() as folder:
        write_gpt2(Path(folder), size)
        pythons = {name: sys.executable if name == "lmx" else peer_python for name in CONTENDERS}
        contenders = [Contender(name, pythons[name], "experiments.bench.sampling", name, size, folder) for name in CONTENDERS]
    present = [contender for contender in contenders if not contender.absent]
    texts = {contender.name: contender.ask("tokens") for contender in present}
    for _ in range(rounds):
        for contender in present:
            contender.run("time")
    for contender in contenders:
        contender.close()
    assert all(len(text) == SIZES[size][5] for text in texts.values()), "a continuation stopped early"
    same = {name: [a == b for a, b in zip(text, texts.get("lmx", text), strict=True)] for name, text in texts.items()}
    return contenders, {name: (*equal, False).index(False) for name, equal in same.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=3, metavar=("CONTENDER", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    print(cpu_name())
    print("| size | sampled by | tokens/s, median | best | lmx / it, by medians | tokens equal |\n| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        contenders, equal = compare(size, options.peer_python, options.rounds)
        new, ours = SIZES[size][5], contenders[0]
        if ours.absent:
            sys.exit(f"lmx: {ours.absent}")
        for contender in contenders:
            if contender.absent:
                print(f"| {size} | {contender.name} | absent: {contender.absent} | | | |", flush=True)
                continue
            median, best = statistics.median(contender.seconds), min(contender.seconds)
            ratio, same = median / statistics.median(ours.seconds), f"{equal[contender.name]} of {new}"
            print(f"| {size} | {contender.name} | {new / median:,.1f} | {new / best:,.1f} | {ratio:.2f} | {same} |", flush=True)
    return None


if __name__ == "__main__":
    main()
