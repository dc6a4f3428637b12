"""One layer: norms, attention and feed-forward, in the order that the config says."""

from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.models import attention, dropout, feedforward, norms
from lmx.models.attention import Context
from lmx.models.config import Transformer
from lmx.parallel.rules import constrain, move, placed

Aux = dict[str, Float[Array, "batch"]]
"""What layers give beside their output, by name: fp32, a number a row, to be summed over layers. Empty for most."""


def specs(config: Transformer) -> Tree:
    """Parameters of one layer. Norms are named after the sublayer that they stand before (or, `_post`, after)."""
    tree = {"attention": attention.specs(config), "feedforward": feedforward.specs(config)}
    names = ["attention_norm"] if config.parallel else ["attention_norm", "feedforward_norm"]
    if config.norm_placement == "post":
        names = ["attention_norm_post", "feedforward_norm_post"]
    elif config.norm_placement == "sandwich":
        names += ["attention_norm_post", "feedforward_norm_post"]
    return tree | {name: norms.specs(config.norm, config.embed, "embed", bias=config.bias) for name in names}


def block(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Transformer,
    context: Context,
    execution: Execution,
    *,
    local: bool,
    layer: Array | int,
    cache: Tree | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None, Aux]:
    """One layer; gives its output, the cache with this layer's new keys and values (see `attention.attention`), and auxiliary values."""

    params = placed(params, specs(config), execution)

    def normed(y: Array, name: str) -> Array:
        return norms.norm(y, params[name], config.norm, config.norm_epsilon) if name in params else y

    def attend(y: Array) -> tuple[Array, Tree | None]:
        y, new = attention.attention(y, params["attention"], config, context, execution, local=local, layer=layer, cache=cache)
        return dropout.apply(y, context.dropout, "attention", layer), new

    def feed(y: Array) -> Array:
        return dropout.apply(feedforward.feedforward(y, params["feedforward"], config, execution), context.dropout, "feedforward", layer)

    def settle(y: Array) -> Array:
        return constrain(y, ("batch", "sequence", None), execution.rules)

    def gathered(y: Array) -> Array:
        return move(y, ("batch", "length", None), ("batch", "sequence", None), execution.rules)

    if config.norm_placement == "post":
        y, cache = attend(gathered(x))
        x = settle(normed(x + y, "attention_norm_post"))
        return settle(normed(x + feed(gathered(x)), "feedforward_norm_post")), cache, {}
    read = gathered(normed(x, "attention_norm"))
    y, cache = attend(read)
    y = normed(y, "attention_norm_post")
    if config.parallel:
        return settle(x + y + normed(feed(read), "feedforward_norm_post")), cache, {}
    x = settle(x + y)
    return settle(x + normed(feed(gathered(normed(x, "feedforward_norm"))), "feedforward_norm_post")), cache, {}
