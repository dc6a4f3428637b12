"""One layer: norms, attention, attention to an encoder's output, and feed-forward, in the order that the config says."""

from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import narrowed
from lmx.models import attention, dropout, experts, feedforward, norms
from lmx.models.attention import Context
from lmx.models.config import EncoderDecoder, LayerKind, Transformer, is_local, is_mixture
from lmx.models.experts import Aux
from lmx.parallel.collective import goes_round
from lmx.parallel.rules import constrain, move, placed


def specs(config: Transformer, kind: LayerKind) -> Tree:
    """Parameters of one layer of a kind. Norms are named after the sublayer that they stand before (or, `_post`, after)."""
    tree = {"attention": attention.specs(config)}
    tree |= {"experts": experts.specs(config)} if is_mixture(config, kind) else {"feedforward": feedforward.specs(config)}
    names = ["attention_norm"] if config.parallel and not config.parallel_norms else ["attention_norm", "feedforward_norm"]
    if config.norm_placement in ("post", "output"):
        names = ["attention_norm_post", "feedforward_norm_post"]
    elif config.norm_placement == "sandwich":
        names += ["attention_norm_post", "feedforward_norm_post"]
    if isinstance(config, EncoderDecoder):
        tree["cross"] = attention.specs(config)
        names += [name.replace("attention", "cross") for name in names if name.startswith("attention")]
    return tree | {name: norms.specs(config.norm, config.embed, "embed", bias=config.bias, offset=config.norm_offset) for name in names}


def block(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Transformer,
    context: Context,
    execution: Execution,
    *,
    kind: LayerKind,
    layer: Array | int,
    cache: Tree | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None, Aux]:
    """One layer; gives its output, the cache with this layer's new keys and values (see `attention.attention`), and auxiliary values."""

    params = placed(params, specs(config, kind), execution)
    if execution.precision.fp8:
        params |= {name: narrowed(params[name]) for name in ("attention", "cross", "feedforward") if name in params}
    mixture, sites = is_mixture(config, kind), context.sites

    def normed(y: Array, name: str) -> Array:
        return norms.norm(y, params[name], config.norm, config.norm_epsilon, offset=config.norm_offset) if name in params else y

    def attend(y: Array) -> tuple[Array, Tree | None]:
        y, new = attention.attention(y, params["attention"], config, context, execution, local=is_local(kind), layer=layer, cache=cache)
        return dropout.apply(y, context.dropout, "attention", layer), new

    def across(y: Array, kept: Tree | None) -> tuple[Array, Tree | None]:
        y, new = attention.cross(y, params["cross"], config, context, execution, layer=layer, cache=kept)
        return dropout.apply(y, context.dropout, "cross", layer), new

    def feed(y: Array) -> tuple[Array, Aux]:
        aux = {}
        if mixture:
            segments, decoding = context.mask.query_segments, cache is not None
            y, aux = experts.experts(y, params["experts"], config, execution, segments=segments, decoding=decoding, sites=sites)
        else:
            y = feedforward.feedforward(y, params["feedforward"], config, execution, sites)
        return dropout.apply(y, context.dropout, "feedforward", layer), aux

    def settle(y: Array) -> Array:
        return constrain(y, ("batch", "sequence", None), execution.rules)

    def gathered(y: Array) -> Array:
        there = ("batch", "sequence" if goes_round(y.shape, execution) else "length", None)
        return move(y, there, ("batch", "sequence", None), execution.rules)

    # A mixture routes what each device has before it gathers anything.
    read_by_feed = (lambda y: y) if mixture else gathered
    if config.norm_placement == "post":
        y, new = attend(gathered(x))
        x = settle(normed(x + sites("attention/output", y), "attention_norm_post"))
        if "cross" in params:
            x = sites("cross/input", x)
            y, new = across(gathered(x), new)
            x = settle(normed(x + sites("cross/output", y), "cross_norm_post"))
        x = sites("residual", x)
        y, aux = feed(read_by_feed(x))
        return settle(normed(x + sites("feedforward/output", y), "feedforward_norm_post")), new, aux
    read = gathered(normed(x, "attention_norm"))
    y, new = attend(read)
    y = sites("attention/output", normed(y, "attention_norm_post"))
    if config.parallel:
        fed, aux = feed(read_by_feed(normed(x, "feedforward_norm")) if config.parallel_norms else read)
        return settle(x + y + sites("feedforward/output", normed(fed, "feedforward_norm_post"))), new, aux
    x = settle(x + y)
    if "cross" in params:
        x = sites("cross/input", x)
        y, new = across(gathered(normed(x, "cross_norm")), new)
        x = settle(x + sites("cross/output", normed(y, "cross_norm_post")))
    x = sites("residual", x)
    y, aux = feed(read_by_feed(normed(x, "feedforward_norm")))
    return settle(x + sites("feedforward/output", normed(y, "feedforward_norm_post"))), new, aux
