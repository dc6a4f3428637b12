"""Loading a checkpoint of a billion parameters over eight simulated devices: seconds against safetensors' own read, and the host's memory.

    python -m experiments.bench.loading [--layers 16]

A random checkpoint of Llama's shapes in bf16 is written to a temporary folder, as several files, and loaded as each of eight devices' parts
(ZeRO-3 and tensor parallelism). Memory is what the process has that is no file's (RssAnon), at its most, less what it had before; simulated
devices hold their parts in it too, which is subtracted. Read times are of files that are in the system's cache already, best of three.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

WIDTH, MLP, HEADS, KEY_HEADS, VOCAB = 2048, 8192, 32, 8, 32000


def write(folder: Path, layers: int, shard: int) -> int:
    """Writes the checkpoint; gives its bytes."""
    from lmx.interop.checkpoint import Model, Names, read_config
    from lmx.interop.files import write_tensors

    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    model: Model = read_config(folder)
    key = WIDTH // HEADS * KEY_HEADS
    shapes = {"k_proj": (key, WIDTH), "v_proj": (key, WIDTH), "gate_proj": (MLP, WIDTH), "up_proj": (MLP, WIDTH), "down_proj": (WIDTH, MLP)}
    shapes |= {"q_proj": (WIDTH, WIDTH), "o_proj": (WIDTH, WIDTH), "embed_tokens": (VOCAB, WIDTH), "lm_head": (VOCAB, WIDTH)}
    tensors, rng = {}, np.random.default_rng(0)
    for name in Names(model).all():
        shape = shapes.get(name.split(".")[-2], (WIDTH,))
        tensors[name] = (shape, ml_dtypes.bfloat16, lambda shape=shape: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
    write_tensors(folder, tensors, shard)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Peak:
    """The most memory that is no file's while it is entered, in bytes, above what there was."""

    def __enter__(self) -> "Peak":
        self._done, self.before = threading.Event(), self._now()
        self.most = self.before
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, self._now()) - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="16: 1.1 billion parameters")
    parser.add_argument("--shard", type=int, default=5 * 10**8, help="bytes of a file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from safetensors import safe_open

    from lmx import interop
    from lmx.parallel.layout import Layout, make_mesh

    layout = Layout(fsdp=4, tensor=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder, options.layers, options.shard)
        reads = []
        for _ in range(3):
            start = time.perf_counter()
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "flax") as file:
                    for tensor in file.keys():  # noqa: SIM118 (no dict)
                        jax.block_until_ready(file.get_tensor(tensor))
            reads.append(time.perf_counter() - start)
        with Peak() as peak:
            start = time.perf_counter()
            _, params = interop.load(folder, dtype=ml_dtypes.bfloat16, mesh=make_mesh(layout), layout=layout)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - start
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    largest = max(max(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in jax.tree.leaves(params))
    print(f"{size / 1e9:.2f} GB on disk; devices hold {held / 1e9:.2f} GB")
    print(f"loaded in {seconds:.2f} s; safetensors reads every tensor in {min(reads):.2f} s: {seconds / min(reads):.2f} times")
    print(
        f"host memory beside what devices hold: {(peak.most - held) / 1e6:.0f} MB at most; the largest part of a parameter that a device has is "
        f"{largest / 1e6:.0f} MB, a file {options.shard / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
