"""What RWKV's sublayers have in common: each projects a mixture of a token and the one before it in its text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Shaped

from lmx.core.execution import Execution
from lmx.core.params import OfLayer, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import KEPT, PRODUCT, Weight, linear, whole
from lmx.kernels.wide import widened
from lmx.models.config import RWKV
from lmx.models.dropout import Dropout
from lmx.models.sites import NONE, Sites
from lmx.parallel.rules import constrain, move

BETWEEN, INSIDE = ("batch", "sequence", None), ("batch", "length", None)


@flax.struct.dataclass
class Context:
    """What the layers of one forward share.

    Attributes:
      real: False at padding.
      fresh: where a text begins.
      follows: whether the token before in the row is of the same text.
      resumes: of the first token of each row, whether it goes on from the state.
      last: the index of each row's last token, -1 where all are padding.
      sites: of the layer at hand.
      first: the first layer's values `[batch, length, heads, head_dim]`, where later layers take from them (RWKV-7).
    """

    real: Bool[Array, "batch length"]
    fresh: Bool[Array, "batch length"]
    follows: Bool[Array, "batch length"]
    resumes: Bool[Array, "batch length"]
    last: Int[Array, "batch"]
    dropout: Dropout | None = None
    sites: Sites = flax.struct.field(pytree_node=False, default=NONE)
    first: Float[Array, "batch length heads head_dim"] | None = None


@dataclass(frozen=True)
class Shift(OfLayer):
    """The share of a token itself, the rest being the token's before: more of it in later dimensions and in deeper layers. From RWKV-6 on
    it is the share of the token `before` that is learnt."""

    layers: int
    power: float = 1.0
    more: float = 0.0
    steep: int = 1
    before: bool = False

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        share = jnp.arange(shape[0]) / shape[0]
        share = share ** (self.power * (1 - layer / self.layers) ** self.steep) + self.more * layer / max(self.layers - 1, 1)
        return 1 - share if self.before else share


def specs(config: RWKV, *, steep: int = 1, **powers: tuple[float, float]) -> Tree:
    """A share for each projection of a sublayer; of each its power and what is added (`Shift`)."""
    inits = {name: Shift(config.layers, power, more, steep, config.version > 5) for name, (power, more) in powers.items()}
    return {name: ParamSpec((config.embed,), ("embed",), init=init) for name, init in inits.items()}


def own_share(share: Weight, config: RWKV) -> Float[Array, "embed"]:
    """The share of a token itself."""
    share = widened(whole(share))
    return 1 - share if config.version > 5 else share


def mixture(x: Array, before: Array, own: Array) -> Float[Array, "batch length embed"]:
    """Tokens mixed with those before them; in x's type."""
    return (widened(x) * own + widened(before) * (1 - own)).astype(x.dtype)


def projected(
    x: Array, before: Array, own: Callable[..., Array], weight: Weight, execution: Execution, names: tuple[str | None, ...], *more: Array
) -> Float[Array, "batch length *channels"]:
    """A projection of each token mixed with the one before. The mixture is done again for the backward pass rather than kept.

    Tokens are mixed where all of the sequence is, and then are where `names` say: else XLA would shift them from device to device.

    Args:
      own: gives the share of a token itself, from `more`.
    """

    @partial(jax.checkpoint, policy=KEPT)
    def project(x: Array, before: Array, *more: Array) -> Array:
        return linear(move(mixture(x, before, own(*more)), names, INSIDE, execution.rules), weight)

    return checkpoint_name(project(x, before, *more), PRODUCT)


def token_before(x: Array, context: Context, state: Tree | None, execution: Execution) -> Float[Array, "batch length embed"]:
    """What was read of the token before, within the text."""
    x = constrain(x, INSIDE, execution.rules)  # else XLA splits it again, to roll its parts, and their gradient's
    before = jnp.where(context.follows[..., None], constrain(jnp.roll(x, 1, 1), INSIDE, execution.rules), 0)
    if state is not None:
        before = jnp.where(context.resumes[..., None], state["last"][:, None].astype(x.dtype), before)
    return constrain(before, INSIDE, execution.rules)


def latest(x: Shaped[Array, "batch length n"], last: Shaped[Array, "batch n"], context: Context) -> Shaped[Array, "batch n"]:
    """x at each row's last token; what was so before where all are padding."""
    found = jnp.take_along_axis(x, jnp.maximum(context.last, 0)[:, None, None], 1)[:, 0]
    return jnp.where(context.last[:, None] >= 0, found.astype(last.dtype), last)
