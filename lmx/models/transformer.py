"""The transformer as pure functions: a parameter table and one forward, of a decoder, an encoder, or a decoder with an encoder."""

import math
import zlib
from dataclasses import replace
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lmx.core.execution import Execution
from lmx.core.params import Normal, ParamSpec, is_spec
from lmx.core.tree import Tree, name_of
from lmx.core.weights import linear, whole
from lmx.kernels.masks import Mask
from lmx.kernels.wide import wide
from lmx.models import dropout as drop
from lmx.models import heads, norms, stack, transformer_xl
from lmx.models import sites as named
from lmx.models.attention import Context, Pages, project
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.dropout import Dropout
from lmx.models.experts import Aux
from lmx.models.linears import linear_specs
from lmx.models.positions import bucket_bias, buckets, sinusoids
from lmx.models.rope import by_length, rope_table, text_lengths
from lmx.models.sites import Edits
from lmx.parallel.attention import write_pages
from lmx.parallel.context import arrange
from lmx.parallel.rules import constrain, placed_outside
from lmx.parallel.tensor import lookup


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far, in a fixed number of slots shared by all rows.

    Attributes:
      layers: for each group of the stack, in the form of its parameters, `{"key", "value"}` of `[batch, kv_heads, slots, head_dim]`; and of
        an encoder's output, once it has been read, `{"source_key", "source_value"}`.
      positions: each slot's position in its own text, `[batch, slots]`.
      segments: 1 where a slot is used and 0 where it is empty or holds padding, `[batch, slots]`.
      used: the next free slot.
      source_segments: of the text that the encoder read.
    """

    layers: Tree
    positions: Int[Array, "batch slots"]
    segments: Int[Array, "batch slots"]
    used: Int[Array, ""]
    source_segments: Int[Array, "batch source"] | None = None


@flax.struct.dataclass
class Paged:
    """Keys and values in pages, of rows that come and go (`lmx.kernels.paged`): a forward reads new tokens of all rows, one after another in a
    batch of one.

    Attributes:
      layers: for each group of the stack a tuple of `{"key", "value"}` of `[pages, kv_heads, page, head_dim]`, and their scales where they
        are int8.
      pages: which of them the new tokens are written to and read.
    """

    layers: Tree
    pages: Pages


@flax.struct.dataclass
class Embedded:
    """Vectors in place of tokens' embeddings (of an image's patches, of a soft prompt); positions are added to them as to others.

    Attributes:
      vectors: what the first layer is to read there; others do not matter.
      where: which tokens they stand for.
    """

    vectors: Float[Array, "batch length embed"]
    where: Bool[Array, "batch length"]


@flax.struct.dataclass
class Source:
    """The text that an encoder reads, as `forward` takes one."""

    tokens: Int[Array, "batch source"]
    positions: Int[Array, "batch source"] | None = None
    segments: Int[Array, "batch source"] | None = None
    given: Embedded | None = None


@flax.struct.dataclass
class Output:
    """What a forward gives.

    Attributes:
      hidden: hidden states after the final norm, in the compute type.
      cache: the cache, if there was one, of whatever kind the model's is.
      aux: auxiliary values, a number a row, summed over layers (`lmx.models.experts.Aux`).
      taps: what `Execution.taps` asks for, by name (`lmx.models.sites`).
      encoded: hidden states of the encoder, where it has just read a source.
    """

    hidden: Float[Array, "batch length embed"]
    cache: Tree | None = None
    aux: Aux = flax.struct.field(default_factory=dict)
    taps: dict[str, Array] = flax.struct.field(default_factory=dict)
    encoded: Float[Array, "batch source embed"] | None = None


def specs(config: Transformer) -> Tree:
    """The parameter table."""
    tree = {
        "embed": ParamSpec((config.vocab, config.table_size), ("vocab", "embed"), init=Normal(config.init_std)),
        "layers": stack.specs(config),
    }
    norm = partial(norms.specs, config.norm, axis="embed", bias=config.bias, offset=config.norm_offset)
    tables = {"positions": config.context + config.first_position} if config.positions == "learned" else {}
    tables |= {"block_positions": config.context} if config.block_positions else {}
    tables |= {"token_types": config.token_types} if config.token_types else {}
    for name, rows in tables.items():
        tree[name] = ParamSpec((rows, config.table_size), (None, "embed"), init=Normal(config.init_std))
    if config.positions == "relative":
        tree["relative"] = ParamSpec((config.relative_buckets, config.heads), (None, "heads"), init=Normal(config.init_std))
    if config.embed_norm:
        tree["embed_norm"] = norm(config.table_size)
    if config.embed_size is not None:
        tree["embed_projection"] = linear_specs((config.embed_size,), (config.embed,), (None,), ("embed",), config)
    if config.norm_placement != "post":
        tree["norm"] = norm(config.embed)
    tree |= heads.specs(config)
    if isinstance(config, EncoderDecoder):
        tree["encoder"] = {name: spec for name, spec in specs(config.encoder).items() if name != "embed"}
    return tree


def empty_cache(config: Transformer, batch: int, slots: int, dtype=jnp.float32, *, unrolled: bool = True) -> Cache:
    """A cache with every slot free, for parameters as tuples of layers (`unrolled`) or stacked."""
    shape = (batch, config.key_heads, slots, config.head_size)

    def pair(*lead: int) -> Tree:
        return {name: jnp.zeros((*lead, *shape), dtype) for name in ("key", "value")}

    def of(group: stack.Group) -> Tree:
        if unrolled:
            return tuple(pair() for _ in range(group.repeats * len(group.pattern)))
        return {str(p): pair(group.repeats) for p in range(len(group.pattern))}

    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(tuple(of(group) for group in stack.groups(config)), empty, empty, jnp.int32(0))


def empty_pages(config: Transformer, pages: int, page: int, dtype=jnp.float32, *, heads: int | None = None) -> Tree:
    """The layers of a `Paged` cache: so many pages, of so many tokens each; int8 with a scale for each vector, or of another type. `heads`: the
    config's key heads when None (`lmx.parallel.attention.page_heads`)."""
    shape, quantised = (pages, heads or config.key_heads, page, config.head_size), jnp.dtype(dtype) == jnp.int8

    def layer() -> Tree:
        numbers = {name: jnp.zeros(shape, dtype) for name in ("key", "value")}
        return numbers | ({f"{name}_scale": jnp.zeros(shape[:-1], jnp.float32) for name in ("key", "value")} if quantised else {})

    return tuple(tuple(layer() for _ in range(group.repeats * len(group.pattern))) for group in stack.groups(config))


def forward(
    params: Tree,
    config: Transformer,
    tokens: Int[Array, "batch length"],
    *,
    positions: Int[Array, "batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    prefix: Int[Array, "batch length"] | None = None,
    block_positions: Int[Array, "batch length"] | None = None,
    token_types: Int[Array, "batch length"] | None = None,
    lengths: Int[Array, "#batch #length"] | None = None,
    given: Embedded | None = None,
    cache: Cache | Paged | None = None,
    source: Source | None = None,
    dropout: Dropout | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> Output:
    """Hidden states of tokens. Training, scoring, prefill and decoding are this one function.

    Args:
      params: as `specs` says, each group of layers stacked or as a tuple of layers (`lmx.models.stack`).
      tokens: in the order of `lmx.parallel.context.arrange`, as all that is of them.
      positions: each token's place in its own text; 0, 1, 2, ... when None (after the cache's used slots when there is one).
      segments: which text of a packed row each token belongs to, from 1; 0 is padding. All one text when None.
      prefix: 1 where a token belongs to the beginning of its text that is read in both directions. Of the new tokens alone, where there is a
        cache.
      block_positions: each token's place in the span that it fills (GLM), 0 outside of one; for models that have such positions.
      token_types: each token's kind, in a model that has kinds; 0 when None.
      lengths: the length by which a token's wavelengths are stretched, where they depend on one; that of its text when None (with a cache of
        slots, that of the batch's longest). Pages say theirs.
      given: vectors that are read in place of some tokens' embeddings.
      cache: keys and values of earlier tokens. New ones are written to its next slots; the caller keeps count of what fits. With pages,
        what they say decides positions (those in blanks too) and segments.
      source: what the encoder of an encoder-decoder reads; a token attends to what is of its own segment there. With a cache it is given
        the first time alone: each layer's keys and values of it are kept.
      dropout: None, or what is dropped from where.
      edits: what is changed inside, by the names of `lmx.models.sites`.

    Raises:
      ValueError: a source that is missing, or that nothing reads; block positions with a cache; a name that is no site's.
    """
    edits = edits or {}
    named.check(config, execution, edits)
    sites = named.outside(execution.taps, edits)
    batch, length = tokens.shape
    paged = isinstance(cache, Paged)
    if block_positions is not None and cache is not None:
        raise ValueError(
            "block_positions with a cache of slots, where what comes first goes by positions, of which a span's tokens have one; leave it out,"
            " or let pages say them (lmx.infer.blanks)"
        )
    if paged:
        positions, block_positions, context = _over_pages(params, config, cache, length, execution)
    else:
        if positions is None:
            start = 0 if cache is None else cache.used
            positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (batch, length))
            positions = positions if cache is not None else arrange({"positions": positions}, execution)["positions"]
        context, cache = _context(config, positions, segments, prefix, cache, dropout, execution, lengths)
        context = context.replace(bias=_bias(params, config, context.mask, length, execution))
    read = None
    if paged:
        if source is not None or isinstance(config, EncoderDecoder) != (cache.pages.source is not None):
            raise ValueError("an encoder-decoder reads the pages of a source, which `read_source` has filled; others have none")
    elif isinstance(config, EncoderDecoder):
        if source is not None:
            read = _encode(params, config, source, dropout, edits, execution)
            context = context.replace(source=read.hidden)
            seen = jnp.ones_like(source.tokens) if source.segments is None else source.segments
            cache = None if cache is None else cache.replace(source_segments=seen)
        elif cache is None or cache.source_segments is None:
            raise ValueError("an encoder-decoder reads a source: give one, or a cache that has read one")
        else:
            seen = cache.source_segments
        own = jnp.ones_like(tokens) if segments is None else segments
        context = context.replace(source_mask=Mask(causal=False, query_segments=own, key_segments=seen))
    elif source is not None:
        raise ValueError("the model has no encoder to read a source; leave it out")

    x = sites("embeddings", enter(params, config, tokens, positions, dropout, execution, block_positions, token_types, given))
    before = None if cache is None else cache.layers
    x, layers, aux, tapped = stack.run_layers(x, params["layers"], config, context, execution, before, edits=edits)
    hidden = sites("final", leave(params, config, x, execution))
    tapped |= sites.found
    after = cache if cache is None else cache.replace(layers=layers) if paged else cache.replace(layers=layers, used=cache.used + length)
    if read is None:
        return Output(hidden, after, aux, tapped)
    return Output(hidden, after, stack.added(read.aux, aux), read.taps | tapped, read.hidden)


def _encode(params: Tree, config: EncoderDecoder, source: Source, dropout: Dropout | None, edits: Edits, execution: Execution) -> Output:
    """What the encoder makes of a source: the same forward, with the decoder's embeddings, and sites of its own."""
    if dropout is not None:
        dropout = dropout.replace(key=jax.random.fold_in(dropout.key, zlib.crc32(b"encoder")))
    inner = named.inner(dict.fromkeys(execution.taps), "encoder/"), named.inner(edits, "encoder/")
    own, execution = params["encoder"] | {"embed": params["embed"]}, replace(execution, taps=tuple(inner[0]))
    read = {"positions": source.positions, "segments": source.segments, "given": source.given}
    output = forward(own, config.encoder, source.tokens, **read, dropout=dropout, edits=inner[1], execution=execution)
    return output.replace(taps={f"encoder/{name}": value for name, value in output.taps.items()})


def read_source(
    params: Tree, config: EncoderDecoder, source: Source, layers: Tree, slots: Int[Array, "tokens"], execution: Execution
) -> Tree:
    """The layers of a `Paged` cache, with keys and values of what the encoder makes of a source at `slots`, one for each token of it (0 for
    padding)."""
    hidden = _encode(params, config, source, None, {}, execution).hidden
    filled = []
    for group, kept in zip(params["layers"], layers, strict=True):
        pairs = [project(hidden, layer["cross"], ("key", "value"), config, execution) for layer in group]
        flat = [[a.reshape(-1, *a.shape[2:]) for a in pair] for pair in pairs]
        filled.append(tuple(write_pages(cache, *pair, slots, execution) for cache, pair in zip(kept, flat, strict=True)))
    return tuple(filled)


def enter(
    params: Tree,
    config: Transformer,
    tokens: Array,
    positions: Array,
    dropout: Dropout | None,
    execution: Execution,
    block_positions: Array | None = None,
    token_types: Array | None = None,
    given: Embedded | None = None,
) -> Float[Array, "batch length embed"]:
    """What the first layer reads."""
    if block_positions is not None and not config.block_positions:
        raise ValueError("the batch has block_positions and the model has none; set model.block_positions")
    params, dtype = placed_outside(params, specs(config), execution), jnp.dtype(execution.precision.compute)
    x = lookup(tokens, params["embed"], dtype, execution.rules)
    if config.embed_scale:
        x = x * jnp.asarray(math.sqrt(config.embed), dtype)
    if given is not None:
        x = jnp.where(given.where[..., None], given.vectors.astype(dtype), x)
    if config.token_types:
        kinds = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + lookup(kinds, params["token_types"], dtype, execution.rules, None)
    if config.positions == "learned":
        x = x + lookup(positions + config.first_position, params["positions"], dtype, execution.rules, None)
    elif config.positions == "sinusoidal":
        x = x + sinusoids(positions, config.table_size, wide(dtype)).astype(dtype)
    if config.block_positions:
        inside = jnp.zeros_like(tokens) if block_positions is None else block_positions
        x = x + lookup(inside, params["block_positions"], dtype, execution.rules, None)
    if config.embed_norm:
        x = norms.norm(x, params["embed_norm"], config.norm, config.norm_epsilon, offset=config.norm_offset)
    if config.embed_size is not None:
        x = linear(x, params["embed_projection"]["weight"], params["embed_projection"].get("bias"))
    return drop.apply(constrain(x, ("batch", "sequence", None), execution.rules), dropout, "embed", 0)


def leave(params: Tree, config: Transformer, x: Array, execution: Execution) -> Float[Array, "batch length embed"]:
    """Hidden states, from what the last layer gives."""
    if config.norm_placement == "post":
        return x
    return norms.norm(
        x, placed_outside(params, specs(config), execution)["norm"], config.norm, config.norm_epsilon, offset=config.norm_offset
    )


def over_pages(
    params: Tree, config: Transformer, x: Array, cache: Paged, execution: Execution, *, first: int, given: Embedded | None = None
) -> tuple[Float[Array, "1 tokens embed"], Paged]:
    """A part of `forward` over pages: consecutive layers from the layer `first` on, a stage of a pipeline.

    Args:
      params: its layers as one tuple, and what it reads besides: to embed, where it is the first; for relative positions; the final norm,
        where it is the last.
      x: the first stage's are tokens `[1, tokens]`, others' what the one before gave.
      cache: its own layers' as one tuple.
      given: as of `forward`, for the first.
    """
    positions, inside, context = _over_pages(params, config, cache, x.shape[1], execution)
    x = x if first else enter(params, config, x, positions, None, execution, inside, given=given)
    x, layers = stack.run_some(x, params["layers"], config, context, execution, first, cache.layers)
    return x if first + len(layers) < config.layers else leave(params, config, x, execution), cache.replace(layers=layers)


def _over_pages(params: Tree, config: Transformer, cache: Paged, length: int, execution: Execution) -> tuple[Array, Array | None, Context]:
    """Of new tokens that pages place: their positions, those in the blanks that they fill, and what their layers share."""
    pages = cache.pages
    rows = pages.view.tokens(length)[1][None]
    segments = (rows >= 0).astype(jnp.int32)
    positions = jnp.maximum(rows, 0) if pages.positions is None else pages.positions[None]
    inside = None if pages.block_positions is None else pages.block_positions[None]
    context, _ = _context(config, positions, segments, None, cache, None, execution)
    if config.positions == "relative":
        context = context.replace(relative=whole(placed_outside(params, specs(config), execution)["relative"]))
    return positions, inside, context


def share(
    config: Transformer,
    positions: Array,
    segments: Array | None,
    dropout: Dropout | None,
    execution: Execution,
    prefix: Array | None = None,
) -> Context:
    """What the layers of one forward without a cache share."""
    return _context(config, positions, segments, prefix, None, dropout, execution)[0]


run_part = stack.run_part
"""Consecutive layers: a stage of a pipeline."""


def _context(config, positions, segments, prefix, cache, dropout, execution, lengths=None) -> tuple[Context, Cache | None]:
    """What the layers share; and the cache with the new tokens' positions and segments written to its slots."""
    if cache is None or isinstance(cache, Paged):
        mask = Mask(
            causal=config.causal,
            query_positions=positions,
            key_positions=positions,
            query_segments=segments,
            key_segments=segments,
            key_prefix=prefix,
        )
    else:
        segments = jnp.ones_like(positions) if segments is None else segments
        positions_then, segments_then = (
            jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), cache.used, 1)
            for slots, new in ((cache.positions, positions), (cache.segments, segments))
        )
        cache = cache.replace(positions=positions_then, segments=segments_then)
        mask = Mask(
            causal=config.causal,
            order="positions",
            query_positions=positions,
            key_positions=cache.positions,
            query_segments=segments,
            key_segments=cache.segments,
            key_prefix=prefix
            if prefix is None
            else jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(cache.segments), prefix, cache.used, 1),
        )
    rope = local_rope = None
    if config.positions == "rope":
        dtype = wide(execution.precision.compute)
        if isinstance(cache, Paged):
            lengths = None if cache.pages.lengths is None else jnp.maximum(cache.pages.lengths, positions + 1)
        elif cache is None and lengths is None and by_length(config.rope_scaling):
            lengths = text_lengths(positions, segments)
        rope = local_rope = rope_table(positions, config.rope_size, config.rope_theta, dtype, config.rope_scaling, lengths)
        if config.local_rope_theta is not None:
            local_rope = rope_table(positions, config.rope_size, config.local_rope_theta, dtype)
    local = mask if config.window is None else mask.replace(window=config.window)
    ordered = transformer_xl.in_order(mask, positions.shape[1]) if config.positions == "transformer_xl" and cache is None else None
    if isinstance(cache, Paged):
        return Context(mask, local, rope, local_rope, pages=cache.pages), cache
    return Context(mask, local, rope, local_rope, None if cache is None else cache.used, dropout, ordered=ordered), cache


def _bias(params: Tree, config: Transformer, mask: Mask, queries: int, execution: Execution) -> Array | None:
    """What relative positions add to the scores of every layer: one array, as all layers share one table."""
    if config.positions != "relative":
        return None
    keys = mask.key_positions.shape[1]
    which = buckets(mask.distances(queries, keys), config.relative_buckets, config.relative_distance, causal=config.causal)
    bias = bucket_bias(whole(placed_outside(params, specs(config), execution)["relative"]), which)
    return constrain(bias, ("batch", "heads", None, None), execution.rules)


def flops_per_token(config: Transformer, length: int, source: int = 0) -> float:
    """FLOPs of training on one token, forward and backward, as MFU counts them (PaLM, appendix B): 6 for each weight that multiplies it
    (of experts, the share that a token passes through), and 12 x layers x heads x head_dim x length for attention's scores and sums,
    masked halves included; nothing recomputed. Transformer-XL's positions make the 12 an 18, and their projection, which multiplies
    distances, is not counted. Of an encoder-decoder: on a token of a target of that length, with its share of a `source` (of the target's
    length when 0), which the encoder and the keys and values made of it multiply."""
    share = (source or length) / length

    def active(path: tuple, spec: ParamSpec) -> float:
        often = config.layers // len(config.pattern) if config.shared_layers and spec.layers else 1
        names = name_of(path).split("/")
        if names[0] == "encoder" or ("cross" in names and names[-2] in ("key", "value")):
            often *= share
        return often * math.prod(spec.shape) * (config.experts_per_token / config.experts if "experts" in spec.axes else 1)

    leaves = jax.tree_util.tree_leaves_with_path(specs(config), is_leaf=is_spec)
    tied = config.vocab * config.table_size if config.tied and config.vocabulary_head else 0
    weights = sum(active(path, spec) for path, spec in leaves if spec.inputs) + tied
    scores = config.layers * config.heads * config.head_size * length
    if config.positions == "transformer_xl":
        weights, scores = weights - config.layers * config.embed * config.heads * config.head_size, 1.5 * scores
    if isinstance(config, EncoderDecoder):
        encoder = config.encoder
        scores = (1 + share) * scores + share**2 * encoder.layers * encoder.heads * encoder.head_size * length
    return 6.0 * weights + 12.0 * scores
