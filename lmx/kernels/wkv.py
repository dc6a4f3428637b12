"""RWKV's mean of the values so far (Peng et al., 2023, arXiv 2305.13048), as a scan over whole texts and as a step.

Each channel is a head of its own. Token t reads `sum_i<t e^((t-1-i) decay + k_i) v_i + e^(bonus + k_t) v_t` over the same sum without
values. Sums are kept as numerator, denominator and exponent, the first two standing for themselves times `e^exponent`: nothing overflows,
however large keys are. All is computed in fp32 at least.

Texts packed into one row do not see each other: `fresh` says where one begins. Padding is passed over, the sums go through it unchanged.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from lmx.kernels import devices
from lmx.kernels.wide import wide, widened

NONE = -1e30
"""The exponent of nothing."""
NEUTRAL = (0.0, 0.0, 0.0, 0.0, NONE)
"""The part (`_parts`) that changes nothing."""


@flax.struct.dataclass
class Sums:
    """What tokens read of those before them, in a size that does not depend on how many they are."""

    numerator: Float[Array, "batch *length channels"]
    denominator: Float[Array, "batch *length channels"]
    exponent: Float[Array, "batch *length channels"]


def empty(batch: int, channels: int, dtype=jnp.float32) -> Sums:
    """The sums over no token."""
    zero = jnp.zeros((batch, channels), dtype)
    return Sums(zero, zero, jnp.full((batch, channels), NONE, dtype))


@jax.custom_vjp
def wkv(
    k: Float[Array, "batch length channels"],
    v: Float[Array, "batch length channels"],
    decay: Float[Array, "channels"],
    bonus: Float[Array, "channels"],
    real: Bool[Array, "batch length"],
    fresh: Bool[Array, "batch length"],
) -> Float[Array, "batch length channels"]:
    """What each token reads, of whole texts; in v's type.

    The backward pass is the same scan from the other end. Beside its arguments and result the forward keeps one number a token and channel
    for it, the logarithm of the denominator in fp32: the sums are done again, and nothing is of size length x length.

    Args:
      decay: the logarithm of what a step multiplies the sums by, below 0.
      bonus: added to a token's key where the token reads itself.
      real: False at padding.
      fresh: where a text begins.
    """
    return _forward(k, v, decay, bonus, real, fresh)[0]


def wkv_from(
    k: Float[Array, "batch length channels"],
    v: Float[Array, "batch length channels"],
    decay: Float[Array, "channels"],
    bonus: Float[Array, "channels"],
    real: Bool[Array, "batch length"],
    fresh: Bool[Array, "batch length"],
    sums: Sums,
) -> tuple[Float[Array, "batch length channels"], Sums]:
    """As `wkv`, going on from the sums over earlier tokens, and the sums after the last token. Of one token it is the recurrent step."""
    entering = _entering(k, v, decay, real, fresh, sums)
    y, _ = _read(entering, k, v, bonus)
    # The sums after the last token are what one more would read.
    last = jax.tree.map(lambda a: a[:, -1], entering)
    k, v, real = (a[:, -1:] for a in (k, v, real))
    after = running(widened(v), jnp.ones_like(widened(v)), _key(k, real), real, jnp.zeros_like(real), decay, last, piece=1)
    return y.astype(v.dtype), jax.tree.map(lambda a: a[:, 0], after)


def _forward(k, v, decay, bonus, real, fresh):
    y, log = _read(_entering(k, v, decay, real, fresh, empty(k.shape[0], k.shape[2], wide(k.dtype))), k, v, bonus)
    y = y.astype(v.dtype)
    return y, (k, v, decay, bonus, real, fresh, y, log)


def _backward(saved, g):
    """Later tokens s give a token the sums, decayed on the way, of `g_s / denominator_s` and of that times `y_s`: its value's gradient is `e^k`
    times the first, its key's `e^k (v x first - second)`, and each has more of the token's reading itself."""
    k, v, decay, bonus, real, fresh, y, log = saved
    nothing = empty(k.shape[0], k.shape[2], wide(k.dtype))
    entering = _entering(k, v, decay, real, fresh, nothing)
    wide_k, wide_v, y, g = widened(k), widened(v), widened(y), widened(g)

    def behind(a: Array, end: float | bool) -> Array:
        """What a scan from the end meets before each token: the next token's, and nothing at first."""
        return jnp.flip(jnp.concatenate([a[:, 1:], jnp.full_like(a[:, :1], end)], 1), 1)

    later = running(behind(g, 0.0), behind(g * y, 0.0), behind(-log, NONE), behind(real, False), behind(fresh, True), decay, nothing)
    later = jax.tree.map(lambda a: jnp.flip(a, 1), later)
    d_bonus = jnp.exp(bonus + wide_k - log) * g * (wide_v - y)
    read = jnp.where(real[..., None], jnp.exp(wide_k + later.exponent), 0)
    dk = d_bonus + read * (later.numerator * wide_v - later.denominator)
    dv = jnp.exp(bonus + wide_k - log) * g + read * later.numerator
    stepped = later.numerator * entering.numerator - later.denominator * entering.denominator
    d_decay = jnp.where(real[..., None], jnp.exp(decay + entering.exponent + later.exponent) * stepped, 0)
    d_decay, d_bonus = (a.sum((0, 1)).astype(b.dtype) for a, b in ((d_decay, decay), (d_bonus, bonus)))
    return dk.astype(k.dtype), dv.astype(v.dtype), d_decay, d_bonus, None, None


wkv.defvjp(_forward, _backward)


def _read(entering: Sums, k: Array, v: Array, bonus: Array) -> tuple[Array, Array]:
    """What tokens read, and the logarithm of its denominator."""
    k = bonus + widened(k)
    top = jnp.maximum(entering.exponent, k)
    before, own = jnp.exp(entering.exponent - top), jnp.exp(k - top)
    denominator = before * entering.denominator + own
    return (before * entering.numerator + own * widened(v)) / denominator, top + jnp.log(denominator)


def _entering(k: Array, v: Array, decay: Array, real: Array, fresh: Array, sums: Sums) -> Sums:
    """The sums that each token reads: over those before it."""

    def before(a: Array, first: float | bool) -> Array:
        return jnp.concatenate([jnp.full_like(a[:, :1], first), a[:, :-1]], 1)

    v, k = before(widened(v), 0.0), before(_key(k, real), NONE)
    return running(v, jnp.ones_like(v[..., :1]), k, before(real, False), fresh, decay, sums)


def _key(k: Array, real: Array) -> Array:
    return jnp.where(real[..., None], widened(k), NONE)


def running(
    first: Float[Array, "batch length channels"],
    second: Float[Array, "batch length #channels"],
    exponent: Float[Array, "batch length channels"],
    stepped: Bool[Array, "batch length"],
    dropped: Bool[Array, "batch length"],
    decay: Float[Array, "channels"],
    start: Sums,
    *,
    piece: int | None = None,
) -> Sums:
    """Sums along the length of `(first, second) e^exponent`: those after t are t's own and those after t - 1, decayed where t has `stepped`;
    and nothing where t is `dropped`.

    Args:
      start: the sums before the first.
      piece: the length is cut into pieces; all are summed at once, step by step, and then one after another. None: the whole length on a
        CPU, where single steps are quickest, elsewhere about its root.
    """
    batch, length, channels = first.shape
    if piece is None:
        piece = length if devices.on_cpu() else 2 ** round(math.log2(length) / 2)
    pieces = -(-length // piece)

    def cut(a: Array, neutral: float) -> Array:
        """`[batch, length, n]` as `[piece, pieces, batch, n]`."""
        a = jnp.pad(a, ((0, 0), (0, pieces * piece - length), (0, 0)), constant_values=neutral)
        return jnp.transpose(a.reshape(batch, pieces, piece, a.shape[-1]), (2, 1, 0, 3))

    def along(a: Array) -> Array:
        return jnp.transpose(a, (2, 1, 0, 3)).reshape(batch, pieces * piece, channels)[:, :length]

    zero = jnp.zeros((batch, 1), exponent.dtype)
    begin = (zero, zero, start.numerator, start.denominator, start.exponent)
    parts = _parts(first, second, exponent, stepped, dropped)
    parts = tuple(cut(a, neutral) for a, neutral in zip(parts, NEUTRAL, strict=True))

    def step(so_far, part):
        so_far = _then(so_far, part, decay)
        return so_far, so_far

    if pieces == 1:
        _, found = jax.lax.scan(step, tuple(a[None] for a in begin), parts)
    else:
        nothing = tuple(jnp.full((pieces, *a.shape), neutral, a.dtype) for a, neutral in zip(begin, NEUTRAL, strict=True))
        whole, inside = jax.lax.scan(step, nothing, parts)
        _, before = jax.lax.scan(lambda so_far, part: (_then(so_far, part, decay), so_far), begin, whole)
        found = _then(before, inside, decay)
    return Sums(*(along(a) for a in found[2:]))


def _parts(first: Array, second: Array, exponent: Array, stepped: Array, dropped: Array) -> tuple[Array, ...]:
    """What becomes of earlier sums, decayed how often and times `e^` what, and what is added to them: `(first, second) e^exponent`."""
    gone = jnp.where(dropped[..., None], NONE, 0).astype(exponent.dtype)
    return stepped[..., None].astype(exponent.dtype), gone, first, second, exponent + gone


def _then(a: tuple[Array, ...], b: tuple[Array, ...], decay: Array) -> tuple[Array, ...]:
    """One part after another, as one: an associative operation."""
    (steps, gone, *sums, exponent), (more, lost, *added, new) = a, b
    exponent = exponent + more * decay + lost
    top = jnp.maximum(exponent, new)
    before, now = jnp.exp(exponent - top), jnp.exp(new - top)
    return steps + more, gone + lost, *(before * x + now * y for x, y in zip(sums, added, strict=True)), top
