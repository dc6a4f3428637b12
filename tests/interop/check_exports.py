"""Whether transformers computes with lmx's exports what it computed with their originals: run by hand, not by pytest.

    python tests/interop/check_exports.py FOLDER

FOLDER is what `write_exports.py` wrote. Every case there is loaded by the class that its config.json names, in fp32 with eager attention on a CPU;
that no tensor is missing or too much is checked, and all its outputs (logits, every hidden state, loss ...) are compared with golden.safetensors at
tokens that are no padding. Printed is the worst max|a-b|/max|b|, by case and by family. The versions of RWKV that transformers lacks are compared
with their originals tensor by tensor instead. Exits with 1 where one is above 1e-5. Needs torch and transformers of version 5, which lmx itself
does not.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

DATA = Path(__file__).parent.parent / "data_files"
CLOSE = 1e-5
UNUSED = {"cls.predictions.bias"}
"""Of an untied BERT, which nothing adds."""
SIDES = {"vision_model_output": "image.", "text_model_output": "text."}


def loaded(folder: Path, config: dict):
    """The model, and what transformers says of tensors. Its eager attention of Falcon adds ALiBi twice, once in the mask (5.24); its default one
    once, as the paper and earlier versions do."""
    kind = getattr(transformers, config["architectures"][0])
    more = {"experts_implementation": "eager"} if config["model_type"] in ("mixtral", "qwen2_moe") else {}
    attention = "sdpa" if config.get("alibi") else "eager"
    model, said = kind.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True, **more)
    return model.eval(), {kind: names for kind, names in said.items() if names}


def flat(outputs, lead: str = "") -> dict[str, torch.Tensor]:
    """`hidden_states.1`, `image.pooler_output` ..."""
    found = {}
    for key, value in outputs.items():
        if key in SIDES:
            found |= flat(value, SIDES[key])
        elif isinstance(value, torch.Tensor):
            found[lead + key] = value
        elif key.endswith("hidden_states"):
            found |= {f"{lead}{key}.{i}": hidden for i, hidden in enumerate(value)}
    return found


def worst(model, golden: dict[str, torch.Tensor]) -> tuple[float, int]:
    """max|a-b|/max|b| of the output that differs most, and how many outputs there are."""
    given = {name.removeprefix("input."): a for name, a in golden.items() if name.startswith("input.") and name != "input.prompt"}
    given = {name: a.long() if a.dtype == torch.int32 else a for name, a in given.items()}
    if "return_loss" in given:
        given["return_loss"] = bool(given["return_loss"])
    real = given["attention_mask"] == 1 if "attention_mask" in given else None
    with torch.no_grad():
        found = flat(model(**given, output_hidden_states=True))
    expected = {name: a for name, a in golden.items() if name in found}
    assert expected, f"none of {sorted(found)} is known"
    apart = []
    for name, exact in expected.items():
        exact = exact.reshape(found[name].shape)  # a number may be stored as one of a list
        rows = real if real is not None and exact.shape[:2] == real.shape else ...
        apart.append(float((found[name][rows] - exact[rows]).abs().max() / exact[rows].abs().max()))
    return max(apart), len(apart)


def same(folder: Path) -> tuple[float, int]:
    """0 where every tensor is that of the original, bit by bit."""
    before, after = (load_file(one / "model.safetensors") for one in (DATA / "interop" / folder.name, folder))
    assert set(before) == set(after)
    return 0.0 if all(torch.equal(before[name], after[name]) for name in before) else float("inf"), len(before)


def check(exports: Path) -> bool:
    families = defaultdict(list)
    for path in sorted(exports.glob("*/golden.safetensors")):
        folder = path.parent
        config = json.loads((folder / "config.json").read_text())
        if hasattr(transformers, config["architectures"][0]):
            model, said = loaded(folder, config)
            apart, count = worst(model, load_file(path))
            print(f"{folder.name}: max|a-b|/max|b| = {apart:.1e} in {count} outputs{f', {said}' if said else ''}")
        else:
            (apart, count), said = same(folder), {}
            print(f"{folder.name}: transformers has no {config['architectures'][0]}; {count} tensors as they were: {apart == 0}")
        unused = all(names <= UNUSED for names in said.values())
        families[config["model_type"]].append(apart if unused else float("inf"))
    print("\n| family | cases | worst max\\|a-b\\|/max\\|b\\| |\n| --- | --- | --- |")
    for family, found in sorted(families.items()):
        print(f"| {family} | {len(found)} | {max(found):.1e} |")
    return all(max(found) < CLOSE for found in families.values())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(not check(Path(sys.argv[1])))
