"""DistilBERT (Sanh et al., 2019)."""

from lmx.interop.families.bert import LABELS, LEFTOVER, RENAMED, SETTINGS
from lmx.interop.family import ACTIVATIONS, Architecture, Family, Field

LAYER = "distilbert.transformer.layer.{}"
DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertForMaskedLM",
    architectures={
        "DistilBertModel": Architecture({"head": "none"}, bare="distilbert."),
        "DistilBertForMaskedLM": Architecture(
            {"head": "masked", "head_bias": True},
            {"vocab_transform": "transform", "vocab_layer_norm": "transform_norm", "vocab_projector": "head"},
        ),
        "DistilBertForSequenceClassification": Architecture(
            {"head": "classifier", "head_activation": "relu"}, {"pre_classifier": "pooler", "classifier": "classifier"}
        ),
        "DistilBertForTokenClassification": Architecture({"head": "tokens"}, {"classifier": "classifier"}),
        "DistilBertForQuestionAnswering": Architecture({"head": "spans"}, {"qa_outputs": "classifier"}),
    },
    fields=(
        Field("vocab_size", "vocab", 30522),
        Field("dim", "embed", 768),
        Field("n_layers", "layers", 6),
        Field("n_heads", "heads", 12),
        Field("hidden_dim", "mlp", 3072),
        Field("max_position_embeddings", "context", 512),
        Field("activation", "activation", "gelu", ACTIVATIONS),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings=SETTINGS | {"norm_epsilon": 1e-12},
    ignored=("sinusoidal_pos_embds", "tie_weights_"),
    more=(LABELS,),
    modules={
        "distilbert.embeddings.word_embeddings": "embed",
        "distilbert.embeddings.position_embeddings": "positions",
        "distilbert.embeddings.LayerNorm": "embed_norm",
        f"{LAYER}.attention.q_lin": "layers/attention/query",
        f"{LAYER}.attention.k_lin": "layers/attention/key",
        f"{LAYER}.attention.v_lin": "layers/attention/value",
        f"{LAYER}.attention.out_lin": "layers/attention/output",
        f"{LAYER}.sa_layer_norm": "layers/attention_norm_post",
        f"{LAYER}.ffn.lin1": "layers/feedforward/up",
        f"{LAYER}.ffn.lin2": "layers/feedforward/down",
        f"{LAYER}.output_layer_norm": "layers/feedforward_norm_post",
    },
    prefixes=("distilbert.",),
    renamed=RENAMED,
    leftover=LEFTOVER,
)
