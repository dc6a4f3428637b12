"""The README's table of families is what the code has."""

from lmx.data.denoising import OBJECTIVES
from lmx.interop.families import FAMILIES
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer

SEEING = {
    VisionTransformer: "encoder of images",
    CaptionTransformer: "encoder of captions",
    CLIP: "encoders of images and captions",
    LLaVA: "decoder that reads images",
}


def kind(config: Transformer) -> str:
    if type(config) in SEEING:
        return SEEING[type(config)]
    if isinstance(config, EncoderDecoder):
        return "encoder-decoder"
    if isinstance(config, RWKV):
        return "recurrent decoder"
    return "decoder" if config.causal else "encoder"


def features(config: Transformer) -> str:
    """What tells a family from others, in models that leave every setting at its default."""
    if isinstance(config, RWKV):
        return f"version {config.version}, a state of constant size"
    if isinstance(config, CLIP):
        return "a space that both share"
    said = [config.positions, config.norm, f"{config.norm_placement}-norm", config.activation + (", gated" if config.gated else "")]
    said += [name for name in ("parallel", "qk_norm", "shared_layers", "embed_norm", "norm_offset") if getattr(config, name)]
    said += ["local layers"] * (config.window is not None) + [f"{config.experts} experts"] * (config.experts > 0)
    return ", ".join(said)


def table() -> str:
    """One line a family, from its table in `lmx/interop/families`."""
    lines = ["| `model_type` | kind | by default | classes of transformers |", "| --- | --- | --- | --- |"]
    for name, family in sorted(FAMILIES.items()):
        config = family.read({"model_type": name})
        classes = ", ".join(family.architectures) if family.architectures else family.architecture
        lines.append(f"| {name} | {kind(config)} | {features(config)} | {classes} |")
    return "\n".join(lines)


def test_the_readme_has_every_family(root):
    readme = (root / "README.md").read_text()
    assert table() in readme, "run python tests/parallel/tables.py"
    for objective in OBJECTIVES:
        assert f"`{objective}`" in readme
