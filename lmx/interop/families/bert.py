"""BERT (Devlin et al., 2019), and what other encoders have taken from it. The class in config.json says what stands on it."""

from lmx.interop.family import ACTIVATIONS, Architecture, Family, Field

FIELDS = (
    Field("vocab_size", "vocab", 30522),
    Field("hidden_size", "embed", 768),
    Field("num_hidden_layers", "layers", 12),
    Field("num_attention_heads", "heads", 12),
    Field("intermediate_size", "mlp", 3072),
    Field("max_position_embeddings", "context", 512),
    Field("type_vocab_size", "token_types", 2),
    Field("hidden_act", "activation", "gelu", ACTIVATIONS),
    Field("layer_norm_eps", "norm_epsilon", 1e-12),
    Field("tie_word_embeddings", "tied", True),
)
SETTINGS = {
    "causal": False,
    "positions": "learned",
    "norm": "layernorm",
    "norm_placement": "post",
    "embed_norm": True,
    "gated": False,
    "bias": True,
}
EXPECTED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": ("absolute", None)}
RENAMED = ((".weight", ".gamma"), (".bias", ".beta"), (".decoder.bias", ".bias"))
LEFTOVER = (
    *("*position_ids", "*token_type_ids", "*pooler.*", "cls.seq_relationship.*", "sop_classifier.*"),
    *("*predictions.decoder.*", "lm_head.decoder.*", "*predictions.bias", "lm_head.bias"),
)
"""Buffers, tied copies, heads that the class does not use, and the second bias beside an untied decoder, which nothing adds."""


def labels(reader, ours):
    """How many classes, which config.json says by their names."""
    names, number = reader.take("id2label", None), reader.take("num_labels", None)
    if names and number not in (None, len(names)):
        raise reader.refused("num_labels", number, f"the {len(names)} of id2label")
    number = len(names) if names else 2 if number is None else number
    if ours["head"] == "spans" and number != 2:
        raise reader.refused("num_labels", number, "2, a start and an end")
    return {"labels": number} if ours["head"] in ("classifier", "tokens") else {}


LABELS = (labels, lambda config: {"num_labels": config.labels} if config.labels else {})


def layers(lead: str) -> dict:
    """Names of BERT's layers behind a lead."""
    return {
        f"{lead}.attention.self.query": "layers/attention/query",
        f"{lead}.attention.self.key": "layers/attention/key",
        f"{lead}.attention.self.value": "layers/attention/value",
        f"{lead}.attention.output.dense": "layers/attention/output",
        f"{lead}.attention.output.LayerNorm": "layers/attention_norm_post",
        f"{lead}.intermediate.dense": "layers/feedforward/up",
        f"{lead}.output.dense": "layers/feedforward/down",
        f"{lead}.output.LayerNorm": "layers/feedforward_norm_post",
    }


def embeddings(lead: str) -> dict:
    """Names of the embeddings behind a lead."""
    return {
        f"{lead}.word_embeddings": "embed",
        f"{lead}.position_embeddings": "positions",
        f"{lead}.token_type_embeddings": "token_types",
        f"{lead}.LayerNorm": "embed_norm",
    }


def classes(name: str, lead: str, pooler: str) -> dict:
    """The classes that families share: names of the model alone, and of those with a pooler or nothing under a head."""
    pooled = {"head_activation": "tanh"}
    return {
        f"{name}Model": Architecture({"head": "pooler", **pooled}, {pooler: "pooler"}, lead),
        f"{name}ForSequenceClassification": Architecture(
            {"head": "classifier", **pooled}, {lead + pooler: "pooler", "classifier": "classifier"}
        ),
        f"{name}ForTokenClassification": Architecture({"head": "tokens"}, {"classifier": "classifier"}),
        f"{name}ForQuestionAnswering": Architecture({"head": "spans"}, {"qa_outputs": "classifier"}),
    }


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    architectures=classes("Bert", "bert.", "pooler.dense")
    | {
        "BertForMaskedLM": Architecture(
            {"head": "masked", "head_bias": True},
            {
                "cls.predictions.transform.dense": "transform",
                "cls.predictions.transform.LayerNorm": "transform_norm",
                "cls.predictions.decoder": "head",
                "cls.predictions.bias": "head_bias",
            },
        )
    },
    fields=FIELDS,
    settings=SETTINGS,
    expected=EXPECTED,
    ignored=("pooler_*", "directionality"),
    more=(LABELS,),
    modules=embeddings("bert.embeddings") | layers("bert.encoder.layer.{}"),
    prefixes=("bert.",),
    renamed=RENAMED,
    leftover=LEFTOVER,
)
