"""The least logit that top-k, top-p and min-p keep, without sorting the vocabulary.

Floats in order are integers in order: 32 halvings of the range between a row's least and largest logit find a threshold exactly, each one
read of the logits. Equal logits are kept together or left out together.

Of 16 rows of 50,257 on two cores of a CPU, top-k takes 4 ms and top-p 5; sorting them takes 145.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def of_top_k(scores: Float[Array, "rows vocab"], k: Int[Array, "rows"]) -> Float[Array, "rows"]:
    """A threshold that just the `k` largest of a row reach, and what equals the least of them; -inf where k is 0 or all of the vocabulary.

    (It is a number above all others of the row and not above those; not always one of them.)
    """
    on = (k > 0) & (k < scores.shape[-1])

    def enough(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # `low` leaves enough, above `high` there are not enough
        middle = _middle(low, high) + ((low ^ high) & 1)
        found = (scores >= _float(middle)[:, None]).sum(-1, dtype=jnp.int32)
        return jnp.where(found >= k, middle, low), jnp.where(found > k, high, jnp.where(found == k, middle, middle - 1))

    return jnp.where(on, _halved(enough, scores.min(-1), scores.max(-1), on), -jnp.inf)


def of_top_p(scores: Float[Array, "rows vocab"], p: Float[Array, "rows"], floor: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """The least logit of the fewest likeliest tokens that together reach the share `p` (Holtzman et al., 2020) of those not below `floor`.

    A token is kept while those likelier than it have not reached p: the likeliest always is. `floor` where p is 1 or more.
    """
    on, largest = p < 1, scores.max(-1)
    shares = jnp.where(scores >= floor[:, None], jnp.exp(scores - largest[:, None]), 0.0)
    wanted = jnp.maximum(p * shares.sum(-1), jnp.finfo(scores.dtype).tiny)

    def reached(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # what is above `high` has not reached p, what is above anything below `low` has
        middle = _middle(low, high)
        short = jnp.where(scores > _float(middle)[:, None], shares, 0.0).sum(-1) < wanted
        return jnp.where(short, low, middle + 1), jnp.where(short, middle, high)

    return jnp.where(on, _halved(reached, jnp.maximum(scores.min(-1), floor), largest, on), floor)


def of_min_p(scores: Float[Array, "rows vocab"], p: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """The logit of a token `p` times as likely as the likeliest (Nguyen et al., 2024); -inf where p is 0."""
    return scores.max(-1) + jnp.log(p)


def _halved(halve: Callable, low: Float[Array, "rows"], high: Float[Array, "rows"], on: Array) -> Float[Array, "rows"]:
    """Where `halve` brings bounds together; rows that are not `on` ask for nothing."""
    low, high = _ordered(low), _ordered(high)
    bounds = jax.lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), halve, (jnp.where(on, low, high), high))
    return _float(bounds[0])


def _ordered(a: Float[Array, "rows"]) -> Int[Array, "rows"]:
    """Integers in the order of the floats. -0.0 comes just before 0.0; as floats the two are equal, and floats are what is compared."""
    bits = jax.lax.bitcast_convert_type(a, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _float(ordered: Int[Array, "rows"]) -> Float[Array, "rows"]:
    """The float of an integer. 0 for those nearer to it than 2^-126, which some processors take for 0 and some do not."""
    bits = jnp.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(jnp.where(bits & 0x7FFFFFFF < 0x00800000, 0, bits), jnp.float32)


def _middle(low: Array, high: Array) -> Array:
    """(low + high) / 2 rounded down, of integers whose sum may be too large."""
    return (low & high) + ((low ^ high) >> 1)
