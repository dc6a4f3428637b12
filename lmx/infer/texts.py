"""What can be continued, and how far."""

from lmx.core.tree import Tree
from lmx.models import virtual
from lmx.models.config import Model
from lmx.models.vision_config import LLaVA


def context_of(model: Model) -> int:
    """The most tokens that a text may have."""
    scaling = getattr(model, "rope_scaling", None)
    return model.context if scaling is None or scaling.kind != "dynamic" else int(model.context * scaling.factor)


def check_continues(model: Model) -> None:
    """Raises ValueError for a model that continues no texts."""
    if not model.causal or not model.vocabulary_head:
        raise ValueError(
            f"a model with causal={model.causal} and head={model.head} continues nothing; generate needs a causal one with logits"
        )


def check_tokens_alone(model: Model, params: Tree) -> None:
    """Raises ValueError for a model that reads more than tokens: the engine has no place for it yet."""
    if isinstance(model, LLaVA):
        raise ValueError("the engine reads no images; lmx.infer.generate does")
    if virtual.prompt(params) or virtual.prefix(params):
        raise ValueError("the engine knows no soft prompts and prefixes; lmx.infer.generate does")
