"""What an RWKV is: one frozen value."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

VERSIONS = {"head_dim": (5, 6, 7), "head_norm_epsilon": (5, 6, 7), "mix_rank": (6,), "decay_rank": (6, 7)}
VERSIONS |= dict.fromkeys(("rate_rank", "value_rank", "gate_rank"), (7,))
"""Settings that not every version has."""


@dataclass(frozen=True)
class RWKV:
    """A decoder whose layers carry a state of constant size from token to token: RWKV-4 (Peng et al., 2023, arXiv 2305.13048), 5 and 6 (Eagle
    and Finch: Peng et al., 2024, arXiv 2404.05892), 7 (Goose: Peng et al., 2025, arXiv 2503.14456).

    Token embedding and its norm, a stack of layers (time mixing, channel mixing, a LayerNorm before each), a final norm, a head.
    """

    version: Literal[4, 5, 6, 7] = 4
    """4: each channel of time mixing keeps a weighted mean. 5: each head keeps a matrix, of keys by values. 6: how much of it is forgotten, and
    how much of the token before is mixed in, depends on the token. 7: a token also replaces part of what the matrix holds at a place."""

    vocab: int = 0
    """Rows of the embedding table. 0: the tokenizer's vocabulary, rounded up to a multiple of 8."""
    layers: int = 4
    """Layers in the stack."""
    embed: int = 128
    """Width of the residual stream."""
    channels: int | None = None
    """Width of time mixing. None: that of embed."""
    head_dim: int = 64
    """Width of a head of time mixing (from 5 on)."""
    head_norm_epsilon: float = 64e-5
    """Added to the variance of what a head reads, which is normalised (from 5 on)."""
    mix_rank: int = 32
    """Rank of what a token adds to the shares of the token before (6)."""
    decay_rank: int = 64
    """Rank of what a token adds to decays (6, 7)."""
    rate_rank: int = 64
    """Rank of what a token adds to the rate at which it replaces (7)."""
    value_rank: int = 32
    """Rank of what a token adds to the share of the first layer's value in its own (7)."""
    gate_rank: int = 128
    """Rank of the gate (7)."""
    mlp: int | None = None
    """Width of channel mixing's hidden layer. None: 4 x embed; in 5 and 6, 3.5 x embed as a multiple of 32."""
    context: int = 1024
    """Longest sequence. Nothing of the model depends on it."""
    norm_epsilon: float = 1e-5
    """Added to the variance by every norm but the last."""
    final_norm_epsilon: float = 1e-5
    """Added to the variance by the last norm."""
    rescale_every: int = 0
    """The residual stream is halved after every so many layers, and as much smaller what later layers add: fp16 does not overflow, and norms see
    the same but for their epsilon. 0: never."""
    tied: bool = False
    """Whether the head is the embedding table."""
    dropout: float = 0.0
    """Share dropped of embeddings and each sublayer's output, in training."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream start at this / sqrt(2 layers)."""

    pattern: ClassVar[tuple[str, ...]] = ("recurrent",)
    bias: ClassVar[bool] = False
    experts: ClassVar[int] = 0
    logit_softcap: ClassVar[None] = None
    logit_scale: ClassVar[None] = None
    head_bias: ClassVar[bool] = False
    head: ClassVar[str] = "lm"
    labels: ClassVar[int] = 0
    vocabulary_head: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    shared_layers: ClassVar[bool] = False
    token_types: ClassVar[int] = 0

    @property
    def width(self) -> int:
        return self.embed if self.channels is None else self.channels

    @property
    def heads(self) -> int:
        """Of time mixing."""
        return self.width // self.head_dim

    @property
    def hidden(self) -> int:
        if self.mlp is not None:
            return self.mlp
        return 4 * self.embed if self.version in (4, 7) else max(int(3.5 * self.embed) // 32 * 32, 32)


def check(config: RWKV) -> None:
    """Refuses a config that is no model, with one line that names the knob. Raises ValueError."""
    if config.channels is not None and config.channels < 1:
        raise ValueError(f"model.channels={config.channels} must be at least 1")
    for field in fields(config):
        versions, value = VERSIONS.get(field.name), getattr(config, field.name)
        if versions and config.version not in versions and value != field.default:
            said = " and ".join(map(str, versions))
            raise ValueError(f"model.{field.name}={value} is of model.version {said}, not of {config.version}; leave it out")
        if versions and not value > 0:
            raise ValueError(f"model.{field.name}={value} must be above 0")
    if config.version > 4 and config.width % config.head_dim:
        raise ValueError(
            f"the width of time mixing, {config.width} (model.channels, else model.embed), is not divisible by "
            f"model.head_dim={config.head_dim}"
        )
    if config.rescale_every < 0:
        raise ValueError(f"model.rescale_every={config.rescale_every} must be at least 0; 0 halves nothing")
