"""The attention layer: projections, positions, the cache, and the kernel between them."""

import flax.struct
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.kernels.masks import Mask
from lmx.kernels.paged import View
from lmx.kernels.wide import wide
from lmx.models import dropout as drop
from lmx.models import norms, transformer_xl
from lmx.models.config import Transformer
from lmx.models.dropout import Dropout
from lmx.models.linears import linear_specs
from lmx.models.positions import alibi_slopes, bucket_bias, buckets
from lmx.models.rope import rotate
from lmx.models.sites import NONE, Sites
from lmx.parallel.attention import HeadBias, attend_pages, write_pages
from lmx.parallel.attention import attention as attend
from lmx.parallel.collective import linear_back, linears
from lmx.parallel.rules import constrain


@flax.struct.dataclass
class Pages:
    """Where in a cache of pages new tokens are written, and what they read (`lmx.kernels.paged`).

    Attributes:
      view: the pages of each row's own text.
      slots: where each new token's key and value go; padding's to page 0, which is nobody's.
      source: the pages of the text that an encoder has read for each row.
      lengths: of each new token's text, at least, where wavelengths depend on it (`lmx.models.rope`).
      positions, block_positions: of each new token, as `lmx.models.transformer.forward` takes them; None: a token's position is its place in
        its row, and it fills no blank.
    """

    view: View
    slots: Int[Array, "tokens"]
    source: View | None = None
    lengths: Int[Array, "tokens"] | None = None
    positions: Int[Array, "tokens"] | None = None
    block_positions: Int[Array, "tokens"] | None = None


@flax.struct.dataclass
class Context:
    """What the attention layers of one forward share.

    Attributes:
      mask, local_mask: the masks of global layers and of layers with the config's window.
      bias: what is added to every layer's scores, where positions are relative; `relative` the table that it is made of, for pages.
      ordered: `transformer_xl.in_order` where there is no cache, for the config's Transformer-XL positions.
      source, source_mask: what an encoder made of another text, `[batch, keys, embed]`, when the cache has not its keys and values; and
        the mask of attention to it.
      rope, local_rope: cosines and sines of the positions, for global layers and for local ones, when the config rotates.
      slot: where in the cache the new keys go (int scalar), when there is a cache.
      pages: which pages the cache is, when it is one of pages.
      dropout: None when nothing is dropped.
      sites: of the layer at hand.
    """

    mask: Mask
    local_mask: Mask
    rope: tuple[Array, Array] | None = None
    local_rope: tuple[Array, Array] | None = None
    slot: Array | None = None
    dropout: Dropout | None = None
    bias: Array | None = None
    relative: Array | None = None
    ordered: Array | None = None
    source: Array | None = None
    source_mask: Mask | None = None
    pages: Pages | None = None
    sites: Sites = flax.struct.field(pytree_node=False, default=NONE)


def specs(config: Transformer) -> Tree:
    """Parameters of one attention layer."""
    embed, heads, kv_heads, dim = config.embed, config.heads, config.key_heads, config.head_size
    taken = {"query": ("heads", heads), "key": ("kv_heads", kv_heads), "value": ("kv_heads", kv_heads)}
    projections = {
        name: linear_specs((embed,), (count, dim), ("embed",), (axis, "head_dim"), config, bias=config.projection_bias)
        for name, (axis, count) in taken.items()
    }
    projections["output"] = linear_specs(
        (heads, dim), (embed,), ("heads", "head_dim"), ("embed",), config, residual=True, bias=config.output_bias
    )
    if config.qk_norm:
        for name in ("query", "key"):
            axis, count = taken[name]
            size = (count * dim, axis) if config.qk_norm_joint else (dim, "head_dim")
            projections[f"{name}_norm"] = norms.specs("rmsnorm", *size, bias=False, offset=config.norm_offset)
    if config.positions == "transformer_xl":
        projections["distances"] = transformer_xl.specs(config)
    return projections


def attention(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Transformer,
    context: Context,
    execution: Execution,
    *,
    local: bool,
    layer: Array | int,
    cache: Tree | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """Self-attention of one layer; with a cache, new keys and values are written to it first and the whole of it is attended to.

    Args:
      local: whether the config's window applies to this layer.
      layer: the layer's index, to tell dropout sites apart.
      cache: `{"key", "value"}` of `[batch, kv_heads, slots, head_dim]`; or of pages, where the context says which (`lmx.kernels.paged`).
    """

    query, key, value = project(x, params, ("query", "key", "value"), config, execution)
    rope = context.local_rope if local else context.rope
    if rope is not None:
        query, key = (rotate(a, rope, interleaved=config.rope_interleaved) for a in (query, key))
    sites = context.sites
    query, key, value = (_site(sites, "attention", name, a) for name, a in (("query", query), ("key", key), ("value", value)))
    if context.pages is not None:
        cache = write_pages(cache, key[0], value[0], context.pages.slots, execution)
        query, bias = _paged_bias(query, params, config, context)
        window = config.window if local else None
        mixed = attend_pages(query, cache, context.pages.view, execution, bias=bias, window=window, **_scores(config, x.dtype))
        return _output(mixed, "attention", sites, params, execution), cache
    if cache is not None:
        new = {"key": key, "value": value}
        new = {n: new[n].swapaxes(1, 2).astype(cache[n].dtype) for n in new}
        new = {n: jax.lax.dynamic_update_slice_in_dim(cache[n], new[n], context.slot, 2) for n in new}
        cache = cache | new
        key, value = (cache[n].swapaxes(1, 2).astype(x.dtype) for n in ("key", "value"))
    bias, keep = context.bias, None
    if config.positions == "transformer_xl":
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        query, bias = transformer_xl.scored(query, params["distances"], context.mask, context.ordered, scale)
        bias = constrain(bias, ("batch", "heads", None, None), execution.rules)
    if context.dropout is not None:
        keep = drop.keep(context.dropout, "attention/weights", layer, (config.heads, query.shape[1], key.shape[1]))
    mixed = attend(
        query,
        key,
        value,
        context.local_mask if local else context.mask,
        execution,
        **_scores(config, x.dtype),
        bias=bias,
        keep=keep,
        site=sites.formed("attention"),
    )
    return _output(mixed, "attention", sites, params, execution), cache


def cross(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Transformer,
    context: Context,
    execution: Execution,
    *,
    layer: Array | int,
    cache: Tree | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None]:
    """Attention of one layer to what an encoder made of another text: to the context's `source`, or where it has none, to the keys and
    values that the cache has kept of it.

    Args:
      layer: as of `attention`.
      cache: with `{"source_key", "source_value"}` of `[batch, kv_heads, keys, head_dim]` from the first time on.
    """
    sites = context.sites
    query = _site(sites, "cross", "query", *project(x, params, ("query",), config, execution))
    scaled = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    if context.pages is not None:
        mixed = attend_pages(query, cache, context.pages.source, execution, causal=False, **scaled)
        return _output(mixed, "cross", sites, params, execution), cache
    if context.source is None:
        key, value = (cache[n].swapaxes(1, 2).astype(x.dtype) for n in ("source_key", "source_value"))
    else:
        read = project(context.source, params, ("key", "value"), config, execution)
        key, value = (_site(sites, "cross", name, a) for name, a in zip(("key", "value"), read, strict=True))
        if cache is not None:
            kept = cache["key"].dtype
            cache = cache | {"source_key": key.swapaxes(1, 2).astype(kept), "source_value": value.swapaxes(1, 2).astype(kept)}
    keep = None
    if context.dropout is not None:
        keep = drop.keep(context.dropout, "cross/weights", layer, (config.heads, query.shape[1], key.shape[1]))
    mixed = attend(query, key, value, context.source_mask, execution, **scaled, keep=keep, site=sites.formed("cross"))
    return _output(mixed, "cross", sites, params, execution), cache


def project(
    x: Array, params: Tree, names: tuple[str, ...], config: Transformer, execution: Execution
) -> list[Float[Array, "batch length some head_dim"]]:
    """Queries, keys or values of x, those that are named, normalised where the config says so, before they turn."""
    found = []
    for name, y in zip(names, linears(x, [params[name] for name in names], "heads", execution), strict=True):
        y = constrain(y, ("batch", "length", "heads" if name == "query" else "kv_heads", None), execution.rules)
        found.append(_normed(y, params[f"{name}_norm"], config) if config.qk_norm and name != "value" else y)
    return found


def _site(sites: Sites, where: str, name: str, value: Array) -> Array:
    """A site, by whose name rematerialisation can keep it, too."""
    return checkpoint_name(sites(f"{where}/{name}", value), name)


def _output(mixed: Array, where: str, sites: Sites, params: Tree, execution: Execution) -> Array:
    mixed = _site(sites, where, "mixed", constrain(mixed, ("batch", "length", "heads", None), execution.rules))
    return linear_back(mixed, params["output"], "heads", execution)


def _normed(heads: Float[Array, "batch length heads head_dim"], params: Tree, config: Transformer) -> Array:
    together = heads.reshape(*heads.shape[:2], -1) if config.qk_norm_joint else heads
    return norms.norm(together, params, "rmsnorm", config.norm_epsilon, offset=config.norm_offset).reshape(heads.shape)


def _scores(config: Transformer, dtype) -> dict:
    """How scores are formed, as attention takes it."""
    slopes = _slopes(config, wide(dtype)) if config.positions == "alibi" else None
    return {"scale": config.attention_scale, "softcap": config.attention_softcap, "slopes": slopes}


def _paged_bias(query: Array, params: Tree, config: Transformer, context: Context) -> tuple[Array, HeadBias | None]:
    """What attention to pages takes as queries, and what is added to scores where positions are relative."""
    positions = context.mask.query_positions[0]
    if config.positions == "relative":
        kind = {"count": config.relative_buckets, "furthest": config.relative_distance, "causal": config.causal}

        def by_bucket(table: Array, positions: Array, index: Array, keys: Array) -> Array:
            return bucket_bias(table, buckets(positions[index][:, :, None] - keys[:, None], **kind))

        return query, HeadBias((context.relative,), (positions,), by_bucket)
    if config.positions != "transformer_xl":
        return query, None
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    query, places, projection = transformer_xl.towards(query, params["distances"], scale)

    def by_place(places: Array, projection: Array, positions: Array, index: Array, keys: Array) -> Array:
        return transformer_xl.by_positions(places[index], projection, positions[index], keys)

    return query, HeadBias((places[0], projection), (positions,), by_place)


def _slopes(config: Transformer, dtype) -> Float[Array, "heads"]:
    slopes = alibi_slopes(config.heads, dtype)
    if not config.alibi_scaled:
        return slopes
    return slopes * (config.head_size**-0.5 if config.attention_scale is None else config.attention_scale)
