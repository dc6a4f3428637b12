"""Attention weights as transformers computes them: run by hand, not by pytest.

    python tests/interop/make_attentions.py GOLDENS

For the cases of `CASES`, those that lie with the tests and those of the folder GOLDENS (the shared reference cases): the inputs of each case's
golden.safetensors through its checkpoint, in fp32 with eager attention on a CPU. tests/data_files/attentions/CASE.safetensors then has
`attentions.LAYER`, or `encoder_attentions.LAYER`, `decoder_attentions.LAYER` and `cross_attentions.LAYER`, each `[batch, heads, queries, keys]`.
Needs torch and transformers of version 5, which lmx itself does not.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
DATA = HERE.parent / "data_files"
CASES = ("gpt2", "bloom", "gemma2", "mixtral", "t5", "bart", "bert", "albert")
"""Of the shared ones."""
OWN = (*(DATA / "interop" / name for name in ("gptj", "gemma3", "falcon_7b")), HERE / "encoders" / "roberta_masked")


def write(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    golden = load_file(folder / "golden.safetensors")
    inputs = {name.removeprefix("input."): a.long() for name, a in golden.items() if name.startswith("input.") and name != "input.prompt"}
    with torch.no_grad():
        found = model(**inputs, output_attentions=True)
    kept = {f"{name}.{i}": a.contiguous() for name in found if name.endswith("attentions") for i, a in enumerate(found[name])}
    target = DATA / "attentions" / f"{folder.name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file(kept, target)
    print(f"{folder.name}: {target.stat().st_size / 1000:.0f} kB, {sorted(kept)}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for folder in (*(Path(sys.argv[1]) / name for name in CASES), *OWN):
        write(folder)
