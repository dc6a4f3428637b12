"""Two tiny decoders with random weights, as checkpoints: for `make_beams.py`, which asks transformers, and for the test, which asks lmx."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, WIDTH, LAYERS, CONTEXT = 40, 24, 2, 64
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT},
    "llama": {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
    },
}  # fmt: skip


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint."""
    wide = (WIDTH,)
    if name == "gpt2":
        each = {"ln_1.weight": wide, "ln_1.bias": wide, "ln_2.weight": wide, "ln_2.bias": wide}
        for part, inputs, outputs in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
            each |= {f"{part}.weight": (inputs * WIDTH, outputs * WIDTH), f"{part}.bias": (outputs * WIDTH,)}
        ends = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (CONTEXT, WIDTH), "ln_f.weight": wide, "ln_f.bias": wide}
        lead = "transformer."
        return {lead + end: shape for end, shape in ends.items()} | {
            f"{lead}h.{layer}.{part}": shape for layer in range(LAYERS) for part, shape in each.items()
        }
    each = {"input_layernorm.weight": wide, "post_attention_layernorm.weight": wide}
    for part, outputs in (("q_proj", WIDTH), ("k_proj", WIDTH // 2), ("v_proj", WIDTH // 2), ("o_proj", WIDTH)):
        each[f"self_attn.{part}.weight"] = (outputs, WIDTH)
    each |= {"mlp.gate_proj.weight": (32, WIDTH), "mlp.up_proj.weight": (32, WIDTH), "mlp.down_proj.weight": (WIDTH, 32)}
    ends = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": wide, "lm_head.weight": (VOCAB, WIDTH)}
    return ends | {f"model.layers.{layer}.{part}": shape for layer in range(LAYERS) for part, shape in each.items()}


def write(name: str, folder: Path) -> None:
    """A checkpoint's folder."""
    rng = np.random.default_rng(sum(map(ord, name)))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tensor, shape in sorted(shapes(name).items()):
        noise = rng.normal(size=shape)
        about = float(tensor.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")))
        scale = 0.12 if tensor.endswith(("wte.weight", "lm_head.weight")) else 0.35
        tensors[tensor] = (about + 0.2 * noise if len(shape) == 1 else scale * noise).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))))
