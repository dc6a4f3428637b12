"""Reference cases of RWKV-5, 6 and 7, as the code that their published checkpoints come with computes them: run by hand, not by pytest.

    python tests/interop/make_rwkv_cases.py FOLDER [VERSION ...]

FOLDER has the files modeling_rwkv5.py, configuration_rwkv5.py and those of 6 (BBuf/RWKV-World-HF-Tokenizer, whence the checkpoints'), as a
package without what stands in the way of gradients on a CPU: the import of flash_rwkv, `with torch.no_grad()` around the state, and its writing
in place. Its modeling_rwkv7.py has flash-linear-attention's RWKV7Config and RWKV7ForCausalLM as Rwkv7Config and Rwkv7ForCausalLM, with plain
torch in place of the kernels that its layer and its token shift call. Names of tensors in golden.safetensors are those of make_cases.py. Needs
torch and transformers.
"""

import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "data_files" / "interop"
END = 2
KEPT = ("blocks.1.attention", "layers.1.attn", "layers.0.attn.v_proj", "embed")
"""Whose gradients are kept."""
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "head_size": 8, "attention_hidden_size": 16, "head_size_divisor": 4}
GOOSE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 32, "decay_low_rank_dim": 5}
GOOSE |= {
    "a_low_rank_dim": 3,
    "v_low_rank_dim": 2,
    "gate_low_rank_dim": 4,
    "fuse_norm": False,
    "fuse_cross_entropy": False,
    "use_l2warp": False,
}


def made(package: str, version: int, seed: int):
    module = importlib.import_module(f"{package}.modeling_rwkv{version}")
    config = getattr(module, f"Rwkv{version}Config")(**(GOOSE if version == 7 else SIZES), bos_token_id=0, eos_token_id=END, pad_token_id=0)
    model = getattr(module, f"Rwkv{version}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        shape = (1, 1, 16) if version == 6 and name.endswith("time_decay") else value.shape  # as checkpoints have it
        noise = torch.randn(shape, generator=generator)
        if ("time_maa_w" in name and value.ndim > 1 and 1 not in shape) or "decay_w" in name:
            value.data = 0.3 * noise
        elif name.endswith(("time_decay", "lora.2.bias")):
            value.data = noise
        elif value.ndim == 1 or 1 in shape or name.endswith("faaaa"):
            value.data = (0.0 if name.endswith("bias") else 0.6) + 0.3 * noise
        else:
            value.data = noise * (1.0 if "embeddings" in name else 1.2 * shape[-1] ** -0.5)
    return model


def write(package: str, version: int, seed: int) -> bool:
    model, folder = made(package, version, seed), HERE / f"rwkv{version}"
    torch.manual_seed(seed)
    ids = torch.randint(3, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where(mask == 1, ids, -100)
    out = model(input_ids=ids, labels=labels, output_hidden_states=True)
    out.loss.backward()
    text, logits = ids[:1, :6], []
    with torch.no_grad():
        for _ in range(8):
            scores = model(input_ids=text).logits[:, -1]
            logits.append(scores.clone())
            scores[:, END] = -torch.inf
            best = scores.topk(2).values
            if best[0, 0] - best[0, 1] < 2e-3:
                return False
            text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
    golden = {"input.input_ids": ids, "input.attention_mask": mask, "input.labels": labels, "logits": out.logits, "loss": out.loss}
    golden |= {f"hidden_states.{i}": hidden for i, hidden in enumerate(out.hidden_states)} | {"last_hidden_state": out.hidden_states[-1]}
    golden |= {f"grad.{name}": value.grad for name, value in model.named_parameters() if any(word in name for word in KEPT)}
    golden |= {"input.prompt": ids[:1, :6], "greedy": text, "greedy_logits": torch.stack(logits, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    kept = {n: (a.int() if a.dtype == torch.int64 else a).detach().clone().contiguous() for n, a in golden.items()}
    save_file(kept, folder / "golden.safetensors")
    print(f"rwkv{version}: logits' spread {out.logits.std():.2f}, loss {out.loss:.3f}, greedy {text[0, 6:].tolist()}")
    return len(text[0, 6:].unique()) > 3


if __name__ == "__main__":
    given = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(given.parent))
    for number in map(int, sys.argv[2:] or (5, 6, 7)):
        next(seed for seed in range(99) if write(given.name, number, seed))
