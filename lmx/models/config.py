"""What a transformer is: one frozen value."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu"]
Norm = Literal["layernorm", "rmsnorm"]
Placement = Literal["pre", "post", "sandwich"]
Positions = Literal["rope", "alibi", "learned", "sinusoidal", "none"]
LayerKind = Literal["global", "local"]


@dataclass(frozen=True)
class Transformer:
    """A decoder: token embedding, a stack of layers, a final norm, a head."""

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
    positions: Positions = "rope"
    """How tokens know where they are."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    norm: Norm = "rmsnorm"
    """Which normalisation."""
    norm_placement: Placement = "pre"
    """Where it stands: before each sublayer, after each residual sum, or before and after each sublayer (sandwich)."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Activation = "silu"
    """The feed-forward's nonlinearity."""
    gated: bool = True
    """Whether a second projection gates the feed-forward (SwiGLU and kin)."""
    parallel: bool = False
    """Whether attention and feed-forward read the same normalised input and are added together (GPT-J, PaLM)."""
    bias: bool = False
    """Whether linear layers and LayerNorms have biases."""
    tied: bool = True
    """Whether the head is the embedding table."""
    logit_softcap: float | None = None
    """Logits become c tanh(logits / c)."""
    attention_softcap: float | None = None
    """Attention scores become c tanh(scores / c)."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head."""
    window: int | None = None
    """How many tokens, itself included, a query of a local layer sees."""
    pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of layers, repeated over the stack; local layers use the window."""
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
    def hidden(self) -> int:
        return 4 * self.embed if self.mlp is None else self.mlp


def check(config: Transformer) -> None:
    """Refuses a config that is no model, with one line that names the knob. Raises ValueError."""
    for knob in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "context"):
        value = getattr(config, knob)
        if value is not None and value < 1:
            raise ValueError(f"model.{knob}={value} must be at least 1")
    if config.head_dim is None and config.embed % config.heads:
        raise ValueError(f"model.embed={config.embed} is not divisible by model.heads={config.heads}; change one, or set model.head_dim")
    if config.heads % config.key_heads:
        raise ValueError(f"model.heads={config.heads} is not divisible by model.kv_heads={config.kv_heads}; key heads are shared evenly")
    if config.positions == "rope" and config.head_size % 2:
        raise ValueError(f"rope turns pairs of dimensions, so model.head_dim={config.head_size} must be even")
    if not config.pattern:
        raise ValueError('model.pattern is empty; ("global",) is a stack of plain layers')
    if ("local" in config.pattern) != (config.window is not None):
        raise ValueError(
            f"model.window={config.window} with model.pattern={config.pattern}: the window is of local layers, so set both or neither"
        )
    if config.window is not None and config.window < 1:
        raise ValueError(f"model.window={config.window} must be at least 1 (a token sees itself)")
    if config.parallel and config.norm_placement == "post":
        raise ValueError('model.parallel needs model.norm_placement "pre" or "sandwich": a post-norm block is a series')
    for knob in ("logit_softcap", "attention_softcap"):
        if getattr(config, knob) is not None and not getattr(config, knob) > 0:
            raise ValueError(f"model.{knob}={getattr(config, knob)} must be above 0; None caps nothing")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout={config.dropout} must be at least 0 and below 1")
