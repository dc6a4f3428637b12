"""Reference cases of models that see, as transformers computes them: run by hand, not by pytest.

    python tests/interop/make_image_cases.py [CASE ...]

Makes the folders of tests/data_files/images: tiny checkpoints with random weights, norms and biases among them, and what
transformers gives for them in fp32 with eager attention on a CPU. Names of tensors in golden.safetensors:

    input.*                                 what the model reads; a second text is padded on the right
    OUTPUT, OUTPUT.N, image.OUTPUT, ...     outputs; of tuples each; of CLIP those of each tower
    cotangent.pooler_output                 of a model without a loss: its gradients are those of the sum of this times that output
    grad.NAME                               by the checkpoint's tensor NAME, in its layout
    batch.*                                 greedy continuations of a LLaVA's prompts, padded on the left, token 2 never chosen

`check_exports.py` compares what transformers computes with lmx's exports of them. Needs torch and transformers of version 5, which lmx itself
does not.
"""

import sys
from pathlib import Path

import torch
import transformers
from make_cases import PoorError, written
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent.parent / "data_files" / "images"
END, IMAGE, STEPS = 2, 5, 6
SEES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
READS = {
    "vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 12, "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39,
}  # fmt: skip
DECODES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0,
}  # fmt: skip
SLIM = DECODES | {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


def clip(text: dict, vision: dict, **more):
    return transformers.CLIPConfig(text_config=READS | text, vision_config=SEES | vision, **more)


def llava(text, vision: dict, kind=transformers.CLIPVisionConfig, **more):
    seen = kind(**SEES | vision)
    return transformers.LlavaConfig(text_config=text, vision_config=seen, image_token_index=IMAGE, **more)


CASES = {
    "vit_oblong": ("ViTModel", transformers.ViTConfig(**SEES | {"image_size": [9, 12], "patch_size": [4, 3]}, num_channels=1, qkv_bias=False,
                   hidden_act="gelu_new", layer_norm_eps=1e-3, pooler_output_size=10, pooler_act="relu")),
    "vit_regression": ("ViTForImageClassification", transformers.ViTConfig(**SEES, num_labels=1, num_channels=2)),
    "vit_several": ("ViTForImageClassification", transformers.ViTConfig(**SEES, num_labels=4, problem_type="multi_label_classification")),
    "clip": ("CLIPModel", clip({}, {}, projection_dim=10)),
    "clip_old": ("CLIPModel", clip({"eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"image_size": 10, "hidden_act": "gelu",
                 "layer_norm_eps": 1e-2}, projection_dim=6, logit_scale_init_value=2.0)),
    "clip_vision": ("CLIPVisionModel", transformers.CLIPVisionConfig(**SEES)),
    "clip_vision_projection": ("CLIPVisionModelWithProjection", transformers.CLIPVisionConfig(**SEES, projection_dim=6)),
    "clip_text": ("CLIPTextModel", transformers.CLIPTextConfig(**READS)),
    "clip_text_projection": ("CLIPTextModelWithProjection", transformers.CLIPTextConfig(**READS | {"eos_token_id": 2}, projection_dim=6)),
    "llava_qwen": ("LlavaForConditionalGeneration", llava(transformers.Qwen2Config(**DECODES), {"num_hidden_layers": 3},
                   vision_feature_layer=[1, -2, 0], vision_feature_select_strategy="full", projector_hidden_act="relu")),
    "llava_mistral": ("LlavaForConditionalGeneration", llava(transformers.MistralConfig(**SLIM, sliding_window=6), {},
                      vision_feature_layer=-1, multimodal_projector_bias=False)),
    "llava_siglip": ("LlavaForConditionalGeneration", llava(transformers.LlamaConfig(**SLIM), {"vision_use_head": False},
                     transformers.SiglipVisionConfig, vision_feature_layer=-1, vision_feature_select_strategy="full")),
    "llava_gemma": ("LlavaForConditionalGeneration", llava(transformers.GemmaConfig(**SLIM), {}, vision_feature_layer=-3)),
}  # fmt: skip
GRADED, CONTINUED = ("vit_oblong", "clip", "llava_qwen"), ("llava_qwen",)
"""Whose gradients and whose continuations are kept."""
TABLES = ("embed_tokens", "token_embedding", "position_embedding")


def loaded(name: str, folder: Path):
    """A model as a checkpoint has it."""
    return getattr(transformers, CASES[name][0]).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if name == "logit_scale":
            continue
        if value.ndim == 1:
            about = 0.0 if name.endswith(("bias", "class_embedding")) or "Gemma" in str(type(model.get_decoder())) else 1.0
            value.data = about + 0.3 * noise
        else:
            table = any(word in name for word in TABLES) or value.shape[0] == 1
            value.data = noise * (0.5 if table else 1.2 * value[0].numel() ** -0.5)


def inputs_of(name: str, config) -> dict[str, torch.Tensor]:
    kind, found = CASES[name][0], {}
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        size = vision.image_size if isinstance(vision.image_size, list) else [vision.image_size] * 2
        found["pixel_values"] = torch.randn(3, vision.num_channels, *size)
    text = getattr(config, "text_config", config)
    if kind.startswith("CLIP") and hasattr(text, "vocab_size"):
        ids = torch.randint(3, 38, (3, 10))
        mask = torch.ones_like(ids)
        ids[0, 9] = ids[1, 5:] = ids[2, 7] = ids[2, 8] = 39
        mask[1, 6:] = 0
        found |= {"input_ids": ids, "attention_mask": mask}
        if kind == "CLIPModel":
            found["return_loss"] = torch.tensor(1)
    if "Classification" in kind:
        several = config.problem_type == "multi_label_classification"
        found["labels"] = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]) if several else torch.tensor([0.3, -1.2, 0.8])
    if "Llava" in kind:
        length = 4 + (config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model")
        ids = torch.randint(6, 40, (2, 2 * length + 6))
        mask = torch.ones_like(ids)
        ids[0, 2 : 2 + length] = ids[1, 1 : 1 + length] = ids[1, 2 + length : 2 + 2 * length] = IMAGE
        mask[1, -2:] = 0
        found |= {"input_ids": ids, "attention_mask": mask, "labels": torch.where((mask == 1) & (ids != IMAGE), ids, -100)}
    return found


def outputs_of(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    given = {n: a.long() if a.dtype == torch.int32 else a for n, a in inputs.items()}
    given = {n: bool(a) if n == "return_loss" else a for n, a in given.items()}
    out = model(**given, output_hidden_states=True)
    sides = {"image.": out.get("vision_model_output"), "text.": out.get("text_model_output"), "": out}
    found = {}
    for lead, side in sides.items():
        for key, value in (side or {}).items():
            if key == "hidden_states":
                found |= {f"{lead}hidden_states.{i}": hidden for i, hidden in enumerate(value)}
            elif isinstance(value, torch.Tensor):
                found[lead + key] = value
    return found


def greedy(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = int((ids[0] == IMAGE).sum())
    rows = [ids[0, :], ids[0, : 4 + image], ids[1, : 4 + 2 * image], ids[0, :1]]
    longest = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=0) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    pixels = inputs["pixel_values"][[0, 1, 2, 0]]
    found = model.generate(
        padded, attention_mask=mask, pixel_values=pixels, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[END, IMAGE],
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    logits = torch.stack(found.logits, 1)
    allowed = logits.clone()
    allowed[..., [END, IMAGE]] = -torch.inf
    best = allowed.topk(2, -1).values
    if (best[..., 0] - best[..., 1]).min() < 2e-3 or len(found.sequences[:, longest:].unique()) < 6:
        raise PoorError
    return {
        "batch.input_ids": padded, "batch.attention_mask": mask, "batch.pixel_values": pixels, "batch.greedy": found.sequences,
        "batch.greedy_logits": logits,
    }  # fmt: skip


def write(name: str, seed: int) -> None:
    kind, config = CASES[name]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    made = getattr(transformers, kind)._from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(made, seed)
    made.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = loaded(name, folder)
    inputs = inputs_of(name, config)
    found = outputs_of(model, inputs)
    golden = {f"input.{key}": value for key, value in inputs.items()} | found
    if name in GRADED:
        golden |= gradients(model, found, load_file(folder / "model.safetensors"))
    if name in CONTINUED:
        golden |= greedy(model, inputs)
    kept = {n: (a.int() if a.dtype == torch.int64 else a).detach().clone().contiguous() for n, a in golden.items()}
    save_file(kept, folder / "golden.safetensors")
    print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.0f} kB")


def gradients(model, found: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    golden = {}
    if "loss" in found:
        found["loss"].backward()
    else:
        golden["cotangent.pooler_output"] = torch.randn(found["pooler_output"].shape)
        (golden["cotangent.pooler_output"] * found["pooler_output"]).sum().backward()
    grads = {n: value.grad for n, value in model.named_parameters() if value.grad is not None}
    return golden | {f"grad.{file_name(n, there)}": grad for n, grad in grads.items()}


def file_name(name: str, there: dict[str, torch.Tensor]) -> str:
    """What a file calls a parameter: what transformers itself would rename on loading."""
    changes = (
        ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    if name in there:
        return name
    if name.startswith(("model.", "lm_head")):  # of a LLaVA
        return name.removeprefix("model.").replace("language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
    for now, then in changes:
        name = name.replace(now, then)
    assert name in there, name
    return name


if __name__ == "__main__":
    written(sys.argv[1:] or CASES, write)
