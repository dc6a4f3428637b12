"""Older and newer files of models that see: their tensors' names and config.json; and what is refused."""

import json
import re

import jax
import numpy as np
import pytest

from lmx import interop
from lmx.infer import generate
from lmx.interop.checkpoint import Model
from lmx.interop.families import FAMILIES
from lmx.interop.files import mapped, write_tensors
from lmx.models import families


def renamed(*pairs: tuple[str, str]):
    """A file's names, changed by regular expressions, one after another."""

    def change(name: str) -> str:
        for now, then in pairs:
            name = re.sub(now, then, name)
        return name

    return change


INNER = (("^language_model.lm_head", "lm_head"), ("^language_model.model", "model.language_model"))
LAYOUTS = {
    "llava, before 4.52": ("goldens/llava", renamed(("^vision_tower", "vision_tower.vision_model"))),
    "llava, 4.52": (
        "goldens/llava",
        renamed(*INNER, ("^vision_tower", "model.vision_tower.vision_model"), ("^multi_modal", "model.multi_modal")),
    ),
    "llava, 5": ("goldens/llava", renamed(*INNER, ("^vision_tower", "model.vision_tower"), ("^multi_modal", "model.multi_modal"))),
    "vit, 5": (
        "goldens/vit_classifier",
        renamed(
            ("encoder.layer.", "layers."),
            ("attention.attention.(query|key|value)", lambda found: f"attention.{found[1][0]}_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
    "vit, with a prefix": ("goldens/vit", lambda name: f"vit.{name}"),
    "clip_vision_model, 4": ("clip_vision", lambda name: f"vision_model.{name}"),
    "clip_text_model, 4": ("clip_text", lambda name: f"text_model.{name}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_other_versions(layout, root, shared, tmp_path):
    name, change = LAYOUTS[layout]
    folder = shared / name if "/" in name else root / "tests" / "data_files" / "images" / name
    tensors = {change(name): a for name, a in mapped(folder / "model.safetensors").items()}
    tensors |= {f"{name.removesuffix('weight')}x.position_ids": np.arange(4) for name in tensors if "position_embedding." in name}
    write_tensors(tmp_path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (model, params), (usual, expected) = interop.load(tmp_path), interop.load(folder)
    assert model.config == usual.config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert set(interop.tensors(model, params)) == {name for name in tensors if not name.endswith("position_ids")}


def test_half_precision_files_are_given_back(root, tmp_path):
    folder = root / "tests" / "data_files" / "images" / "llava_siglip"
    tensors = {name: a.astype(np.float16) for name, a in mapped(folder / "model.safetensors").items()}
    write_tensors(tmp_path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}))
    interop.save(*interop.load(tmp_path), tmp_path / "again")
    found = mapped(tmp_path / "again" / "model.safetensors")
    assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in tensors.items()}


DUMP = {"_name_or_path": "", "add_cross_attention": False, "length_penalty": 1.0, "top_k": 50, "num_beams": 1, "torch_dtype": None}
PUBLISHED = {
    "llava-1.5": (
        {
            "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000, "model_type": "llava",
            "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
            "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
                            "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
            "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                              "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
        },
        {"vocab": 32064, "embed": 4096, "image_token": 32000, "image_tokens": 576, "depths": (23,), "tied": False, "norm_epsilon": 1e-5},
    ),
    "llava-interleave": (
        {
            "model_type": "llava", "image_token_index": 151646, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full", "text_config": {"model_type": "qwen2", "vocab_size": 152000, "hidden_size": 1024},
            "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                              "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
        },
        {"image_tokens": 729, "depths": (26,), "image.class_token": False, "image.activation": "gelu_tanh", "image.norm_epsilon": 1e-6,
         "projection_bias": True},
    ),
    "llava of a decoder that caps logits": (
        {"model_type": "llava", "text_config": {"model_type": "gemma2"}}, {"logit_softcap": None, "attention_softcap": 50.0},
    ),
    "llava of a decoder that scales logits": ({"model_type": "llava", "text_config": {"model_type": "cohere"}}, {"logit_scale": None}),
    "llava, all left out": ({"model_type": "llava"}, {"vocab": 32000, "image_tokens": 576, "depths": (23,), "image_class": False}),
    "clip-vit-large-patch14": (
        {
            "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768, "logit_scale_init_value": 2.6592,
            "text_config": DUMP | {"hidden_size": 512, "eos_token_id": 2, "model_type": "clip_text_model", "dropout": 0.0},
            "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
            "vision_config": DUMP | {"hidden_size": 768, "model_type": "clip_vision_model"},
            "vision_config_dict": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                                   "patch_size": 14, "projection_dim": 768},
        },
        {"text.embed": 768, "text.end_token": 49407, "text.summary": 768, "image.embed": 1024, "image.layers": 24, "image.patch_size": (14, 14)},
    ),
    "clip-vit-base-patch32": (
        {
            "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512, "text_config_dict": None, "vision_config_dict": None,
            "text_config": DUMP | {"eos_token_id": 2, "bos_token_id": 0, "model_type": "clip_text_model"}, "vision_config": DUMP,
        },
        {"text.end_token": None, "text.context": 77, "image.summary_norm": True, "image.patches": 49},
    ),
    "vit-base-patch16-224": (
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 768, "id2label": {str(i): "x" for i in range(1000)},
         "layer_norm_eps": 1e-12, "encoder_stride": 16, "qkv_bias": True},
        {"labels": 1000, "patches": 196, "head": "classifier", "projection_bias": None},
    ),
    "vit, its pooler": (
        {"model_type": "vit", "architectures": ["ViTModel"], "image_size": [32, 16], "patch_size": 8},
        {"summary_size": 768, "head_activation": "tanh", "patches": 8, "patch_size": (8, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_said_again(name):
    theirs, expected = PUBLISHED[name]
    kind = theirs["model_type"]
    config = FAMILIES[kind].read(theirs)
    families.check(config)

    def value(path: str):
        found = config
        for word in path.split("."):
            found = getattr(found, word)
        return found

    assert {path: value(path) for path in expected} == expected
    again = Model(config, kind, json.dumps(theirs)).hub
    assert FAMILIES[kind].read(again) == config
    assert not {"text_config_dict", "vision_config_dict"} & set(again)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"model_type": "vit", "architectures": ["ViTForMaskedImageModeling"]}, "architectures='ViTForMaskedImageModeling'"),
        ({"model_type": "vit", "hidden_act": "mish"}, "hidden_act='mish'"),
        ({"model_type": "vit", "pooler_act": "mish"}, "pooler_act='mish'"),
        ({"model_type": "vit", "image_size": [1, 2, 3]}, r"image_size=\[1, 2, 3\]"),
        ({"model_type": "vit", "register_tokens": 4}, "register_tokens=4"),
        ({"model_type": "clip", "architectures": ["CLIPForImageClassification"]}, "architectures='CLIPForImageClassification'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "mish"}}, "hidden_act='mish' of a clip_text_model"),
        ({"model_type": "clip", "text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id=\[1, 2\]"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "vision_config has model_type='pixtral'"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "vision_use_head=True of a siglip_vision_model"),
        ({"model_type": "llava", "text_config": {"model_type": "t5"}}, "text_config has model_type='t5'"),
        ({"model_type": "llava", "text_config": {"hidden_act": "mish"}}, "hidden_act='mish' of a llama"),
        ({"model_type": "llava", "vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls'"),
        ({"model_type": "llava", "image_grid_pinpoints": [[1, 2]]}, "image_grid_pinpoints"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(theirs, said):
    with pytest.raises(ValueError, match=said):
        FAMILIES[theirs["model_type"]].read(theirs)


@pytest.fixture(scope="module")
def cases(root) -> dict:
    return {name: interop.load(root / "tests" / "data_files" / "images" / name) for name in ("clip", "vit_oblong", "llava_gemma")}


PIXELS, IDS = np.zeros((2, 3, 8, 8), np.float32), np.full((2, 9), 39)


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        ("vit_oblong", {"pixel_values": PIXELS}, r"images of \[3, 8, 8\].*those of the model, \[1, 9, 12\]"),
        ("vit_oblong", {"pixel_values": PIXELS, "interpolate_pos_encoding": True}, "lmx does not stretch its positions"),
        (
            "vit_oblong",
            {"pixel_values": PIXELS, "labels": np.zeros(2, int)},
            "a ViTModel takes pixel_values, interpolate_pos_encoding, not labels",
        ),
        ("vit_oblong", {}, "inputs lack pixel_values"),
        ("clip", {"pixel_values": PIXELS, "return_loss": True}, "both for a loss"),
        ("clip", {"pixel_values": PIXELS[:1], "input_ids": IDS, "return_loss": True}, "1 images and 2 texts: the loss is of pairs"),
        ("llava_gemma", {"pixel_values": PIXELS, "input_ids": IDS}, "input_ids has 0 image tokens .5., and pixel_values has 2 images of 4"),
    ],
)
def test_wrong_inputs_are_refused(cases, name, inputs, said):
    with pytest.raises(ValueError, match=said):
        interop.call(*cases[name], inputs)


def test_images_alone_and_texts_alone_are_embedded_as_together(cases):
    model, params = cases["clip"]
    inputs = {"pixel_values": PIXELS + np.arange(8), "input_ids": IDS}
    run = jax.jit(lambda **inputs: interop.call(model, params, inputs))
    both, image, text = run(**inputs), run(pixel_values=inputs["pixel_values"]), run(input_ids=IDS)
    np.testing.assert_allclose(image["image_embeds"], both["image_embeds"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(text["text_embeds"], both["text_embeds"], rtol=1e-5, atol=1e-6)
    assert "logits_per_text" not in image


def test_prompts_and_images_must_agree(cases):
    model, params = cases["llava_gemma"]
    with pytest.raises(ValueError, match=r"prompt 0: the prompt has 4 image tokens \(5\), and there are 0 images, each of 4"):
        generate(model, params, [[5] * 4], max_new_tokens=1)
    with pytest.raises(ValueError, match="0 image tokens"):
        generate(model, params, [[6]], max_new_tokens=1, pixel_values=PIXELS)
    with pytest.raises(ValueError, match="prompt 0: images for a Transformer, which reads none"):
        generate(model.table.inside[0].part(model.config), params, [[6]], max_new_tokens=1, pixel_values=PIXELS)
