"""Which functions compute a model: told by the type of its config, here and nowhere else."""

from types import ModuleType

from lmx.models import clip, llava, rwkv, transformer, vision, vision_config
from lmx.models import config as text_config
from lmx.models.config import RWKV, Model
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer

SEEING = {VisionTransformer: vision, CLIP: clip, LLaVA: llava}


def functions(config: Model | CLIP) -> ModuleType:
    """The module of a model's family. Each has the same functions, of the same form:

    - `specs(config)`, the parameter table, and `flops_per_token(config, length)`;
    - `forward(params, config, tokens, *, positions, segments, cache, dropout, edits, execution) -> Output`, and `empty_cache` to decode with;
    - the forward without a cache in parts, as a pipeline cuts it: `enter`, `share` (what its layers share), `run_part`, `leave`.

    Of those that see, `specs` and a `forward` of images alone, or of texts and images; and of a decoder that does, what decoding needs.
    """
    return rwkv if isinstance(config, RWKV) else SEEING.get(type(config), transformer)


def check(config: Model | CLIP) -> None:
    """Refuses a config that is no model, with one line that names the knob. Raises ValueError."""
    seeing = isinstance(config, (*SEEING, CaptionTransformer))
    (vision_config.check if seeing else text_config.check)(config)
