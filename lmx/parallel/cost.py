"""What a training step costs each device, before anything is compiled: bytes, communication, FLOPs, time.

Nothing is allocated and no device is needed. What lies where follows from the parameter table and the rules, so it is exact; what
the backward pass keeps is counted from what the layers' derivatives take; what a layer holds while it works is an estimate of what XLA makes
of it. Sizes are of one device and in bytes, collectives as `lmx.parallel.hlo` reads them.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import jax

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree, name_of
from lmx.core.weights import NARROW
from lmx.kernels.chunked import TILE
from lmx.parallel import manual
from lmx.parallel.chips import Chip
from lmx.parallel.context import repeats
from lmx.parallel.layout import AXES, SHARDS, Layout, divisors
from lmx.parallel.rules import partition, rules
from lmx.parallel.tensor import chunks

REMATS = ("none", "dots", "full")
"""From the most that a layer keeps to the least."""


@dataclass(frozen=True)
class Work:
    """A step, as far as its cost depends on it: a model's sizes, a batch, types and a layout.

    Attributes:
      rows, microbatches, length: of one microbatch over all devices, how many there are, tokens of a row.
      norms: norms of a layer.
      reads: how often a layer reads its normed input (once where attention and feed-forward are parallel).
      positions: rows of a table of learned positions, or 0.
      masks: kinds of attention masks (all earlier tokens, a window).
      dense: whether attention forms every score (else in tiles).
      compute, master: bytes of a number, of activations and of parameters.
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
    gated: bool = True
    norms: int = 2
    reads: int = 2
    qk_norm: bool = False
    tied: bool = True
    positions: int = 0
    masks: int = 1
    dense: bool = True
    compute: int = 2
    master: int = 4

    @property
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
            vocab=self.vocab // t if self.vocab % t == 0 else self.vocab,
        )

    @property
    def whole(self) -> int:
        """Bytes of the residual stream inside a sublayer, where all of its length that context leaves is there."""
        return self.here.rows * self.here.length * self.embed * self.compute

    @property
    def between(self) -> int:
        """Bytes of the residual stream between sublayers."""
        return self.whole // (self.layout.tensor if self.layout.sequence else 1)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective of a step: kind and axes as in `lmx.parallel.hlo.Collective`, bytes of one, how often, and what for."""

    kind: str
    axes: tuple[str, ...]
    size: int
    times: int
    what: str

    @property
    def volume(self) -> int:
        return self.size * self.times


def held(tree: Tree) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings (of an `AbstractMesh` too)."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def share(spec: ParamSpec, layout: Layout, *, split: bool) -> int:
    """Numbers of a parameter on one device, where it multiplies or (`split`) where ZeRO puts it."""
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    places = partition(spec.axes, spec.shape, rules(layout, split=split), sizes)
    return math.prod(spec.shape) // math.prod(sizes[n] for n in manual.names(places))


def gradients(work: Work, specs: Tree) -> tuple[int, int]:
    """Bytes of all gradients, in the master type, and of the largest, of which there is a copy in another order at the end."""
    sizes = [work.master * share(spec, work.layout, split=work.layout.zero >= 1) for spec in jax.tree.leaves(specs, is_leaf=is_spec)]
    return sum(sizes), max(sizes)


def kept(work: Work) -> dict[str, int]:
    """Bytes that one layer keeps for its backward pass, by what they are."""
    here, remat = work.here, work.layout.remat
    tokens = here.rows * here.length
    queries, keys = (tokens * n * work.head_dim * work.compute for n in (here.heads, here.kv_heads))
    hidden = tokens * here.mlp * work.compute * (2 if work.gated else 1)
    if remat == "full":
        return {"layer inputs": work.between}
    if remat == "dots":
        return {"layer inputs": work.between, "products": work.between * (work.reads - 1 + (work.norms == 4)) + queries + 2 * keys + hidden}
    found = {
        "inputs of norms": work.norms * work.between,
        "inputs of projections": work.reads * work.whole + queries,
        "queries, keys, values": (3 * queries if work.dense else queries + 2 * keys) + (queries + keys if work.qk_norm else 0),
        "feed-forward": hidden,
    }
    if work.dense:
        return found | {"attention weights": tokens * here.heads * here.length * work.compute}
    return found | {"attention sums": tokens * here.heads * 4}


def mask(work: Work) -> int:
    """Bytes of the attention mask, fp32: XLA computes it once for all layers, tiles of chunked attention too."""
    here, n = work.here, work.layout.context
    parts = 1 if n == 1 else n - 1 if work.layout.exchange == "ring" else n**2
    return work.masks * 4 * here.rows * here.length**2 * parts


def working(work: Work, specs: Tree, *, cpu: bool = False) -> int:
    """Bytes that the backward pass of one layer holds beside what is kept: the larger of attention's and the feed-forward's."""
    here, layout = work.here, work.layout
    tokens, n = here.rows * here.length, work.layout.context
    queries, keys = (tokens * heads * work.head_dim for heads in (here.heads, here.kv_heads))
    if work.dense:
        attention = tokens * here.heads * here.length * n * (4 + 2 * work.compute) + 4 * queries * work.compute
    else:
        tile = min(TILE, here.length)
        row = 4 * tokens * (tile if layout.exchange == "ring" else tile * n)
        hop = 2 * 4 * tokens * here.length + 16 * keys if n > 1 and layout.exchange == "ring" else 0
        attention = (
            row + hop + (8 if cpu else 12) * here.rows * here.heads * tile**2 + 8 * (queries + keys) + 2 * (queries + keys) * work.compute
        )
    # What enters and what comes back, both whole, and the gradient through each projection before they are summed.
    feed = (5 if work.gated else 3) * tokens * here.mlp * work.compute + (4 if work.gated else 3) * work.whole
    found = max(attention + work.whole, feed) + _weights(work, specs, gradients=True)
    if cpu:
        anew = kept(replace(work, layout=replace(layout, remat="none"))) if layout.remat != "none" else {}
        found += sum(size for name, size in anew.items() if name != "attention weights") + 4 * work.whole
    return found


def _forward(work: Work, specs: Tree) -> int:
    """Bytes that the forward pass of one layer holds beside what is kept."""
    here = work.here
    tokens = here.rows * here.length
    scores = (
        tokens * here.heads * here.length * (4 + work.compute) if work.dense else 4 * tokens * work.layout.context * min(TILE, here.length)
    )
    feed = (2 if work.gated else 1) * tokens * here.mlp * work.compute
    return max(scores, feed) + 3 * work.whole + _weights(work, specs, gradients=False)


def _weights(work: Work, specs: Tree, *, gradients: bool) -> int:
    """Bytes of one layer's parameters as they multiply, where they are not at rest so, and of their gradients before reduction."""
    copied = (work.layout.zero == 3 and work.layout.fsdp > 1) or work.compute != work.master
    return layer_numbers(specs, work.layout) * (work.compute * copied + work.master * gradients)


def layer_numbers(specs: Tree, layout: Layout) -> int:
    """Numbers of one layer's parameters where they multiply (the largest layer's, where patterns differ)."""
    places = [place for group in specs["layers"] for place in group.values()]
    return max(
        sum(share(spec, layout, split=False) // spec.shape[0] for spec in jax.tree.leaves(place, is_leaf=is_spec)) for place in places
    )


def loss_working(work: Work, *, cpu: bool = False) -> int:
    """Bytes that head and loss hold: a chunk of logits with its gradient, the head, and its gradient (XLA:CPU adds to it what it makes
    apart)."""
    here = work.here
    tokens, table = here.rows * here.length, here.vocab * work.embed
    parts = chunks(here.rows, here.length, here.vocab)
    copies = (2 if cpu and parts > 1 else 1) * work.master + (work.compute if work.compute != work.master or work.layout.zero == 3 else 0)
    return tokens // parts * here.vocab * (8 + work.compute) + copies * table + 2 * work.whole


def memory(work: Work, specs: Tree, *, parameters: int, optimizer: int, rest: int, cpu: bool = False) -> dict[str, int]:
    """Bytes of one device by row: what lies there all along (given), then what a step adds at its fullest moment.

    That is the fullest of four: the last layer's forward pass; head and loss, with every layer's activations; the backward pass of a
    layer, with gradients besides; the update, with gradients alone.
    """
    (grads, largest), layout = gradients(work, specs), work.layout
    activations = {name: work.layers * size for name, size in kept(work).items()}
    table = work.here.vocab * work.embed
    read = table * (work.compute + (work.master if layout.zero == 3 and layout.fsdp > 1 else 0))
    # The head's gradient is reduced last, with the embedding's.
    unreduced = table * work.master if layout.zero >= 1 and layout.fsdp > 1 else 0
    # A mask in tiles is made anew where a layer is recomputed.
    masked = {"attention mask": mask(work)}
    masked_again = masked if work.dense or layout.remat == "none" else {}
    updated = work.master * sum(share(spec, layout, split=False) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    busy = working(work, specs, cpu=cpu) + (grads if cpu else largest)
    moments = [
        {**activations, **masked, "working set of a layer": _forward(work, specs) + read},
        {**activations, **masked_again, "head and loss": loss_working(work, cpu=cpu)},
        {**activations, **masked_again, "gradients": grads, "gradient of the head, whole": unreduced, "working set of a layer": busy},
        {"gradients": grads, "update": updated if layout.zero in (1, 2) and layout.fsdp > 1 else largest},
    ]
    sums = {"gradients of earlier microbatches": grads} if work.microbatches > 1 else {}
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return {"parameters": parameters, "optimizer": optimizer, "batch and the rest": rest, **sums, **fullest}


def traffic(work: Work, specs: Tree, *, cpu: bool = False) -> list[Traffic]:
    """The collectives of a step, larger ones first.

    Args:
      cpu: as XLA:CPU compiles it. It does not turn an all-reduce of which each device needs a part into a reduce-scatter (where code asks
        for one itself, as head and embedding do, it is one there too), sums the gradients of a sublayer's several projections one by
        one, and gathers weights once for recomputation and backward pass together.
    """
    found = [*_of_weights(work, specs, cpu), *_of_sublayers(work, cpu), *_of_ends(work, specs, cpu), *_of_attention(work)]
    return sorted((t for t in found if t.size and t.times and t.axes), key=lambda t: -t.volume)


def _over(layout: Layout, *axes: str) -> tuple[str, ...]:
    """Those of the axes that have devices, in the mesh's order."""
    return tuple(a for a in AXES if a in axes and getattr(layout, a) > 1)


def _of_weights(work: Work, specs: Tree, cpu: bool) -> list[Traffic]:
    """ZeRO: gathers of what is split, in the type it multiplies in (norms and biases: the master type); reductions of gradients; gathers
    of updated parameters. Each in a layer's turn; embedding and head reduce their gradients by themselves (`_of_ends`)."""
    layout, zero, found = work.layout, work.layout.zero, []
    fsdp, replicas, everyone = (_over(layout, *axes) for axes in (("fsdp",), ("data", "expert", "context"), (*SHARDS, "context")))
    table = {name_of(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    whole = {name: share(spec, layout, split=False) for name, spec in table.items()}
    parted = {name for name, spec in table.items() if share(spec, layout, split=True) < whole[name]}

    twice = "embed" if work.tied else ""  # read twice: gathered twice in half the bytes, or once in the master type

    def size(names: Iterable[str], *, master: bool = False) -> int:
        """Bytes of parameters, all layers together: of tables and matrices in the compute type, unless `master`."""
        return sum(whole[n] * (work.master if master or not _multiplies(table[n]) or n == twice else work.compute) for n in names)

    for inner, what in ((True, "of layers"), (False, "of embedding, head, final norm")):
        names = [n for n, spec in table.items() if bool(spec.layers) == inner]
        depth, mine = (work.layers if inner else 1), [n for n in names if n in parted]
        times = depth * work.microbatches
        if zero == 3 and mine:
            found.append(Traffic("all-gather", fsdp, size(mine) // depth, times, f"parameters {what}, forward"))
            weights = [n for n in mine if _multiplies(table[n])]
            if inner:
                found.append(Traffic("all-gather", fsdp, size(weights) // depth, times, f"parameters {what}, backward"))
            if inner and layout.remat != "none":
                again = [n for n in mine if n not in weights or (layout.remat == "full" and not cpu and "/down/" not in f"/{n}/")]
                found.append(Traffic("all-gather", fsdp, size(again) // depth, times, f"parameters {what}, recomputed"))
        reduced = [n for n in names if inner or not _at_ends(n)]
        scattered = [n for n in reduced if n in parted and (zero >= 2 or (zero == 1 and not cpu and not _narrow(table[n], layout)))]
        rest = [n for n in reduced if n not in scattered]
        total = size(scattered, master=True) // depth
        found.append(Traffic("all-reduce" if cpu else "reduce-scatter", fsdp, total, times, f"gradients {what}"))
        found.append(Traffic("all-reduce", replicas, total // layout.fsdp, times, f"gradients {what}"))
        found.append(Traffic("all-reduce", everyone, size(rest, master=True) // depth, times, f"gradients {what}"))
    if zero in (1, 2):
        found.append(Traffic("all-gather", fsdp, size(parted, master=True), 1, "updated parameters"))
    return found


def _multiplies(spec: ParamSpec) -> bool:
    return spec.inputs > 0 or "vocab" in spec.axes


def _at_ends(name: str) -> bool:
    return name.split("/")[0] in ("embed", "head", "positions")


def _narrow(spec: ParamSpec, layout: Layout) -> bool:
    """Whether a gradient is formed transposed behind a barrier (`lmx.core.weights.NARROW`), through which no reduce-scatter is seen."""
    if not spec.inputs or not spec.layers:
        return False
    into = math.prod(spec.shape[1 : 1 + spec.inputs])
    out = share(spec, layout, split=False) // (spec.shape[0] * into)
    return out <= NARROW and out < into


def _of_sublayers(work: Work, cpu: bool) -> list[Traffic]:
    """Megatron's: the residual stream gathered before, and summed after, attention and feed-forward; the same of its gradient."""
    axes, times, size, remat = _over(work.layout, "tensor"), work.layers * work.microbatches, work.whole, work.layout.remat
    replicated = work.kv_heads % work.layout.tensor != 0
    found, back = [], work.reads
    if cpu:
        back = (1 if replicated else 3) + (2 if work.gated else 1)
    if replicated:  # fewer key heads than devices: each has its part of their gradients
        keys = work.here.rows * work.here.length * work.kv_heads * work.head_dim * work.compute
        found.append(Traffic("all-reduce", axes, 2 * keys, times, "gradients of keys and values"))
    sums = 2 + back + (remat == "full" and work.reads == 2)
    if not work.layout.sequence:
        return [*found, Traffic("all-reduce", axes, size, sums * times, "residual stream")]
    gathers = 2 + work.reads + work.reads * (remat != "none")
    found.append(Traffic("all-gather", axes, size, gathers * times, "residual stream"))
    return [*found, Traffic("all-reduce" if cpu else "reduce-scatter", axes, size, sums * times, "residual stream")]


def _of_ends(work: Work, specs: Tree, cpu: bool) -> list[Traffic]:
    """Embedding, head and loss, which say themselves what they send."""
    layout, here, m, found = work.layout, work.here, work.microbatches, []
    tensor, fsdp, replicas = (_over(layout, *axes) for axes in (("tensor",), ("fsdp",), ("data", "expert", "context")))
    tokens = here.rows * here.length
    found.append(Traffic("all-reduce", tensor, 4 * tokens, 3 * m, "loss: largest logit, sum, target"))
    if layout.sequence:
        found.append(Traffic("all-gather", tensor, work.whole, 2 * m, "hidden states, and gradient of embeddings"))
        found.append(Traffic("reduce-scatter", tensor, work.whole, 2 * m, "embeddings, and gradient of hidden states"))
    else:
        found.append(Traffic("all-reduce", tensor, work.whole, 2 * m, "embeddings, and gradient of hidden states"))
    uses = {"embed": 2 if work.tied else 1, "head": 1, "positions": 1}
    for name, often in uses.items():
        if name in specs:
            size = often * share(specs[name], layout, split=False) * work.master
            if fsdp and layout.zero >= (2 if cpu else 1):
                found.append(Traffic("reduce-scatter", fsdp, size, m, f"gradient of {name}"))
                found.append(Traffic("all-reduce", replicas, size // layout.fsdp, m, f"gradient of {name}"))
            else:
                found.append(Traffic("all-reduce", _over(layout, *SHARDS, "context"), size, m, f"gradient of {name}"))
    return found


def _of_attention(work: Work) -> list[Traffic]:
    """Sequences split over devices: a ring sends keys and values round (and back their gradients, fp32), an all-to-all trades heads."""
    layout, here, n = work.layout, work.here, work.layout.context
    axes, times = _over(layout, "context"), work.layers * work.microbatches
    tokens = here.rows * here.length
    queries, keys = (tokens * heads * work.head_dim for heads in (here.heads, here.kv_heads))
    forwards = 1 if layout.remat == "none" else 2
    if layout.exchange == "ring":
        around = Traffic("collective-permute", axes, 2 * keys * work.compute, (forwards * (n - 1) + n) * times, "keys and values")
        return [around, Traffic("collective-permute", axes, 2 * 4 * keys, (n + 1) * times, "gradients of keys and values")]
    sent = 2 * (queries + keys * repeats(here.heads, here.kv_heads, n)) * work.compute
    return [Traffic("all-to-all", axes, sent, (forwards + 1) * times, "heads for positions")]


def moved(work: Work, parameters: int, optimizer: int) -> int:
    """Bytes through a device's memory in a step, at least: the state read and written once, weights read three times a microbatch, and
    what layers give written and read."""
    layers = work.layers * sum(kept(replace(work, layout=replace(work.layout, remat="none"))).values())
    return 2 * (parameters + optimizer) + work.microbatches * (3 * parameters * work.compute // work.master + 2 * layers)


@dataclass(frozen=True)
class Time:
    """Seconds of a step, each part as if it ran alone at the chip's peaks, and their sum as predicted.

    Attributes:
      compute: products, what is recomputed included.
      memory: bytes that must pass through the chip's memory: weights, activations, state.
      exposed: communication that products wait for (tensor, context, updated parameters).
      hidden: communication that can run beside products (ZeRO's gathers and reductions).
      step: predicted.
    """

    compute: float
    memory: float
    exposed: float
    hidden: float
    step: float


EFFICIENCY = 0.7
"""The share of its peak at which a chip runs large products, and of a link's at which collectives run; a guess until measured."""


def seconds(work: Work, collectives: list[Traffic], flops: float, chip: Chip, moved: int) -> Time:
    """The roofline: `flops` of a device, `moved` bytes through its memory."""
    kind = {2: "bfloat16", 4: "float32"}[work.compute]
    exposed = hidden = 0.0
    for one in collectives:
        spent = wire(one, work.layout) / link(one.axes, work.layout, chip) / EFFICIENCY
        if set(one.axes) & {"tensor", "context"} or one.times == 1:
            exposed += spent
        else:
            hidden += spent
    compute, memory_ = flops / chip.flops[kind], moved / chip.bandwidth
    step = max(max(compute / EFFICIENCY, memory_), hidden) + exposed
    return Time(compute, memory_, exposed, hidden, step)


def wire(one: Traffic, layout: Layout) -> float:
    """Bytes that a device sends for a collective in a step, by the ring algorithm."""
    n = math.prod(getattr(layout, axis) for axis in one.axes)
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(one.kind, (n - 1) / n)
    return one.volume * factor


def link(axes: tuple[str, ...], layout: Layout, chip: Chip) -> float:
    """Bytes a second of the slowest link between devices of these axes: within a host where they and all inner axes fit into one."""
    first = min(AXES.index(axis) for axis in axes)
    return chip.near if math.prod(getattr(layout, a) for a in AXES[first:]) <= chip.per_host else chip.far


def candidates(devices: int, batch: int, length: int, per_host: int) -> Iterator[tuple[dict, int]]:
    """Layouts of so many devices that are worth a plan, as fields of `Layout`, and how many microbatches: tensor within a host, context for
    long sequences, ZeRO over whole hosts or all shards, the batch cut in powers of two."""
    long = [c for c in divisors(devices) if c <= 16 and length // c >= 2048] or [1]
    for tensor, context in itertools.product((t for t in divisors(devices) if t <= per_host), long):
        shards = devices // (tensor * context)
        if devices % (tensor * context) or batch % shards:
            continue
        for fsdp in divisors(shards):
            if fsdp not in (1, shards) and fsdp * tensor * context % per_host:
                continue
            cuts = [m for m in divisors(batch // shards) if m & (m - 1) == 0]
            for zero, remat, m in itertools.product((3, 1) if fsdp > 1 else (3,), REMATS, cuts):
                yield {"data": shards // fsdp, "fsdp": fsdp, "zero": zero, "tensor": tensor, "context": context, "remat": remat}, m
