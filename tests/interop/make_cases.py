"""Reference cases of decoder families, as transformers computes them: run by hand, not by pytest.

    python tests/interop/make_cases.py [CASE ...]

Makes the folders of tests/data_files/interop: tiny checkpoints with random weights, norms and biases among them, and what
transformers gives for them in fp32 with eager attention on a CPU. Names of tensors in golden.safetensors:

    input.input_ids, input.attention_mask, input.labels   int32 [2, 12]; the second row is padded on the right from position 8
    logits, hidden_states.N, last_hidden_state, loss       of these
    grad.NAME                                              of the loss, by the checkpoint's tensor NAME, in its layout
    input.prompt, greedy, greedy_logits                    6 tokens and 8 more, token 2 never chosen, and the logits before each
    greedy_uncached, greedy_uncached_logits                the same without a cache, where RoPE depends on the length

`check_exports.py` compares what transformers computes with lmx's exports of them. Needs torch and transformers of version 5, which lmx itself
does not.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent.parent / "data_files" / "interop"
END = 2
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0,
}  # fmt: skip
NARROW = SIZES | {"hidden_size": 20, "head_dim": 6}
"""Heads that do not add up to the width."""
WITHOUT_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
FALCON = {name: size for name, size in WITHOUT_GROUPS.items() if name != "intermediate_size"}
MOE = NARROW | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10,
}  # fmt: skip
SHORT, LONG = [1.0, 1.3, 2.0], [1.2, 3.0, 5.0]
CASES = {
    "qwen2": ("qwen2", SIZES),
    "qwen2_window": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", NARROW),
    "qwen3_bias": ("qwen3", NARROW | {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", MOE),
    "qwen2_moe_mixed": ("qwen2_moe", MOE | {"num_hidden_layers": 3, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe_only": ("qwen2_moe", MOE | {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 4}),
    "gemma3": ("gemma3_text", NARROW | {"num_hidden_layers": 3, "sliding_window": 4, "query_pre_attn_scalar": 9,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
               "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    "phi3": ("phi3", SIZES | {"sliding_window": 5}),
    "phi3_partial": ("phi3", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.7}}),
    "phi3_longrope": ("phi3", SIZES | {"original_max_position_embeddings": 10,
                      "rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": SHORT, "long_factor": LONG}}),
    "gpt_neox": ("gpt_neox", WITHOUT_GROUPS | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.7}}),
    "gpt_neox_series": ("gpt_neox", WITHOUT_GROUPS | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
                        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.4}}),
    "gptj": ("gptj", {"vocab_size": 40, "n_embd": 24, "n_inner": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 32,
             "bos_token_id": 1, "eos_token_id": END}),
    "falcon_7b": ("falcon", FALCON | {"ffn_hidden_size": 16}),
    "falcon_40b": ("falcon", FALCON | {"ffn_hidden_size": 16, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon_11b": ("falcon", FALCON | {"ffn_hidden_size": 16, "new_decoder_architecture": True, "num_kv_heads": 2,
                   "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
    "falcon_rw": ("falcon", FALCON | {"ffn_hidden_size": 16, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "olmo2": ("olmo2", SIZES),
    "glm4": ("glm4", NARROW | {"head_dim": 8}),
    "stablelm": ("stablelm", SIZES | {"use_qkv_bias": True, "partial_rotary_factor": 0.7}),
    "stablelm_parallel": ("stablelm", SIZES | {"use_parallel_residual": True, "partial_rotary_factor": 0.7, "tie_word_embeddings": True}),
    "cohere": ("cohere", SIZES | {"logit_scale": 0.3, "attention_bias": True}),
    "llama_linear": ("llama", NARROW | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama_dynamic": ("llama", NARROW | {"max_position_embeddings": 9,
                      "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}}),
    "llama_yarn": ("llama", NARROW | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0,
                   "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 0.1}}),
    "llama_llama3": ("llama", NARROW | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0,
                     "original_max_position_embeddings": 16, "low_freq_factor": 0.5, "high_freq_factor": 2.0}}),
}  # fmt: skip
TABLES = ("embed_tokens", "embed_in", "word_embeddings", "wte")
MATRICES = ("q_proj", "qkv_proj", "query_key_value", "down_proj", "4h_to_h", "fc_out", "mlp.gate.", "shared_expert_gate")
"""Whose gradients are kept, of the last layer."""
GROWING = ("dynamic", "longrope")
"""RoPE that depends on the length."""


def fresh(folder: Path):
    """A model as a checkpoint has it; RoPE remembers lengths it has seen, so each use takes its own. Transformers' eager attention of Falcon adds
    ALiBi twice, once in the mask (5.24); its default one once, as the paper and earlier versions do."""
    eager = "sdpa" if folder.name == "falcon_rw" else "eager"
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=eager, experts_implementation="eager", dtype=torch.float32
    ).eval()


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            about = 0.0 if name.endswith("bias") or model.config.model_type.startswith("gemma") else 1.0
            value.data = about + 0.3 * noise
        else:
            table = any(word in name for word in TABLES)
            value.data = noise * ((0.3 if model.config.tie_word_embeddings else 1.0) if table else 1.2 * value.shape[-1] ** -0.5)


def greedy(folder: Path, prompt: torch.Tensor, *, cached: bool):
    found = fresh(folder).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, suppress_tokens=[END], use_cache=cached,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    logits = torch.stack(found.logits, 1)
    allowed = logits.clone()
    allowed[..., END] = -torch.inf
    best = allowed.topk(2, -1).values
    if (best[..., 0] - best[..., 1]).min() < 2e-3 or len(found.sequences[0, 6:].unique()) < 4:
        raise PoorError
    return found.sequences.int(), logits


def gradients(model, there: set[str]) -> dict[str, torch.Tensor]:
    """Of all vectors, the embeddings, and some matrices of the last layer."""
    found, last = {}, f".{model.config.num_hidden_layers - 1}."
    for name, value in model.named_parameters():
        if name.endswith("experts.down_proj"):
            found[name.replace("down_proj", "1.down_proj.weight")] = value.grad[1]
        elif value.ndim == 1 or any(word in name for word in TABLES) or (last in name and any(word in name for word in MATRICES)):
            found[name] = value.grad
    return {f"grad.{name}": grad.contiguous() for name, grad in found.items() if name in there}


class PoorError(Exception):
    """Rounding might choose another token, or it is nearly always the same."""


def write(name: str, seed: int) -> None:
    kind, settings = CASES[name]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(made, seed)
    made.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    ids = torch.randint(3, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where(mask == 1, ids, -100)
    model = fresh(folder)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    out.loss.backward()
    golden = {"input.input_ids": ids, "input.attention_mask": mask, "input.labels": labels, "logits": out.logits, "loss": out.loss}
    golden |= {f"hidden_states.{i}": hidden for i, hidden in enumerate(out.hidden_states)} | {"last_hidden_state": out.hidden_states[-1]}
    golden |= gradients(model, set(load_file(folder / "model.safetensors")))
    golden["input.prompt"] = ids[:1, :6]
    golden["greedy"], golden["greedy_logits"] = greedy(folder, ids[:1, :6], cached=True)
    if (json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}).get("rope_type") in GROWING:
        golden["greedy_uncached"], golden["greedy_uncached_logits"] = greedy(folder, ids[:1, :6], cached=False)
    kept = {n: (a.int() if a.dtype == torch.int64 else a).detach().clone().contiguous() for n, a in golden.items()}
    save_file(kept, folder / "golden.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{name}: {size / 1000:.0f} kB, logits' spread {out.logits.std():.2f}, loss {out.loss:.3f}, greedy {golden['greedy'][0, 6:].tolist()}"
    )


def written(cases: Iterable[str], write: Callable[[str, int], None]) -> None:
    """Each case with the first seed that does."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in cases:
        for seed in range(99):
            try:
                write(case, seed)
                break
            except PoorError:
                continue


if __name__ == "__main__":
    written(sys.argv[1:] or CASES, write)
