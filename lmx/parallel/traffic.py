"""The collectives of a training step, before anything is compiled: kinds, axes, bytes, and how often. As `lmx.parallel.hlo` reads them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree, name_of
from lmx.parallel import recurrent
from lmx.parallel.context import repeats
from lmx.parallel.cost import share
from lmx.parallel.layout import AXES, SHARDS, Layout
from lmx.parallel.work import Work, gathered_apart


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


TABLES = ("positions", "block_positions", "token_types")
"""Tables that are added to the tokens'."""
BETWEEN = ("embed_projection/weight", "transform/weight")
"""Matrices outside the layers, which multiply the residual stream as it is between sublayers."""


def traffic(work: Work, specs: Tree, *, cpu: bool = False) -> list[Traffic]:
    """The collectives of a step, larger ones first.

    A pipeline's are those of all its ticks, idle ones too, in which the embedding and the head are skipped when the program runs: so the
    compiled text says it, and so long devices wait.

    Args:
      cpu: as XLA:CPU compiles it. It does not turn an all-reduce of which each device needs a part into a reduce-scatter (where code asks
        for one itself, as head, embedding and experts do, it is one there too), sums the gradients of a sublayer's several projections one
        by one, and gathers tables once for all ticks of a pipeline.
    """
    if work.layout.remat == "sites":  # what is kept saves products, and the gathers of their weights
        work = replace(work, layout=replace(work.layout, remat="full"))
    own = {name: part for name, part in specs.items() if name != "encoder"}
    found = [*_of_stack(work, own, cpu), *_of_ends(work, specs, cpu), *_of_attention(work), *_of_pipeline(work, specs)]
    if work.encoder is not None:
        found += [*_of_stack(work.encoder, specs["encoder"], cpu), *_of_source(work)]
        found += _of_tables(work.encoder, specs["encoder"], dict.fromkeys(TABLES, 1), cpu)
    return sorted((t for t in found if t.size and t.times and t.axes), key=lambda t: -t.volume)


def _of_stack(work: Work, specs: Tree, cpu: bool) -> list[Traffic]:
    return [*_of_weights(work, specs, cpu), *_of_sublayers(work, cpu), *_of_experts(work)]


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

    # Read twice: gathered twice in half the bytes, or once in the master type. The ticks of a pipeline cannot share it.
    twice = "embed" if work.tied and layout.pipeline == 1 else ""

    def size(names: Iterable[str], *, master: bool = False) -> int:
        """Bytes of parameters, all layers of a device together: of tables and matrices in the compute type, unless `master`."""
        return sum(whole[n] * (work.master if master or not _multiplies(table[n]) or n == twice else work.compute) for n in names)

    for inner, what in ((True, "of layers"), (False, "of embedding, head, final norm")):
        names = [n for n, spec in table.items() if bool(spec.layers) == inner]
        layers = work.period if work.one_layer else work.layers // layout.pipeline
        depth, mine = (layers if inner else 1), [n for n in names if n in parted]
        times = work.depth * work.ticks if inner else work.ticks
        gathered = [n for n in mine if zero == 3 or _is_expert(table[n])] if zero >= 2 else []
        if gathered and inner and work.one_layer and cpu:  # which takes out of its loops what is the same all along
            found.append(Traffic("all-gather", fsdp, size(gathered), 1, f"parameters {what}"))
        elif gathered and inner:
            # In a loop that only reads, XLA:GPU sees that one layer is the same all along.
            forward = 1 if work.one_layer else work.forwards * times
            found.append(Traffic("all-gather", fsdp, size(gathered) // depth, forward, f"parameters {what}, forward"))
            weights = [n for n in gathered if _multiplies(table[n])]
            found.append(Traffic("all-gather", fsdp, size(weights) // depth, times, f"parameters {what}, backward"))
            if layout.remat != "none":
                vectors = [n for n in gathered if n not in weights]
                found.append(Traffic("all-gather", fsdp, size(vectors) // depth, times, f"parameters {what}, recomputed"))
        elif gathered:
            once = cpu and (layout.pipeline > 1 or work.one_layer)
            reads = 2 if work.tied and layout.pipeline > 1 and not cpu else 1
            of_table = sum(size([n]) * (reads if n == "embed" else 1) for n in gathered)
            found.append(Traffic("all-gather", fsdp, of_table, 1 if once else times, f"parameters {what}, forward"))
        reduced = [n for n in names if inner or not _at_ends(n)]
        scattered = [n for n in reduced if n in parted and (zero >= 2 or (zero == 1 and not cpu and _sliced(table[n], work)))]
        rest = [n for n in reduced if n not in scattered]
        # XLA:CPU has tensor devices form these each in part, and then puts them where they are to be.
        low = [n for n in scattered if cpu and _is_low(n, work)]
        total = size(low, master=True) // depth // layout.fsdp
        found.append(Traffic("all-reduce", everyone, total, times, f"gradients {what}, of low rank"))
        found.append(Traffic("collective-permute", _over(layout, "fsdp", "tensor"), total, times, f"gradients {what}, of low rank"))
        for part in ("", "experts", "gate"):
            experts = part == "experts"
            mine = [n for n in scattered if n not in low and _part(n, table[n], work) == part]
            total = size(mine, master=True) // depth
            kind = "all-reduce" if cpu and not (experts and zero >= 2) and not (inner and layout.collective_matmul) else "reduce-scatter"
            found.append(Traffic(kind, fsdp, total, times, f"gradients {what}"))
            found.append(Traffic("all-reduce", _summed_over(layout, part, replicas), total // layout.fsdp, times, f"gradients {what}"))
            mine = [n for n in rest if _part(n, table[n], work) == part]
            total = size(mine, master=True) // depth
            apart, summed = part == "gate" and cpu, _summed_over(layout, part, everyone)
            over = (_over(layout, "tensor"), everyone) if apart else (summed,) if experts else _one_by_one(summed, cpu)
            found += [Traffic("all-reduce", axes, total, times, f"gradients {what}") for axes in over]
    if zero in (1, 2):
        found.append(Traffic("all-gather", fsdp, size(parted, master=True), 1, "updated parameters"))
    return found


def _part(name: str, spec: ParamSpec, work: Work) -> str:
    """Which parameters have a gradient that is summed over other axes than the rest's: experts, and an RWKV's gate and what widens embeddings or
    narrows hidden states, of which each tensor device computes its part of the sequence."""
    gate = work.layout.sequence and ((work.recurrent and name.endswith("feedforward/receptance/weight")) or name in BETWEEN)
    return "experts" if _is_expert(spec) else "gate" if gate else ""


def _summed_over(layout: Layout, part: str, axes: tuple[str, ...]) -> tuple[str, ...]:
    if part == "experts":
        return tuple(axis for axis in axes if axis != "expert")
    return _over(layout, *axes, "tensor") if part == "gate" else axes


def _one_by_one(axes: tuple[str, ...], cpu: bool) -> tuple[tuple[str, ...], ...]:
    """XLA:CPU sums over devices that split sequences apart from those that split rows."""
    others = tuple(axis for axis in axes if axis != "context")
    return (others, ("context",)) if cpu and others and others != axes else (axes,)


def _is_low(name: str, work: Work) -> bool:
    """Whether a parameter of an RWKV's networks of low rank is one that every tensor device multiplies whole sequences by."""
    fsdp, tensor = work.layout.fsdp, work.layout.tensor
    return work.recurrent > 5 and tensor > 1 and tensor % fsdp == 0 and ("/down/" in name or name.endswith("/up/mix"))


def _multiplies(spec: ParamSpec) -> bool:
    return spec.inputs > 0 or "vocab" in spec.axes


def _is_expert(spec: ParamSpec) -> bool:
    return "experts" in spec.axes


def _at_ends(name: str) -> bool:
    return name.split("/")[0] in ("embed", "head", *TABLES)


def _sliced(spec: ParamSpec, work: Work) -> bool:
    """Whether XLA makes a reduce-scatter of a gradient's all-reduce because only a part is used: not where it is over more axes than the
    part's."""
    layout = work.layout
    return not any(getattr(layout, axis) > 1 for axis in ("data", "context")) and (layout.expert == 1 or _is_expert(spec))


def _of_sublayers(work: Work, cpu: bool) -> list[Traffic]:
    """Megatron's: the residual stream gathered before, and summed after, attention and feed-forward; the same of its gradient."""
    axes, times, size, remat = _over(work.layout, "tensor"), work.depth * work.ticks, work.whole, work.layout.remat
    if work.recurrent:
        return _of_recurrent(work, cpu)
    found, here = [], work.here
    if work.replicated:  # fewer key heads than devices: each has its part of their gradients
        keys = here.rows * here.length * work.kv_heads * work.head_dim * work.compute
        there = here.rows * work.source * work.kv_heads * work.head_dim * work.compute
        apart = work.read_apart and work.layout.sequence and not cpu  # one of them and the residual stream's together, and their weights'
        found.append(Traffic("all-reduce", axes, (1 if apart else 2) * (keys + there), times, "gradients of keys and values"))
        if apart:
            weights = 2 * work.embed * work.kv_heads * work.head_dim * work.master // work.layout.fsdp
            found.append(Traffic("reduce-scatter", axes, keys + there, times, "gradients of keys and values"))
            found.append(Traffic("all-reduce", axes, weights, times, "gradients of what gives keys and values"))
    # What a norm or the second sublayer reads is summed again where it is not kept.
    again = 0 if remat != "full" else 2 if work.after else 0 if work.parallel else work.reads - 1
    between = (
        (work.depth - work.depth // work.period) * work.ticks if remat == "full" and not work.after else 0
    )  # layers of a repeat but its last
    dense, mixed = (work.depth - work.mixed) * work.ticks, work.mixed * work.ticks
    shared = mixed if work.shared else 0
    if work.layout.collective_matmul:  # each product back and forth, and of the backward pass inputs and gradients once more
        n, fed = work.layout.tensor, dense + shared
        rounds = ((2 if work.source else 1) * times + fed) * (2 * work.forwards + 3) + again * times + between
        if work.parallel:  # what both sublayers read goes round once, and on GPUs the gradient of what both give
            rounds -= ((work.forwards + 1) * dense + (work.forwards + (remat != "none")) * shared) * (work.reads == 1) + (not cpu) * fed
        rounds += shared if work.shared_gate and remat == "full" else 0  # the gate's derivative reads the product again
        found.append(Traffic("collective-permute", axes, size // n, (n - 1) * rounds, "parts of the residual stream"))
        # The source is read forwards and backwards, and its gradient summed, in each layer; XLA:CPU takes what is read out of the loops.
        read = times + (1 if remat == "none" else 3) if cpu else 3 * times
        around = Traffic("collective-permute", axes, work.read // n, (n - 1) * read, "parts of the source, and of its gradient")
        gathers = Traffic("all-gather", axes, size, (work.forwards + 1 + (remat != "none")) * mixed, "tokens of experts")
        return [*found, around, gathers, *_of_mixtures(work)]
    # XLA:CPU sums the gradients of several projections of one input one by one.
    across = 1 if work.source else 0  # which reads the residual stream for its queries alone
    attention, feed = (1 if work.replicated else 3, 2 if work.gated else 1) if cpu else (1, work.reads - 1 - across)
    projected = (0 if work.replicated else 2) if cpu else 1
    if across:  # reduced as a whole: every layer reads all of it
        found.append(Traffic("all-reduce", axes, projected * work.read, times, "gradients of the source"))
    sums = ((2 + across) * work.forwards + again + attention + across) * times + feed * (dense + shared) + work.forwards * shared + between
    if not work.layout.sequence:
        return [*found, Traffic("all-reduce", axes, size, sums + 2 * mixed, "residual stream")]
    kept = work.reads if remat != "none" else 0
    gathers = (work.reads * work.forwards + 2 + across + kept) * times
    if work.reads == 1:  # a mixture gathers what it is given itself
        gathers += (work.forwards + (remat != "none")) * mixed
    gated = shared if work.shared_gate else 0  # reads its input again, but for the recomputed forward pass, which sums its product instead
    gathers += (work.forwards + 1 + (remat != "none")) * shared + (work.forwards - (remat != "none")) * gated
    sums += gated if remat == "full" else 0
    of_attention, of_feed = gathered_apart(work, cpu)
    gathers += of_attention * times + of_feed * (dense + shared)
    gathers += times if work.read_apart else 0
    found.append(Traffic("all-gather", axes, size, gathers, "residual stream"))
    sums -= work.forwards * mixed
    found += _of_mixtures(work)
    return [*found, Traffic("all-reduce" if cpu else "reduce-scatter", axes, size, sums, "residual stream")]


def _of_mixtures(work: Work) -> list[Traffic]:
    """What mixtures over tensor devices that split sequences gather and sum themselves: routing beside their tokens, and what experts give."""
    axes, here, mixed = _over(work.layout, "tensor"), work.here, work.mixed * work.ticks
    routing = 8 * here.rows * here.length * work.choices
    return [
        Traffic("all-gather", axes, routing, (work.forwards + (work.layout.remat != "none")) * mixed, "routing"),
        Traffic("reduce-scatter", axes, routing // 2, mixed, "gradients of routing"),
        Traffic("reduce-scatter", axes, work.whole, (work.forwards + 1) * mixed, "residual stream"),
    ]


def _of_recurrent(work: Work, cpu: bool) -> list[Traffic]:
    """The same of RWKV's time and channel mixing."""
    axes, times, size, first = _over(work.layout, "tensor"), work.depth * work.ticks, work.whole, work.ticks * (work.recurrent == 7)
    sums, gathers, low = recurrent.residual(work, cpu=cpu)
    found = [Traffic("all-reduce", axes, low, times, "gradients inside networks of low rank")]
    if not work.layout.sequence:
        return [*found, Traffic("all-reduce", axes, size, sums * times + first, "residual stream")]
    return [
        *found,
        Traffic("all-gather", axes, size, gathers * times + first, "residual stream"),  # and what the first layer's values are of
        Traffic("all-reduce" if cpu else "reduce-scatter", axes, size, sums * times + first, "residual stream"),
    ]


def _of_experts(work: Work) -> list[Traffic]:
    """Tokens to their experts and back (`lmx.models.experts`), and the same of gradients."""
    layout, here, times = work.layout, work.here, work.mixed * work.ticks
    axes, tokens = _over(layout, "expert"), here.rows * here.length
    forwards = work.forwards + (layout.remat != "none")
    if work.capacity is not None:
        slots = work.experts * here.rows * work.capacity * work.embed * work.compute
        return [Traffic("all-to-all", axes, slots, 2 * (forwards + 1) * times, "tokens to experts and back")]
    everyone, routing = layout.expert * work.whole, layout.expert * tokens * work.choices * 8
    return [
        Traffic("all-gather", axes, everyone, (forwards + 1) * times, "tokens to experts"),
        Traffic("all-gather", axes, routing, forwards * times, "routing"),
        Traffic("reduce-scatter", axes, everyone, (work.forwards + 1) * times, "tokens from experts"),
        Traffic("reduce-scatter", axes, routing // 2, times, "gradients of routing"),
    ]


def _of_ends(work: Work, specs: Tree, cpu: bool) -> list[Traffic]:
    """Embedding, head and loss, which say themselves what they send."""
    layout, here, m, found = work.layout, work.here, work.ticks, []
    tensor, fsdp = _over(layout, "tensor"), _over(layout, "fsdp")
    tokens = here.rows * here.length
    both = tokens * (work.table + work.read_out) * work.compute
    found.append(Traffic("all-reduce", tensor, 4 * tokens, 3 * m, "loss: largest logit, sum, target"))
    if layout.sequence:
        found.append(Traffic("all-gather", tensor, both, m, "hidden states, and gradient of embeddings"))
        found.append(Traffic("reduce-scatter", tensor, both, m, "embeddings, and gradient of hidden states"))
    else:
        found.append(Traffic("all-reduce", tensor, both, m, "embeddings, and gradient of hidden states"))
    if work.embed_norm and work.flow is not None:  # looked up again where a stage's backward pass begins
        kind = "reduce-scatter" if layout.sequence else "all-reduce"
        found.append(Traffic(kind, tensor, tokens * work.table * work.compute, m, "embeddings"))
    uses = {"embed": (2 if work.tied else 1) + (work.encoder is not None), "head": 1} | dict.fromkeys(TABLES, 1)
    head = "embed" if work.tied else "head"
    if work.head_bias and fsdp and layout.zero >= 1:  # with a column more, which does not divide
        size = share(specs[head], layout, split=False) * work.master
        found.append(Traffic("all-gather", fsdp, size * (work.tied and layout.zero == 3), m, "head, with its bias"))
        found.append(Traffic("all-reduce", _over(layout, *SHARDS, "context"), size, m, "gradient of head, with its bias"))
        uses[head] -= 1
    return found + _of_tables(work, specs, uses, cpu)


def _of_tables(work: Work, specs: Tree, uses: dict[str, int], cpu: bool) -> list[Traffic]:
    """Gradients of tables, of each as often as it is used."""
    layout, m, found = work.layout, work.ticks, []
    fsdp, replicas = _over(layout, "fsdp"), _over(layout, "data", "expert", "context")
    for name, often in uses.items():
        if name in specs:
            size = often * share(specs[name], layout, split=False) * work.master
            if fsdp and layout.zero >= (2 if cpu else 1):
                found.append(Traffic("reduce-scatter", fsdp, size, m, f"gradient of {name}"))
                found.append(Traffic("all-reduce", replicas, size // layout.fsdp, m, f"gradient of {name}"))
            else:
                found.append(Traffic("all-reduce", _over(layout, *SHARDS, "context"), size, m, f"gradient of {name}"))
    return found


def _of_source(work: Work) -> list[Traffic]:
    """What an encoder reads, and what it gives to every layer of a decoder."""
    axes, m = _over(work.layout, "tensor"), work.ticks
    if not work.layout.sequence:
        return [Traffic("all-reduce", axes, work.read, m, "embeddings of the source")]
    return [
        Traffic(
            "all-gather",
            axes,
            work.read,
            m * (1 if work.layout.collective_matmul else 3),
            "source, and gradients of it and of its embeddings",
        ),
        Traffic("reduce-scatter", axes, work.read, m, "embeddings of the source"),
    ]


def _of_attention(work: Work) -> list[Traffic]:
    """Sequences split over devices: a ring sends keys and values round, and their gradients, in fp32 until the last hop; an
    all-to-all trades heads."""
    layout, here, n = work.layout, work.here, work.layout.context
    axes, times = _over(layout, "context"), work.depth * work.ticks
    tokens = here.rows * here.length
    queries, keys = (tokens * heads * work.head_dim for heads in (here.heads, here.kv_heads))
    forwards = work.forwards + (layout.remat != "none")
    if layout.exchange == "ring":
        # Of two devices, what the backward pass sends is what the recomputed forward pass has just sent.
        sends = forwards if n == 2 and layout.remat != "none" else forwards + 1
        around = Traffic("collective-permute", axes, 2 * keys * work.compute, (sends * (n - 1) + 1) * times, "keys and values")
        return [around, Traffic("collective-permute", axes, 2 * 4 * keys, (n - 1) * times, "gradients of keys and values")]
    sent = 2 * (queries + keys * repeats(here.heads, here.kv_heads, n)) * work.compute
    return [Traffic("all-to-all", axes, sent, (forwards + 1) * times, "heads for positions")]


def _of_pipeline(work: Work, specs: Tree) -> list[Traffic]:
    """Activations to the next stage and gradients to the one before, each tick; what stages have of the outer parameters' gradients."""
    axes = _over(work.layout, "pipeline")
    outer = [share(spec, work.layout, split=work.layout.zero >= 1) for spec in jax.tree.leaves(specs, is_leaf=is_spec) if not spec.layers]
    return [
        Traffic("collective-permute", axes, work.between, 2 * work.ticks - work.written_out, "activations and their gradients"),
        Traffic("all-reduce", axes, work.master * sum(outer), 1, "gradients of embedding, head, final norm"),
    ]
