"""RoBERTa (Liu et al., 2019), XLM-RoBERTa (Conneau et al., 2020), CamemBERT (Martin et al., 2020)."""

from dataclasses import replace

from lmx.interop.families.bert import EXPECTED, FIELDS, LABELS, LEFTOVER, RENAMED, SETTINGS, classes, embeddings, layers
from lmx.interop.family import Architecture, Family

DEFAULTS = {"vocab_size": 50265}


def after_padding(reader, ours):
    """The first position's row is the one after the padding token's; the table has as many rows as config.json says."""
    first = reader.take("pad_token_id", 1) + 1
    return {"first_position": first, "context": ours["context"] - first}


ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    architectures=classes("Roberta", "roberta.", "pooler.dense")
    | {
        "RobertaForMaskedLM": Architecture(
            {"head": "masked", "head_bias": True, "head_activation": "gelu"},
            {
                "lm_head.dense": "transform",
                "lm_head.layer_norm": "transform_norm",
                "lm_head.decoder": "head",
                "lm_head.bias": "head_bias",
            },
        ),
        "RobertaForSequenceClassification": Architecture(
            {"head": "classifier", "head_activation": "tanh"}, {"classifier.dense": "pooler", "classifier.out_proj": "classifier"}
        ),
    },
    fields=tuple(replace(one, default=DEFAULTS.get(one.theirs, one.default)) for one in FIELDS),
    settings=SETTINGS,
    expected=EXPECTED,
    more=(
        LABELS,
        (
            after_padding,
            lambda config: {
                "max_position_embeddings": config.context + config.first_position,
                "pad_token_id": config.first_position - 1,
            },
        ),
    ),
    modules=embeddings("roberta.embeddings") | layers("roberta.encoder.layer.{}"),
    prefixes=("roberta.",),
    renamed=RENAMED,
    leftover=LEFTOVER,
    pads_uncounted=True,
)


def renamed(model_type: str, name: str) -> Family:
    """The same model under another name: trained on other languages."""
    classes = {one.replace("Roberta", name): about for one, about in ROBERTA.architectures.items()}
    return replace(ROBERTA, model_type=model_type, architecture=f"{name}ForMaskedLM", architectures=classes)


XLM_ROBERTA = renamed("xlm-roberta", "XLMRoberta")
CAMEMBERT = renamed("camembert", "Camembert")
