"""A training step, as far as its cost depends on it."""

from dataclasses import dataclass, replace
from functools import cached_property

from lmx.parallel.layout import Layout
from lmx.parallel.pipeline import Schedule, schedule


@dataclass(frozen=True)
class Work:
    """A step, as far as its cost depends on it: a model's sizes, a batch, types and a layout.

    Attributes:
      rows, microbatches, length: of one microbatch over all devices, how many there are, tokens of a row.
      table, read_out: width of the embedding tables, and of what the matrix of logits multiplies.
      one_layer: whether all repeats of the pattern have the same parameters.
      norms: norms of a layer.
      reads: how many normed inputs a layer reads (one where attention and feed-forward are parallel and share a norm).
      parallel: whether they are parallel.
      positions: rows of a table of learned positions, or 0.
      period: layers of the pattern that the stack repeats, of which rematerialisation recomputes all at once.
      masks: kinds of attention masks (all earlier tokens, a window) that are arrays.
      dense: whether attention forms every score (else in tiles).
      fused: whether attention is a kernel's, cuDNN's or our own, which forms neither; to cuDNN's a mask of segments is an array all the same.
      embed_norm: whether embeddings are normalised.
      after: whether a norm reads what a sublayer gives.
      head_bias: whether logits have one.
      mixtures: how many of the layers are mixtures of experts; then
      experts, choices, expert_mlp, shared: how many there are, how many a token takes, their width, that of the shared ones.
      shared_gate: whether what these give is gated.
      capacity: an expert's slots in a sequence, or None where it takes every token.
      recurrent: RWKV's version, whose channels are counted as heads of one dimension and form no score, or 0; then
      state: width of a head whose state is a matrix (from RWKV-5 on), and
      ranks: of its networks of low rank; RWKV-6's first is that of its shares of tokens together.
      relative: whether every layer adds a learned bias to its scores.
      source: tokens of another text's row that every layer attends to besides, or 0; then
      dense_across: whether that attention forms every score, and
      encoder: what reads that text.
      dropout: whether anything is dropped.
      compute, master: bytes of a number, of activations and of parameters.
      multiplies: what products are of (`lmx.core.precision.Precision.multiplies`).
    """

    layout: Layout
    rows: int
    microbatches: int
    length: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    table: int
    read_out: int
    one_layer: bool = False
    gated: bool = True
    norms: int = 2
    reads: int = 2
    parallel: bool = False
    qk_norm: bool = False
    tied: bool = True
    positions: int = 0
    period: int = 1
    masks: int = 1
    dense: bool = True
    fused: bool = False
    embed_norm: bool = False
    after: bool = False
    head_bias: bool = False
    mixtures: int = 0
    experts: int = 0
    choices: int = 0
    expert_mlp: int = 0
    shared: int = 0
    shared_gate: bool = False
    capacity: int | None = None
    recurrent: int = 0
    state: int = 1
    ranks: tuple[int, ...] = ()
    relative: bool = False
    source: int = 0
    dense_across: bool = True
    encoder: "Work | None" = None
    dropout: bool = False
    compute: int = 2
    master: int = 4
    multiplies: str = "bfloat16"

    @cached_property
    def here(self) -> "Work":
        """The same with the sizes of one device, inside a sublayer."""
        t = self.layout.tensor
        kv = self.kv_heads // t if self.kv_heads % t == 0 else max(1, self.kv_heads // t)
        return replace(
            self,
            rows=self.rows // self.layout.shards,
            length=self.length // self.layout.context,
            heads=self.heads // t,
            kv_heads=kv,
            mlp=self.mlp // t,
            experts=self.experts // self.layout.expert,
            expert_mlp=self.expert_mlp // t,
            shared=self.shared // t,
            vocab=self.vocab // t if self.vocab % t == 0 else self.vocab,
        )

    @property
    def replicated(self) -> bool:
        """Whether there are fewer key heads than tensor devices."""
        return self.kv_heads % self.layout.tensor != 0

    @property
    def read_apart(self) -> bool:
        """Whether what attention reads is kept in the tensor devices' parts, and gathered again."""
        return self.replicated and self.layout.remat == "none"

    @property
    def depth(self) -> int:
        """Layers that a device runs one after another: all, or those of a stage."""
        return self.layers // (self.layout.pipeline * self.layout.rounds)

    @property
    def mixed(self) -> int:
        """How many of these are mixtures."""
        return self.mixtures // (self.layout.pipeline * self.layout.rounds)

    @property
    def ticks(self) -> int:
        """How often in a step these layers run forwards, and backwards."""
        return self.microbatches if self.flow is None else self.flow.items + self.layout.pipeline - 1

    @property
    def forwards(self) -> int:
        """How often a layer runs forwards for each time backwards, beside what rematerialisation adds: a stage does again with its backward
        pass."""
        return 1 if self.flow is None else 2

    @property
    def written_out(self) -> bool:
        """Whether a pipeline's last phase is one tick, which is then no loop."""
        return self.flow is not None and self.flow.ticks[2] == 1

    @cached_property
    def flow(self) -> Schedule | None:
        return None if self.layout.pipeline == 1 else schedule(self.layout, self.microbatches)

    @property
    def routed(self) -> int:
        """Rows that one device's experts are given in a layer."""
        here = self.here
        if self.capacity is not None:
            return self.experts * here.rows * self.capacity
        return here.rows * here.length * self.choices * self.layout.expert

    @cached_property
    def scores(self) -> int:
        """Attention scores of a layer on one device."""
        here = self.here
        return 0 if self.recurrent else here.rows * here.length**2 * here.heads * self.layout.context

    @cached_property
    def across(self) -> int:
        """The same of attention to another text."""
        return self.here.rows * self.here.length * self.here.heads * self.source

    @cached_property
    def read(self) -> int:
        """Bytes of another text's hidden states, all of its length."""
        return self.here.rows * self.source * self.embed * self.compute

    @cached_property
    def whole(self) -> int:
        """Bytes of the residual stream inside a sublayer, where all of its length that context leaves is there."""
        return self.here.rows * self.here.length * self.embed * self.compute

    @cached_property
    def between(self) -> int:
        """Bytes of the residual stream between sublayers."""
        return self.whole // (self.layout.tensor if self.layout.sequence else 1)


def gathered_apart(work: Work, cpu: bool) -> tuple[bool, bool]:
    """Whether a layer of a pipeline gathers over tensor devices the gradient of what attention, and of what a feed-forward, gives once for its
    input's gradient and once for its weight's.

    Where devices sum weights' gradients; but XLA:CPU, where these devices split the gradient too, if the product's other operand is no larger.
    """
    layout, inner = work.layout, (work.heads * work.head_dim, work.mlp)
    summing = layout.shards * layout.context
    summed = layout.pipeline > 1 and summing > 1
    split = cpu and layout.zero >= 2 and layout.fsdp == summing
    return summed and not (split and inner[0] > work.embed), summed and not (split and inner[1] > work.embed)
