"""What a training step costs each device, before anything is compiled: bytes, communication, FLOPs, time.

Nothing is allocated and no device is needed. What lies where follows from the parameter table and the rules, so it is exact; what
the backward pass keeps is counted from what the layers' derivatives take; what a layer holds while it works is an estimate of what XLA makes
of it. Sizes are of one device and in bytes, collectives as `lmx.parallel.hlo` reads them.
"""

import math
from dataclasses import replace
from functools import lru_cache

import jax

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.kernels.chunked import TILE
from lmx.parallel import manual, recurrent
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.offload import HOST
from lmx.parallel.rules import partition, rules
from lmx.parallel.tensor import chunks
from lmx.parallel.work import Work

REMATS = ("none", "dots", "full")
"""From the most that a layer keeps to the least."""
LESS = {"none": ("dots", "full"), "dots": ("full",), "sites": ("full",), "full": ()}
"""What keeps less than each."""


def held(tree: Tree, *, in_host: bool = False) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings (of an `AbstractMesh` too), or in its host's memory."""
    there = (a for a in jax.tree.leaves(tree) if (a.sharding.memory_kind == HOST) == in_host)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in there)


def share(spec: ParamSpec, layout: Layout, *, split: bool) -> int:
    """Numbers of a parameter on one device, where it multiplies or (`split`) where ZeRO puts it."""
    return _share(spec.axes, spec.shape, tuple(getattr(layout, axis) for axis in AXES), split)


@lru_cache(100_000)
def _share(axes: tuple[str | None, ...], shape: tuple[int, ...], degrees: tuple[int, ...], split: bool) -> int:
    sizes = dict(zip(AXES, degrees, strict=True))
    places = partition(axes, shape, rules(Layout(), split=split), sizes)
    return math.prod(shape) // math.prod(sizes[n] for n in manual.names(places))


def gradients(work: Work, specs: Tree) -> tuple[int, int]:
    """Bytes of all gradients, in the master type, and of the largest, of which there is a copy in another order at the end."""
    sizes = [work.master * share(spec, work.layout, split=work.layout.zero >= 1) for spec in jax.tree.leaves(specs, is_leaf=is_spec)]
    return sum(sizes), max(sizes)


def kept(work: Work, *, mixture: bool = False, cpu: bool = False) -> dict[str, int]:
    """Bytes that one layer keeps for its backward pass, by what they are."""
    here, remat = work.here, work.layout.remat
    tokens = here.rows * here.length
    if work.recurrent:
        return recurrent.kept(work)
    queries, keys = (tokens * n * work.head_dim * work.compute for n in (here.heads, here.kv_heads))
    hidden = tokens * here.mlp * work.compute * (2 if work.gated else 1)
    if mixture:
        hidden = (work.routed * here.expert_mlp + tokens * here.shared) * work.compute * (2 if work.gated else 1)
    activated = 0 if cpu else tokens * (here.shared if mixture else here.mlp) * work.compute
    returned = 4 * work.routed * work.embed  # what experts give, fp32, by which the gradients of the router's weights are formed
    asked = (
        queries if work.source else 0
    )  # of attention to another text: its queries, its keys (or values), and both as each head reads them
    there, shared = (here.rows * work.source * n * work.head_dim * work.compute for n in (here.kv_heads, here.heads))
    if remat == "full":
        return {"layer inputs": work.between}
    if remat == "sites":
        both = queries + asked
        sites = {"query": both, "key": keys + there, "value": keys + there, "mixed": both, "hidden": 0 if mixture else hidden}
        return {"layer inputs": work.between, "sites": sum(sites[site] for site in set(work.layout.sites))}
    if remat == "dots":
        outputs = work.between * (work.reads - 1 + work.after)
        routed = work.routed * work.embed * work.compute if mixture else 0
        return {"layer inputs": work.between, "products": outputs + queries + asked + 2 * (keys + there) + hidden + routed}
    read = work.reads - mixture
    parts = read if work.layout.collective_matmul else int(work.read_apart)
    found = {
        "inputs of norms": work.norms * work.between,
        "inputs of projections": (read - parts) * work.whole + parts * work.between + queries + asked,
        "queries, keys, values": (3 * queries if work.dense else (2 if work.fused else 1) * queries + 2 * keys)
        + (asked + 2 * (shared if work.dense_across else there))
        + (queries + asked + keys + there if work.qk_norm else 0),
        "feed-forward": hidden + activated,
    }
    if mixture:
        copies = work.routed * work.embed * work.compute + (work.whole if here.shared else 0)
        found |= {"router": 4 * work.between // work.compute + 4 * tokens * work.experts * (work.choices + 3)}
        found |= {"tokens of experts": copies + returned}
    scores, sums = tokens * here.heads * here.length, 4 * tokens * here.heads
    if work.dropout:  # the textbook's attention, all fp32: exponentials, masks and what both make
        found["queries, keys, values"] = 4 * (queries + asked + 2 * (keys + there)) // work.compute
        dropped = (3 if work.source else 2) * work.between
        return found | {"attention weights": 12 * (scores + work.across), "dropout masks": dropped}
    weights = scores * work.compute * work.dense + work.across * work.compute * work.dense_across
    found |= {"attention weights": weights, "attention sums": sums * (not work.dense) + sums * (not work.dense_across and work.source > 0)}
    return {name: size for name, size in found.items() if size}


def activations(work: Work, *, cpu: bool = False) -> dict[str, int]:
    """Bytes that the layers which a device runs one after another keep together, an encoder's too."""
    found: dict[str, int] = {} if work.encoder is None else activations(work.encoder, cpu=cpu)
    if work.embed_norm:
        found["embeddings"] = found.get("embeddings", 0) + 2 * work.between
    for layers, mixture in ((work.depth - work.mixed, False), (work.mixed, True)):
        for name, size in kept(work, mixture=mixture, cpu=cpu).items() if layers else ():
            found[name] = found.get(name, 0) + layers * size // (work.period if name == "layer inputs" else 1)
    return found


def mask(work: Work) -> int:
    """Bytes of the attention masks, computed once for all layers: in fp32 where every score is formed; cuDNN's in the compute type, beside
    the booleans that it comes from. Tiles have theirs for the moment. And of relative positions: each key's bucket, and its bias in fp32."""
    size = work.compute + 1 if work.fused else 4 if work.dense else 0
    found = work.here.rows * work.length * (size * work.masks * work.length + 4 * work.source * work.dense_across)
    return found + (4 * (work.scores + work.here.rows * work.length**2) if work.relative else 0)


def working(work: Work, specs: Tree, *, cpu: bool = False) -> int:
    """Bytes that the backward pass of one layer holds beside what is kept: the larger of attention's and the feed-forward's."""
    here, layout = work.here, work.layout
    tokens = here.rows * here.length
    queries, keys = (tokens * heads * work.head_dim for heads in (here.heads, here.kv_heads))
    scores = work.scores
    weights = _weights(work, specs, gradients=True, cpu=cpu)
    if layout.remat == "full" and layout.devices > 1 and not cpu:  # a layer's gradients are reduced in the next one's turn
        weights += layer_numbers(specs, layout) * work.master
    copies = int(_ahead(work, cpu))  # of the next layer's parameters
    if work.recurrent and layout.formed_again and not cpu:  # and of what each mixture of tokens multiplies, measured
        copies += 4
    weights += copies * layer_numbers(specs, layout) * work.compute
    if work.recurrent:
        return weights + recurrent.working(work, cpu=cpu)
    attention = _attending(work, here.length, scores, dense=work.dense, fused=work.fused, cpu=cpu)
    if work.source:
        attention = max(attention, _attending(work, work.source, work.across, dense=work.dense_across, fused=False, cpu=cpu))
    # What enters and what comes back, both whole, and the gradient through each projection before they are summed.
    again = layout.tensor > 1 and layout.formed_again and not cpu
    feed = ((5 if work.gated else 3) + (not cpu and not again)) * tokens * here.mlp * work.compute + (4 if work.gated else 3) * work.whole
    if work.mixed:
        dense = feed if work.mixed < work.depth else 0
        feed = max(dense, _experts_working(work, cpu=cpu))
        if layout.remat != "none" and not cpu:  # by then the layer's attention has been formed again
            feed += scores * work.compute + (3 * queries + 2 * keys) * work.compute
    if again:
        weights = max(weights, 5 * work.whole)  # what is gathered, and formed again, before gradients are there
    found = max(attention + work.whole, feed) + weights
    if layout.collective_matmul and not cpu:  # parts that came by, which the backward pass's second way round finds again
        found += (8 if layout.formed_again else 2) * (work.whole + work.read)
    everything = replace(work, layout=replace(layout, remat="none"))
    anew = {name: size for name, size in kept(everything, mixture=work.mixed > 0, cpu=cpu).items() if layout.remat != "none"}
    if not cpu:
        return found + (work.period - 1) * sum(anew.values())
    if _forms_again(work):
        found = _formed_again(work) + weights
    else:
        found += sum(size for name, size in anew.items() if name != "attention weights") + 4 * work.whole
        # Of attention to another text, and of the layer's own, one's weights are there while the other is worked on.
        found += work.across * work.compute + (min(work.scores, work.across) * work.compute if anew else 0)
    if work.mixed and work.capacity is None:  # rows are padded before they are cut in tiles, for part of the time
        found += work.routed * work.embed * work.compute // 2
    return found + (work.period - 1) * (sum(kept(everything, cpu=cpu).values()) + attention // 2)


def _ahead(work: Work, cpu: bool) -> bool:
    """Whether a layer's parameters, and a table that is read twice, are there before their turn."""
    return work.layout.ahead and not (cpu or work.one_layer)


def _forms_again(work: Work) -> bool:
    """Whether `_formed_again` says what XLA:CPU holds."""
    return work.layout.remat != "none" and work.dense and not (work.dropout or work.source or work.mixed)


def _formed_again(work: Work) -> int:
    """Bytes that a layer's backward pass holds on XLA:CPU where it begins by forming what the layer does not keep.

    All of attention is there by the feed-forward's turn, which is the fullest moment: exponentials, weights and, of several rows, the zeros
    that a product is added to, all fp32; queries, keys, values and what they give, as each head reads them. Read from the live ranges of
    compiled steps.
    """
    here = work.here
    tokens = here.rows * here.length
    queries, keys = (tokens * heads * work.head_dim * work.compute for heads in (here.heads, here.kv_heads))
    attention = 4 * work.scores * (3 if here.rows > 1 else 2) + 4 * queries + (queries + keys if work.qk_norm else 0)
    hidden = tokens * here.mlp * work.compute
    # Hidden states and their gradients; then the gradient through each projection, before they are summed and split along the sequence.
    whole = work.between if work.layout.collective_matmul else work.whole
    feed = max(3 * whole + (6 if work.gated else 4) * hidden, 6 * whole + (4 if work.gated else 3) * hidden)
    return attention + feed + (6 + work.norms) * work.between


def _attending(work: Work, length: int, scores: int, *, dense: bool, fused: bool, cpu: bool) -> int:
    """Bytes that the backward pass of attention to keys of a length holds."""
    here, layout = work.here, work.layout
    queries = here.rows * here.length * here.heads * work.head_dim
    keys = here.rows * length * here.kv_heads * work.head_dim
    if work.dropout:  # the textbook's attention, and the masks' random bits
        return scores * (26 if cpu else 19 if layout.remat == "dots" else 14) + 4 * queries * work.compute
    if fused:
        return (4 * queries + 4 * keys) * work.compute
    if dense:
        return scores * (4 + 2 * work.compute) + 4 * queries * work.compute
    tile = min(TILE, length)
    hop = 16 * keys if layout.context > 1 and layout.exchange == "ring" else 0
    return hop + (8 if cpu else 24) * here.rows * here.heads * tile**2 + 8 * (queries + keys) + 2 * (queries + keys) * work.compute


def _experts_working(work: Work, *, cpu: bool) -> int:
    """Bytes that a mixture's backward pass holds: rows in every form, and where each row goes through its own expert's matrix, XLA:GPU's
    ragged products, which are dense: every row once for every expert."""
    here, rows, c = work.here, work.routed, work.compute
    projections = 2 if work.gated else 1
    if cpu:
        of_hidden, of_embed = (projections + 1, 3) if work.capacity is not None else (projections + 2, 5)
    else:
        of_hidden, of_embed = 2 * projections + 1, 5 if work.capacity is not None else 3
    if work.layout.expert > 1 and work.capacity is not None and not cpu:  # sent, received, and in order of experts
        of_hidden, of_embed = 2 * of_hidden, 6
    found = rows * (of_hidden * here.expert_mlp + of_embed * work.embed) * c
    if work.capacity is None and not cpu:
        found += here.experts * rows * ((projections + 1) * here.expert_mlp + 2 * work.embed) * c
    shared = (2 * projections + 1) * here.rows * here.length * here.shared * c
    return found + shared + 4 * work.whole * work.layout.expert


def _forward(work: Work, specs: Tree) -> int:
    """Bytes that the forward pass of one layer holds beside what is kept."""
    here = work.here
    tokens = here.rows * here.length
    scores = tokens * here.heads * here.length * (4 + work.compute) if work.dense else 0
    feed = (2 if work.gated else 1) * tokens * here.mlp * work.compute
    return max(scores, feed) + 3 * work.whole + _weights(work, specs, gradients=False)


def _weights(work: Work, specs: Tree, *, gradients: bool, cpu: bool = False) -> int:
    """Bytes of one layer's parameters as they multiply, where they are not at rest so, and of their gradients before reduction."""
    copied = (work.layout.zero == 3 and work.layout.fsdp > 1) or work.compute != work.master
    turned = (
        2 if work.mixed and not (cpu and work.capacity is not None) else 1
    )  # gradients of experts are formed with the experts in another place
    return layer_numbers(specs, work.layout) * (work.compute * copied + work.master * gradients * turned)


def layer_numbers(specs: Tree, layout: Layout) -> int:
    """Numbers of one layer's parameters where they multiply (the largest layer's, where patterns differ)."""
    places = [place for group in specs["layers"] for place in group.values()]
    return max(
        sum(share(spec, layout, split=False) // (spec.shape[0] // layout.pipeline) for spec in jax.tree.leaves(place, is_leaf=is_spec))
        for place in places
    )


def loss_working(work: Work, *, cpu: bool = False) -> int:
    """Bytes that head and loss hold: a chunk of logits with its gradient, the head, and its gradient (XLA:CPU adds to it what it makes
    apart)."""
    here = work.here
    tokens, table = here.rows * here.length, here.vocab * work.read_out
    parts = chunks(here.rows, here.length, here.vocab, cpu=cpu)
    copies = (2 if cpu and parts > 1 else 1) * work.master + (work.compute if work.compute != work.master or work.layout.zero == 3 else 0)
    return tokens // parts * here.vocab * (8 + work.compute) + copies * table + 2 * tokens * work.read_out * work.compute


def loss_kept(work: Work) -> int:
    """Bytes that the head's gradient is formed of, beside the fullest layer: the gradient of logits, and hidden states of all tokens. XLA:GPU
    forms it behind the backward passes of layers, where nothing waits for it; that of logits in parts is summed in a loop, and leaves nothing. Where
    attention forms scores, the room that `working` has for these holds it too: they come and go within a layer."""
    here = work.here
    if not work.fused or chunks(here.rows, here.length, here.vocab, cpu=False) > 1:
        return 0
    return here.rows * here.length * here.vocab * work.compute + work.whole


def memory(
    work: Work,
    specs: Tree,
    *,
    parameters: int,
    optimizer: int,
    rest: int,
    fetched: tuple[int, int] = (0, 0),
    moving: tuple[float, float] = (0.0, 0.0),
    cpu: bool = False,
) -> dict[str, int]:
    """Bytes of one device by row: what lies there all along (given), then what a step adds at its fullest moment.

    That is the fullest of four: the last layer's forward pass; head and loss, with every layer's activations; the backward pass of a
    layer, with gradients besides; the update, with gradients. A pipeline's moments are those of a tick. `fetched` is what is there at once of what
    waits in the host's memory, `moving` what an optimizer makes, for each gradient: in a pass, and in the update.
    """
    (grads, largest), layout = gradients(work, specs), work.layout
    updated = work.master * sum(share(spec, layout, split=False) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    ahead, made = (int(numbers * grads) for numbers in moving)
    update = {"gradients": grads, "update": updated + made if layout.zero in (1, 2) and layout.fsdp > 1 else max(largest, made)}
    moments = _of_a_pass(work, specs, cpu=cpu) if work.flow is None else _of_a_tick(work, specs, cpu=cpu)
    sums = {"gradients of earlier microbatches": grads} if work.microbatches > 1 and work.flow is None else {}
    there = [(moment | {"update": ahead}, fetched[0]) for moment in moments] + [(update, fetched[1])]
    fullest = max((moment | {"fetched from the host": size} for moment, size in there), key=lambda moment: sum(moment.values()))
    added = {name: size for name, size in (sums | fullest).items() if size}
    return {"parameters": parameters, "optimizer": optimizer, "batch and the rest": rest} | added


def _of_a_pass(work: Work, specs: Tree, *, cpu: bool) -> list[dict[str, int]]:
    (grads, largest), layout = gradients(work, specs), work.layout
    kept_here, unreduced = _kept_on_device(work, cpu=cpu), _unreduced(work)
    if work.encoder is not None:
        return _of_two_passes(work, specs, cpu=cpu)
    table = work.here.vocab * work.table
    read = table * (work.compute + (work.master if layout.zero == 3 and layout.fsdp > 1 else 0))
    masked = {"attention mask": mask(work)}
    busy = working(work, specs, cpu=cpu) + (grads if _copied(work, cpu) else largest)
    waiting = 0 if cpu else loss_kept(work)
    early = table * (work.master + work.compute) if work.tied and _ahead(work, cpu) else 0
    return [
        {**kept_here, **masked, "working set of a layer": _forward(work, specs) + read},
        {**kept_here, **masked, "head and loss": loss_working(work, cpu=cpu)},
        {
            **kept_here,
            **masked,
            "gradient of logits": waiting,
            "gradients": grads,
            "gradient of the head, whole": 0 if waiting else unreduced,
            "working set of a layer": busy + early,
        },
    ]


def _copied(work: Work, cpu: bool) -> bool:
    """Whether there is another copy of all gradients: on XLA:CPU in another order, or parameters in the order in which they are gathered."""
    layout = work.layout
    again = layout.remat != "none"
    if not cpu or (work.recurrent and layout.devices == 1) or (layout.context > 1 and layout.exchange == "ring" and again):
        return False
    return not (again and work.dense) or (layout.zero == 3 and layout.fsdp > 1)


def _kept_on_device(work: Work, *, cpu: bool) -> dict[str, int]:
    found = activations(work, cpu=cpu)
    if "activations" in work.layout.offload:  # one layer's are used, one's on their way
        return {name: min(2, work.depth) * size // work.depth for name, size in found.items()}
    return found


def _of_two_passes(work: Work, specs: Tree, *, cpu: bool) -> list[dict[str, int]]:
    """Of an encoder-decoder: the decoder's moments, each beside all that the encoder keeps, what it gives and the gradient of that; then the
    encoder's backward pass, when the decoder's gradients are there."""
    encoder, own = work.encoder, {name: part for name, part in specs.items() if name != "encoder"}
    beside = {name: size for name, size in _kept_on_device(encoder, cpu=cpu).items() if size}
    masks, (grads, largest) = mask(encoder), gradients(encoder, specs["encoder"])
    moments = []
    for moment in _of_a_pass(replace(work, encoder=None), own, cpu=cpu):
        both = {name: moment.get(name, 0) + beside.get(name, 0) for name in moment | beside}
        if cpu and "gradients" in moment:  # which has room for the encoder's from the beginning
            both["gradients"] += 2 * grads
            both["working set of a layer"] = both.get("working set of a layer", 0) + 4 * encoder.scores * encoder.relative
        moments.append(both | {"attention mask": moment["attention mask"] + masks, "source": 2 * work.read})
    every = gradients(work, specs)[0]
    busy = working(encoder, specs["encoder"], cpu=cpu) + (every if _copied(encoder, cpu) else largest)
    last = {"attention mask": masks, "gradients": every, "gradient of the head, whole": _unreduced(work), "working set of a layer": busy}
    if cpu and work.relative:  # whose gradient is summed last of all
        last |= {"attention mask": masks + mask(work), "source": work.read}
    return [*moments, beside | last]


def _of_a_tick(work: Work, specs: Tree, *, cpu: bool) -> list[dict[str, int]]:
    """Head and loss, and the backward pass of a layer, in the tick of a pipeline that does both a forward and a backward."""
    (grads, _), layout, rounds = gradients(work, specs), work.layout, work.layout.rounds
    kept_here, unreduced = _kept_on_device(work, cpu=cpu), _unreduced(work)
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    outer = work.master * sum(share(spec, layout, split=layout.zero >= 1) for spec in leaves if not spec.layers)
    layers = work.master * sum(share(spec, layout, split=layout.zero == 3) for spec in leaves if spec.layers)
    masked = {"attention mask": mask(work)}
    # A stage's gradients are formed apart from the sum so far; those of head and embedding likewise.
    formed = (grads - outer) // rounds
    # One stage of several is taken out of the device's layers, and its gradients are put back.
    taken = {"layers of a stage": layers // rounds + formed} if rounds > 1 else {}
    if work.mixed:  # in another order too
        formed += formed // 2
    if cpu and work.written_out:  # whose stacks and masks XLA:CPU makes before the loop
        kept_here, formed = {name: 2 * size for name, size in kept_here.items()}, 2 * formed
        scores = 4 * work.scores * (work.dropout + work.period - 1)
        masked = {"attention mask": 4 * mask(work) + scores}
    elif work.written_out:  # and XLA:GPU the masks alone
        masked = {"attention mask": 2 * mask(work)}
    flowing = {"stage inputs": work.flow.kept * work.between, "on their way": 2 * work.between, "gradients so far": grads}
    common = flowing | kept_here | taken
    busy = working(work, specs, cpu=cpu) + 4 * work.whole
    return [
        common | masked | {"gradient of the head, whole": unreduced + outer, "head and loss": loss_working(work, cpu=cpu)},
        common
        | masked
        | {"gradients of a stage": formed, "gradients of head and embedding": 2 * outer + unreduced, "working set of a layer": busy},
    ]


def _unreduced(work: Work) -> int:
    """Bytes of the head's gradient, which is reduced last, with the embedding's."""
    return work.here.vocab * work.read_out * work.master if work.layout.zero >= 1 and work.layout.fsdp > 1 else 0
