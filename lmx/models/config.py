"""What a model is: one frozen value."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from lmx.models import rwkv_config
from lmx.models.rope import RopeScaling, check_scaling
from lmx.models.rwkv_config import RWKV

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "silu", "tanh"]
Norm = Literal["layernorm", "rmsnorm"]
Placement = Literal["pre", "post", "sandwich", "output"]
Positions = Literal["rope", "alibi", "learned", "sinusoidal", "relative", "transformer_xl", "none"]
LayerKind = Literal["global", "local", "global_dense", "local_dense"]
Head = Literal["lm", "masked", "none", "pooler", "classifier", "tokens", "spans", "detector", "projection"]


@dataclass(frozen=True)
class Transformer:
    """A decoder, or without causality an encoder: token embedding, a stack of layers, a final norm, a head."""

    vocab: int = 0
    """Rows of the embedding table. 0: the tokenizer's vocabulary, rounded up to a multiple of 8."""
    layers: int = 4
    """Layers in the stack."""
    embed: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads of each attention layer."""
    kv_heads: int | None = None
    """Key and value heads (1: multi-query; fewer than heads: grouped-query). None: as many as heads."""
    head_dim: int | None = None
    """Width of a head. None: embed / heads."""
    mlp: int | None = None
    """Width of the feed-forward's hidden layer. None: 4 x embed."""
    context: int = 1024
    """Longest sequence; learned positions have as many rows."""
    causal: bool = True
    """Whether a token sees only those up to itself (a decoder), or all of its text (an encoder)."""
    positions: Positions = "rope"
    """How tokens know where they are. relative: T5's buckets of distances; transformer_xl: projected sinusoids of distances, as Gopher has
    them."""
    alibi_scaled: bool = False
    """Whether ALiBi is added to products of queries and keys before they are multiplied by attention_scale (Falcon), not after."""
    first_position: int = 0
    """The row of a table of learned positions that position 0 has; the table has as many more (OPT, RoBERTa)."""
    relative_buckets: int = 32
    """Into how many buckets distances between tokens fall, each with a score of its own in every head (T5)."""
    relative_distance: int = 128
    """From this distance on all fall into the last bucket."""
    block_positions: bool = False
    """Whether there is a second table of learned positions, for a token's place inside the span that it fills (GLM)."""
    token_types: int = 0
    """Kinds of tokens that have an embedding of their own, added to the token's (BERT's two sentences). 0: none."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    local_rope_theta: float | None = None
    """The same for local layers, whose wavelengths are not scaled (Gemma 3). None: as all others."""
    rope_dims: int | None = None
    """How many dimensions of a head turn, its first (GPT-NeoX, GLM). None: all."""
    rope_interleaved: bool = False
    """Whether neighbouring dimensions turn together (GPT-J, GLM), or i and i + rope_dims / 2."""
    rope_scaling: RopeScaling | None = None
    """How wavelengths are stretched for longer texts."""
    norm: Norm = "rmsnorm"
    """Which normalisation."""
    norm_placement: Placement = "pre"
    """Where it stands: before each sublayer, after each residual sum, before and after each sublayer (sandwich), or after each sublayer
    alone, before the sum (output: OLMo 2)."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    norm_offset: bool = False
    """Whether RMSNorm multiplies by 1 + scale (Gemma)."""
    embed_norm: bool = False
    """Whether embeddings are normalised before the first layer (BLOOM)."""
    embed_size: int | None = None
    """Width of the embedding tables, projected to that of the residual stream (ALBERT, ELECTRA). None: that of embed, not projected."""
    activation: Activation = "silu"
    """The feed-forward's nonlinearity."""
    gated: bool = True
    """Whether a second projection gates the feed-forward (SwiGLU and kin)."""
    parallel: bool = False
    """Whether attention and feed-forward read the same normalised input and are added together (GPT-J, PaLM)."""
    parallel_norms: bool = False
    """Whether in a parallel layer each has a norm of its own (GPT-NeoX)."""
    bias: bool = False
    """Whether linear layers and LayerNorms have biases."""
    projection_bias: bool | None = None
    """Whether projections to queries, keys and values do. None: as bias says."""
    output_bias: bool | None = None
    """Whether attention's output projection does. None: as bias says."""
    mlp_bias: bool | None = None
    """Whether the feed-forward does. None: as bias says."""
    head: Head = "lm"
    """What stands on the hidden states. lm: logits of the vocabulary; masked: the same after a dense layer, an activation and a norm (BERT);
    none; pooler: a dense layer and an activation on the first token; classifier: labels of a text from that; tokens: labels of each token;
    spans: of each token, whether an answer starts or ends there; detector: of each, whether it was replaced (ELECTRA)."""
    head_activation: Activation | None = None
    """That of the head's dense layer. None: that of activation."""
    labels: int = 0
    """How many classes heads of the kinds classifier and tokens tell apart."""
    head_bias: bool = False
    """Whether logits of the vocabulary have one (GPT-J, BERT)."""
    tied: bool = True
    """Whether the head is the embedding table."""
    logit_softcap: float | None = None
    """Logits become c tanh(logits / c)."""
    attention_softcap: float | None = None
    """Attention scores become c tanh(scores / c)."""
    attention_scale: float | None = None
    """What products of queries and keys are multiplied by. None: head_dim^-0.5."""
    logit_scale: float | None = None
    """What logits are multiplied by (T5, Cohere). None: nothing."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head."""
    qk_norm_joint: bool = False
    """Whether over all heads at once instead (OLMo 2)."""
    window: int | None = None
    """How many tokens, itself included, a query of a local layer sees."""
    pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of layers, repeated over the stack; local layers use the window. In a model with experts every layer has them but those named
    global_dense or local_dense, which have one feed-forward: ("global_dense", "global") is a mixture in every other layer."""
    shared_layers: bool = False
    """Whether all repeats of the pattern have the same parameters (ALBERT)."""
    experts: int = 0
    """Feed-forwards of which each token passes through a few, in layers that are a mixture of experts. 0: one, for all."""
    experts_per_token: int = 2
    """Through how many."""
    expert_mlp: int | None = None
    """Width of an expert's hidden layer. None: that of mlp."""
    expert_capacity: float | None = None
    """How many tokens of a sequence an expert takes, as a multiple of its even share; later ones pass it by, in training and evaluation
    (generation drops none). None: all."""
    shared_experts: int = 0
    """Experts that every token passes through besides, as one feed-forward of their joint width."""
    shared_mlp: int | None = None
    """That width. None: shared_experts x that of an expert."""
    shared_gate: bool = False
    """Whether what they give is multiplied by the sigmoid of a product of the token (Qwen2-MoE)."""
    renormalize_experts: bool = True
    """Whether the weights of a token's experts sum to 1 (Mixtral), or are their probabilities among all."""
    embed_scale: bool = False
    """Whether embeddings are multiplied by sqrt(embed)."""
    dropout: float = 0.0
    """Share dropped of embeddings, attention weights and each sublayer's output, in training."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream start at this / sqrt(2 layers)."""

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.embed // self.heads if self.head_dim is None else self.head_dim

    @property
    def rope_size(self) -> int:
        return self.head_size if self.rope_dims is None else self.rope_dims

    @property
    def table_size(self) -> int:
        """Width of the embedding tables."""
        return self.embed if self.embed_size is None else self.embed_size

    @property
    def vocabulary_head(self) -> bool:
        """Whether the head gives logits of the vocabulary."""
        return self.head in ("lm", "masked")

    @property
    def hidden(self) -> int:
        return 4 * self.embed if self.mlp is None else self.mlp

    @property
    def expert_hidden(self) -> int:
        return self.hidden if self.expert_mlp is None else self.expert_mlp

    @property
    def shared_hidden(self) -> int:
        return self.shared_experts * self.expert_hidden if self.shared_mlp is None else self.shared_mlp

    @property
    def mixtures(self) -> int:
        """Layers that are a mixture of experts."""
        return sum(is_mixture(self, self.pattern[i % len(self.pattern)]) for i in range(self.layers))


@dataclass(frozen=True)
class EncoderDecoder(Transformer):
    """A decoder that also attends to what an encoder makes of another text (Vaswani et al., 2017): all fields but one are the decoder's.
    Both read the same table of embeddings."""

    encoder: Transformer = Transformer(causal=False)
    """What reads the other text. It has no head."""

    @property
    def mixtures(self) -> int:
        return super().mixtures + self.encoder.mixtures


@runtime_checkable
class Model(Protocol):
    """What the config of any model says, whatever computes it (`lmx.models.families`): what the stack, the heads and losses, the training loop
    and checkpoints read without asking which it is. Of a model that has no such choice it is a class variable."""

    vocab: int
    layers: int
    embed: int
    context: int
    tied: bool
    dropout: float
    init_std: float
    pattern: tuple[str, ...]
    shared_layers: bool
    bias: bool
    experts: int
    token_types: int
    causal: bool
    head: str
    head_bias: bool
    labels: int
    logit_scale: float | None
    logit_softcap: float | None

    @property
    def hidden(self) -> int: ...

    @property
    def vocabulary_head(self) -> bool: ...


def is_local(kind: LayerKind) -> bool:
    """Whether a layer of this kind sees the window alone."""
    return kind.startswith("local")


def is_mixture(config: Transformer, kind: LayerKind) -> bool:
    """Whether a layer of this kind has experts."""
    return config.experts > 0 and not kind.endswith("_dense")


def check(config: Model) -> None:
    """Refuses a config that is no model, with one line that names the knob. Raises ValueError."""
    for knob in ("vocab", "layers", "embed", "mlp", "context"):
        if getattr(config, knob) is not None and getattr(config, knob) < 1:
            raise ValueError(f"model.{knob}={getattr(config, knob)} must be at least 1")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout={config.dropout} must be at least 0 and below 1")
    if isinstance(config, EncoderDecoder):
        _check_pair(config)
    (rwkv_config.check if isinstance(config, RWKV) else _check_transformer)(config)


def divided(config: Model, tensor: int) -> dict[str, dict[str, int]]:
    """What axes of the mesh must divide, by axis and then by the name of the knob; `tensor`: the degree of that axis."""
    hidden = {"the feed-forward width (model.mlp)": config.hidden}
    vocab = {"model.vocab": config.vocab} if config.vocab else {}
    sizes = {"tensor": hidden | vocab, "fsdp": {"model.embed": config.embed}}
    if isinstance(config, RWKV):
        mixing = {"the width of time mixing (model.channels)": config.width}
        if config.version > 4:
            mixing = {"the heads of time mixing (model.channels / model.head_dim)": config.heads}
        return sizes | {"tensor": mixing | hidden | vocab}
    # Fewer key heads than tensor shards are replicated; more must divide.
    uneven = config.key_heads % tensor and tensor % config.key_heads
    sizes["tensor"] = {"model.heads": config.heads} | hidden | ({"model.kv_heads": config.key_heads} if uneven else {}) | vocab
    if config.experts:
        sizes["expert"] = {"model.experts": config.experts}
        sizes["tensor"]["the experts' width (model.expert_mlp)"] = config.expert_hidden
        if config.shared_experts:
            sizes["tensor"]["the shared experts' width (model.shared_mlp)"] = config.shared_hidden
    if isinstance(config, EncoderDecoder):
        for axis, named in divided(config.encoder, tensor).items():
            own = {name.replace("model.", "model.encoder."): size for name, size in named.items()}
            sizes[axis] = sizes.get(axis, {}) | own
    return sizes


def _check_transformer(config: Transformer) -> None:
    for knob in ("heads", "kv_heads", "head_dim", "embed_size", "experts_per_token", "expert_mlp", "shared_mlp"):
        value = getattr(config, knob)
        if value is not None and value < 1:
            raise ValueError(f"model.{knob}={value} must be at least 1")
    if config.head_dim is None and config.embed % config.heads:
        raise ValueError(f"model.embed={config.embed} is not divisible by model.heads={config.heads}; change one, or set model.head_dim")
    if config.heads % config.key_heads:
        raise ValueError(f"model.heads={config.heads} is not divisible by model.kv_heads={config.kv_heads}; key heads are shared evenly")
    if config.positions == "rope" and (config.rope_size % 2 or not 0 < config.rope_size <= config.head_size):
        raise ValueError(
            f"rope turns pairs of a head's {config.head_size} dimensions, so {config.rope_size} of them (model.rope_dims, else "
            "model.head_dim) must be even and no more"
        )
    for knob in ("rope_theta", "local_rope_theta"):
        value = getattr(config, knob)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"model.{knob}={value} must be above 0, and finite")
    if config.rope_scaling is not None:
        check_scaling(config.rope_scaling, config.rope_size)
    if config.positions == "relative":
        exact = config.relative_buckets // (2 if config.causal else 4)
        if exact < 1 or config.relative_distance <= exact:
            raise ValueError(
                f"model.relative_buckets={config.relative_buckets} with model.relative_distance={config.relative_distance}: half of the "
                f"buckets of a side ({exact}) are for one distance each and the rest for those up to relative_distance; both must be more"
            )
    if config.positions == "transformer_xl":
        if config.embed % 2:
            raise ValueError(f"model.embed={config.embed} is odd; positions transformer_xl are sines and cosines in pairs")
        if config.attention_softcap is not None:
            raise ValueError(
                f"model.attention_softcap={config.attention_softcap} caps products of queries and keys alone, and positions transformer_xl "
                "add another; set it to None"
            )
    if config.first_position < 0:
        raise ValueError(f"model.first_position={config.first_position} must be at least 0")
    if config.norm_offset and config.norm != "rmsnorm":
        raise ValueError(f"model.norm_offset is of rmsnorm, not of {config.norm}")
    if config.parallel_norms and not config.parallel:
        raise ValueError("model.parallel_norms is of a layer whose halves run in parallel; set model.parallel, or leave it out")
    if config.parallel_norms and config.norm_placement == "output":
        raise ValueError('model.parallel_norms is of norms before a sublayer, which model.norm_placement="output" has none of')
    if config.qk_norm_joint and not config.qk_norm:
        raise ValueError("model.qk_norm_joint says how queries and keys are normalised; set model.qk_norm, or leave it out")
    if config.alibi_scaled and config.positions != "alibi":
        raise ValueError(f"model.alibi_scaled is of positions alibi, not of {config.positions}")
    if not config.pattern:
        raise ValueError('model.pattern is empty; ("global",) is a stack of plain layers')
    if any(is_local(kind) for kind in config.pattern) != (config.window is not None):
        raise ValueError(
            f"model.window={config.window} with model.pattern={config.pattern}: the window is of local layers, so set both or neither"
        )
    if config.window is not None and not config.causal:
        raise ValueError(f"model.window={config.window} counts back from a token, so it needs model.causal")
    if config.window is not None and config.window < 1:
        raise ValueError(f"model.window={config.window} must be at least 1 (a token sees itself)")
    if config.parallel and config.norm_placement == "post":
        raise ValueError('model.parallel needs model.norm_placement "pre", "sandwich" or "output": a post-norm block is a series')
    for knob in ("logit_softcap", "attention_softcap"):
        if getattr(config, knob) is not None and not getattr(config, knob) > 0:
            raise ValueError(f"model.{knob}={getattr(config, knob)} must be above 0; None caps nothing")
    _check_encoder(config)
    _check_experts(config)


def _check_encoder(config: Transformer) -> None:
    if config.window is not None and not config.causal:
        raise ValueError(f"model.window={config.window} counts back from a token, so it needs model.causal; leave the window out")
    if config.positions == "alibi" and not config.causal:
        raise ValueError("model.positions=alibi counts how far back a token is, so it needs model.causal; use other positions")
    for knob in ("token_types", "labels"):
        if getattr(config, knob) < 0:
            raise ValueError(f"model.{knob}={getattr(config, knob)} must be at least 0")
    if (config.head in ("classifier", "tokens")) != (config.labels > 0):
        raise ValueError(
            f"model.labels={config.labels} with model.head={config.head}: labels are of classifier and tokens; set both or neither"
        )
    if config.head == "projection" and not hasattr(config, "summary"):
        raise ValueError("model.head=projection is of what reads images or captions (lmx.models.vision_config), not of any transformer")
    if config.head_bias and not config.vocabulary_head:
        raise ValueError(f"model.head_bias is of logits of the vocabulary, which model.head={config.head} does not give")
    if config.embed_size is not None and config.head == "lm" and config.tied:
        raise ValueError(
            f"model.embed_size={config.embed_size} with model.head=lm: the embedding table is no head for hidden states of another width; "
            "set model.tied to False, or model.head to masked"
        )
    if config.shared_layers and config.layers % len(config.pattern):
        raise ValueError(
            f"model.layers={config.layers} is no multiple of the {len(config.pattern)} of model.pattern, which model.shared_layers repeats"
        )


def _check_pair(config: EncoderDecoder) -> None:
    encoder = config.encoder
    for knob in ("vocab", "embed"):
        if getattr(encoder, knob) != getattr(config, knob):
            raise ValueError(
                f"model.encoder.{knob}={getattr(encoder, knob)} is not model.{knob}={getattr(config, knob)}, and both read one embedding"
            )
    if encoder.dropout != config.dropout:
        raise ValueError(f"model.encoder.dropout={encoder.dropout} is not model.dropout={config.dropout}; set both to one rate")
    if isinstance(encoder, EncoderDecoder):
        raise ValueError("model.encoder has an encoder itself; give it a Transformer")
    if not encoder.tied or encoder.head_bias:
        raise ValueError("model.encoder has no head: leave its tied and head_bias as they are")
    if "transformer_xl" in (config.positions, encoder.positions):
        raise ValueError("model.positions=transformer_xl is of a stack of its own, not of an encoder-decoder; use relative")
    if config.parallel:
        raise ValueError("model.parallel is of layers with two sublayers; one that attends to an encoder has three")
    try:
        check(encoder)
    except ValueError as error:
        raise ValueError(str(error).replace("model.", "model.encoder.")) from error


def _check_experts(config: Transformer) -> None:
    for knob in ("experts", "shared_experts"):
        if getattr(config, knob) < 0:
            raise ValueError(f"model.{knob}={getattr(config, knob)} must be at least 0")
    for knob, unset in (("shared_mlp", None), ("shared_gate", False)):
        if getattr(config, knob) != unset and not config.shared_experts:
            raise ValueError(f"model.{knob}={getattr(config, knob)} is of shared experts; set model.shared_experts, or leave it {unset}")
    if not config.experts:
        for knob, unset in (("expert_mlp", None), ("expert_capacity", None), ("shared_experts", 0)):
            if getattr(config, knob) != unset:
                raise ValueError(f"model.{knob}={getattr(config, knob)} is of a mixture of experts; set model.experts, or leave it {unset}")
        if any(kind.endswith("_dense") for kind in config.pattern):
            raise ValueError(f"model.pattern={config.pattern} names dense layers, which only a model with model.experts tells from others")
        return
    if config.experts_per_token > config.experts:
        raise ValueError(f"model.experts_per_token={config.experts_per_token} is more than model.experts={config.experts}")
    if not config.mixtures:
        raise ValueError(
            f"model.experts={config.experts} but no layer of model.pattern={config.pattern} has them; name one global or local"
        )
    if config.expert_capacity is not None and not config.expert_capacity > 0:
        raise ValueError(f"model.expert_capacity={config.expert_capacity} must be above 0; 1.25 is usual, None drops nothing")
