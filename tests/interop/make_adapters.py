"""Reference cases of adapters, as PEFT computes them: run by hand, not by pytest.

    python tests/interop/make_adapters.py write SHARED [CASE ...]
    python tests/interop/make_adapters.py check SHARED FOLDER

`write` makes the folders of tests/data_files/interop/adapters: an adapter with random numbers over one of the small checkpoints of
tests/data_files/interop or SHARED/goldens (`base` of golden.json says which), and what PEFT gives in fp32 on a CPU. Names of tensors in
golden.safetensors: `input.*`, `logits`, `loss`; of virtual tokens also `input.prompt`, `greedy` and `greedy_logits` (6 tokens and 6 more, token 2
never chosen). The second row is padded, on the left where tokens are virtual and on the right elsewhere and in what no decoder reads.

`check` loads what lmx has written of each case and of those of SHARED/goldens/peft, which are over its `llama` (FOLDER/CASE, by
`write_exports.py`), and compares its logits with the golden ones. Exits with 1 where they differ by more than 1e-5.
Needs torch, transformers 5 and peft, which lmx itself does not.
"""

import json
import re
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent.parent / "data_files" / "interop"
END = 2
CAUSAL, CLASSES, PAIRS = "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"
MODELS = {
    CAUSAL: transformers.AutoModelForCausalLM, CLASSES: transformers.AutoModelForSequenceClassification, PAIRS: transformers.AutoModelForSeq2SeqLM,
}  # fmt: skip


def lora(**settings):
    return peft.LoraConfig(r=2, lora_alpha=5, lora_dropout=0.1, **settings)


CASES = {
    "gpt2_biases": ("gpt2", CAUSAL, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="all")),
    "gpt2_dora": ("gpt2", CAUSAL, lora(target_modules=["c_attn", "mlp.c_fc"], use_dora=True, bias="lora_only", layers_to_transform=[1])),
    "gpt2_embeddings": ("gpt2", CAUSAL, lora(target_modules=["wte", "wpe", "c_fc"])),
    "gpt2_ia3": ("gpt2", CAUSAL, peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "gpt2_prefix": ("gpt2", CAUSAL, peft.PrefixTuningConfig(num_virtual_tokens=3)),
    "gpt2_prompt": ("gpt2", CAUSAL, peft.PromptTuningConfig(num_virtual_tokens=3)),
    "llama_patterns": ("llama", CAUSAL, lora(target_modules=r".*(q|up)_proj", rank_pattern={"q_proj": 3, r"layers.1.mlp.up_proj": 1},
                       alpha_pattern={r"model.layers.2.self_attn.q_proj": 7}, use_rslora=True)),
    "llama_layers": ("llama", CAUSAL, lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers")),
    "llama_linear": ("llama", CAUSAL, lora(target_modules="all-linear", exclude_modules=["k_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "llama_head": ("llama", CAUSAL, lora(target_modules=["lm_head", "model.layers.1.self_attn.o_proj", "embed_tokens"], use_dora=True)),
    "llama_projected": ("llama", CAUSAL, peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8,
                        num_attention_heads=2, token_dim=24)),
    "gemma_table": ("gemma", CAUSAL, lora(target_modules=["embed_tokens", "o_proj"])),
    "gemma_head": ("gemma", CAUSAL, lora(target_modules=["lm_head", "gate_proj"])),
    "gemma_saved": ("gemma", CAUSAL, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "gemma2_prefix": ("gemma2", CAUSAL, peft.PrefixTuningConfig(num_virtual_tokens=5)),
    "gemma_prompt": ("gemma", CAUSAL, peft.PromptTuningConfig(num_virtual_tokens=3)),
    "bloom_fused": ("bloom", CAUSAL, lora(target_modules=["query_key_value"], rank_pattern={r"h.1.*": 3})),
    "bloom_prefix": ("bloom", CAUSAL, peft.PrefixTuningConfig(num_virtual_tokens=3)),
    "opt_prompt": ("opt", CAUSAL, peft.PromptTuningConfig(num_virtual_tokens=3)),
    "opt_prefix": ("opt", CAUSAL, peft.PrefixTuningConfig(num_virtual_tokens=3)),
    "phi3_fused": ("phi3", CAUSAL, lora(target_modules="all-linear", use_dora=True)),
    "bert_classes": ("bert_classifier", CLASSES, lora(target_modules=["query", "value"], bias="lora_only")),
    "bert_prompt": ("bert_classifier", CLASSES, peft.PromptTuningConfig(num_virtual_tokens=3)),
    "t5_lora": ("t5", PAIRS, lora(target_modules=["q", "v", "wo"])),
    "t5_prompt": ("t5", PAIRS, peft.PromptTuningConfig(num_virtual_tokens=3)),
    "t5_prefix": ("t5", PAIRS, peft.PrefixTuningConfig(num_virtual_tokens=3, token_dim=64)),
}  # fmt: skip


GRADIENTS = (
    "gpt2_dora",
    "gpt2_ia3",
    "gpt2_prefix",
    "gpt2_prompt",
    "llama_patterns",
    "gemma_table",
    "bloom_fused",
    "bert_classes",
    "t5_prefix",
)
"""Cases of which gradients are kept."""


def base(shared: Path, name: str) -> Path:
    return HERE / name if (HERE / name).exists() else shared / "goldens" / name


def loaded(shared: Path, name: str, task: str):
    return MODELS[task].from_pretrained(base(shared, name), attn_implementation="eager", dtype=torch.float32).eval()


def greedy(model, prompt: torch.Tensor, task: str) -> dict[str, torch.Tensor]:
    """By a forward of the whole text for each token: PEFT's generate (0.21, with transformers 5.24) disagrees with its forward."""
    logits, text = [], prompt if task == CAUSAL else torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(6):
        inputs = {"input_ids": text} if task == CAUSAL else {"input_ids": prompt, "decoder_input_ids": text}
        row = model(**inputs).logits[:, -1]
        logits.append(row)
        allowed = row.clone()
        allowed[:, END] = -torch.inf
        text = torch.cat([text, allowed.argmax(-1, keepdim=True)], 1)
    return {"input.prompt": prompt, "greedy": text[0, -6:], "greedy_logits": torch.cat(logits)}


def gradients(model, inputs, names: set[str]) -> dict[str, torch.Tensor]:
    model(**inputs).loss.backward()
    found = {}
    for name, value in model.named_parameters():
        name = "prompt_embeddings" if name.startswith("prompt_encoder") else re.sub(r"\.(default|modules_to_save)\b", "", name)
        name = name.replace("_vector.weight", "_vector")
        if name in names and ".base_layer.weight" not in name:
            found[f"grad.{name}"] = value.grad
    return found


def write(shared: Path, case: str) -> None:
    name, task, config = CASES[case]
    torch.manual_seed(len(case))
    config.task_type, config.inference_mode = task, False
    model = peft.get_peft_model(loaded(shared, name, task), config).eval()
    for key, value in model.named_parameters():
        if value.requires_grad:
            about = value.data if value.ndim == 1 or "ia3" in key else 0.0
            learned = ("lora_", "prompt_encoder", "ia3")
            value.data = about + torch.randn(value.shape) * (0.3 if any(word in key for word in learned) else 0.1)
    folder = HERE / "adapters" / case
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    said = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(said.get(field), list):
            said[field] = sorted(said[field])
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")

    model = peft.PeftModel.from_pretrained(loaded(shared, name, task), folder).eval().requires_grad_(case in GRADIENTS)
    vocab = model.config.vocab_size
    inputs = {"input_ids": torch.randint(3, vocab, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    inputs["attention_mask"][1, :3] = 0
    if task == CLASSES:
        inputs |= {"token_type_ids": torch.tensor([[0] * 5 + [1] * 3] * 2), "labels": torch.tensor([1, 0])}
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    elif task == PAIRS:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        inputs["labels"] = torch.randint(3, vocab, (2, 5))
    else:
        if not isinstance(config, peft.PromptLearningConfig):
            inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
        inputs["labels"][1, 3] = -100  # padding may stand before it
    out = model(**inputs)
    golden = {f"input.{key}": value for key, value in inputs.items()} | {"logits": out.logits, "loss": out.loss}
    if case in GRADIENTS:
        golden |= gradients(model, inputs, set(load_file(folder / "adapter_model.safetensors")))
    if isinstance(config, peft.PromptLearningConfig) and task != CLASSES:
        golden |= greedy(model, inputs["input_ids"][:1, :6], task)
    kept = {key: (a.int() if a.dtype == torch.int64 else a).detach().clone().contiguous() for key, a in golden.items()}
    save_file(kept, folder / "golden.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{case}: {size / 1000:.0f} kB, spread {out.logits.std():.2f}, loss {out.loss:.3f}, {sorted(load_file(folder / 'adapter_model.safetensors'))}"
    )


def check(shared: Path, folder: Path) -> bool:
    known = {case: (HERE / "adapters" / case, name, task) for case, (name, task, _) in CASES.items()}
    known |= {source.name: (source, "llama", CAUSAL) for source in sorted((shared / "goldens" / "peft").iterdir())}
    worst = 0.0
    for case, (source, name, task) in known.items():
        golden = load_file(source / "golden.safetensors")
        inputs = {key.removeprefix("input."): a.long() for key, a in golden.items() if key.startswith("input.") and key != "input.prompt"}
        found = peft.PeftModel.from_pretrained(loaded(shared, name, task), folder / case).eval()(**inputs).logits
        apart = float((found - golden["logits"]).abs().max() / golden["logits"].abs().max())
        print(f"{case}: max|a-b|/max|b| = {apart:.1e}")
        worst = max(worst, apart)
    return worst < 1e-5


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1] == "write":
        for one in sys.argv[3:] or CASES:
            write(Path(sys.argv[2]), one)
    else:
        sys.exit(not check(Path(sys.argv[2]), Path(sys.argv[3])))
