"""ELECTRA (Clark et al., 2020): a small generator of replacements, and the discriminator that tells them."""

from dataclasses import replace

from lmx.interop.families.bert import EXPECTED, FIELDS, LABELS, LEFTOVER, RENAMED, SETTINGS, embeddings, layers
from lmx.interop.family import Architecture, Family

DEFAULTS = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}


def width(reader, ours):
    """Embeddings are projected only where they are of another width."""
    size = reader.take("embedding_size", 128)
    return {} if size == ours["embed"] else {"embed_size": size}


ELECTRA = Family(
    model_type="electra",
    architecture="ElectraForPreTraining",
    architectures={
        "ElectraModel": Architecture({"head": "none"}, bare="electra."),
        "ElectraForMaskedLM": Architecture(
            {"head": "masked", "head_bias": True, "head_activation": "gelu"},
            {
                "generator_predictions.dense": "transform",
                "generator_predictions.LayerNorm": "transform_norm",
                "generator_lm_head": "head",
            },
        ),
        "ElectraForPreTraining": Architecture(
            {"head": "detector"},
            {"discriminator_predictions.dense": "transform", "discriminator_predictions.dense_prediction": "classifier"},
        ),
        "ElectraForSequenceClassification": Architecture(
            {"head": "classifier", "head_activation": "gelu"}, {"classifier.dense": "pooler", "classifier.out_proj": "classifier"}
        ),
        "ElectraForTokenClassification": Architecture({"head": "tokens"}, {"classifier": "classifier"}),
        "ElectraForQuestionAnswering": Architecture({"head": "spans"}, {"qa_outputs": "classifier"}),
    },
    fields=tuple(replace(one, default=DEFAULTS.get(one.theirs, one.default)) for one in FIELDS),
    settings=SETTINGS,
    expected=EXPECTED,
    ignored=("summary_*",),
    more=(LABELS, (width, lambda config: {"embedding_size": config.table_size})),
    modules=embeddings("electra.embeddings") | {"electra.embeddings_project": "embed_projection"} | layers("electra.encoder.layer.{}"),
    prefixes=("electra.",),
    renamed=RENAMED,
    leftover=LEFTOVER,
)
