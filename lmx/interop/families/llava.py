"""LLaVA (Liu et al., 2023): CLIP's eyes, or SigLIP's, and a decoder of any of several families."""

from lmx.interop.families import clip, cohere, gemma, glm, llama, mistral, mixtral, olmo2, phi3, qwen, stablelm
from lmx.interop.family import ACTIVATIONS, Family, Field, Inside
from lmx.models.vision_config import LLaVA

DECODERS = (
    *(llama.LLAMA, cohere.COHERE, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, glm.GLM, glm.GLM4, mistral.MISTRAL, mixtral.MIXTRAL),
    *(olmo2.OLMO2, phi3.PHI3, qwen.QWEN2, qwen.QWEN2_MOE, qwen.QWEN3, stablelm.STABLELM),
)
EYES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
STRATEGIES = {"default": False, "full": True}


def layers(reader, _):
    said = reader.take("vision_feature_layer", -2)
    return {"image_layers": (said,) if isinstance(said, int) else tuple(said)}


def said_layers(config):
    found = config.image_layers
    return {"vision_feature_layer": found[0] if len(found) == 1 else list(found)}


def tied(reader, ours):
    return {"tied": reader.take("tie_word_embeddings", False) or ours["tied"]}


def headed(*_):
    """transformers' class has a plain head of its own: it neither scales nor caps logits, whatever the decoder's would."""
    return {"logit_scale": None, "logit_softcap": None}


def dialect(tower: str, *, modern: bool) -> tuple[tuple[str, str], ...]:
    """Names with or without CLIP's own prefix, those of files or of transformers' modules since 4.52."""
    eyes = (("vision_tower.", f"{'model.' * modern}vision_tower.{tower}"),)
    rest = (("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."))
    return (*eyes, *rest, ("multi_modal_projector.", "model.multi_modal_projector.")) if modern else eyes


LLAVA = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    kind=LLaVA,
    fields=(
        Field("image_token_index", "image_token", 32000),
        Field("vision_feature_select_strategy", "image_class", "default", STRATEGIES),
        Field("projector_hidden_act", "projector_activation", "gelu", ACTIVATIONS),
        Field("multimodal_projector_bias", "projector_bias", True),
    ),
    ignored=("image_seq_length", "ignore_index", "vocab_size"),
    more=((layers, said_layers), (tied, lambda config: {"tie_word_embeddings": config.tied}), (headed, lambda _: {})),
    modules={"multi_modal_projector.linear_1": "projector/up", "multi_modal_projector.linear_2": "projector/down"},
    prefixes=(),
    dialects=(dialect("vision_model.", modern=False), dialect("", modern=True), dialect("vision_model.", modern=True)),
    inside=(
        Inside("text_config", "", DECODERS, lead="language_model."),
        Inside("vision_config", "image", (clip.VISION, clip.SIGLIP), lead="vision_tower.", usual=EYES),
    ),
)
