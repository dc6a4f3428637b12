"""Linear attention whose state decays, channel by channel: how RWKV-5 and 6 mix tokens (Peng et al., 2024, arXiv 2404.05892).

A head's state is a matrix S of keys' channels by values' channels. Token t reads `r_t (S + diag(u) k_t v_t)` and leaves `diag(w_t) S + k_t v_t`,
k_t v_t being the outer product. It is computed in chunks (Yang et al., 2024, arXiv 2312.06635): inside all of them at once as products, and from
chunk to chunk along their states. What is raised to a power is only ever the decay from one token to a later one, a number up to 1: nothing
overflows, however strong decays are and however long a text. All is computed in fp32 at least.

Texts packed into one row do not see each other: `fresh` says where one begins. Padding is passed over, the state goes through it unchanged.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lmx.kernels.wide import widened

CHUNK = 16
"""Tokens of a chunk: each pair of them has a decay of its own in every channel."""
STRONGEST = -100.0
"""A logarithm of a decay: what is left of fp32 numbers, nothing, is the same below."""
Sums = tuple[Array, Array]
"""Logarithms of decays from a chunk's beginning, as multiples of 2^-10, whose sums and differences are exact, and the small rest."""


def linear_attention(
    r: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads values"],
    decay: Float[Array, "#batch #length heads head_dim"],
    bonus: Float[Array, "heads head_dim"],
    real: Bool[Array, "batch length"],
    fresh: Bool[Array, "batch length"],
    state: Float[Array, "batch heads head_dim values"] | None = None,
) -> tuple[Float[Array, "batch length heads values"], Float[Array, "batch heads head_dim values"]]:
    """What each token reads, in v's type, and the state after the last. Of one token it is the recurrent step.

    Args:
      r: what reads (receptance).
      decay: the logarithm of what a token multiplies the state by, below 0.
      bonus: what a token's own key is multiplied by where it reads itself.
      real: False at padding.
      fresh: where a text begins.
      state: that before the first token; nothing when None.
    """
    kind, length = v.dtype, r.shape[1]
    r, k, v, decay = (widened(a) for a in (r, k, v, decay))
    if state is None:
        state = jnp.zeros((r.shape[0], *k.shape[2:], v.shape[3]), r.dtype)
    own = (r * bonus * k).sum(-1, keepdims=True) * v
    k = jnp.where(real[..., None, None], k, 0)
    decay = jnp.where(real[..., None, None], decay, 0)
    r, k, v, decay, fresh = (chunks(a) for a in (r, k, v, decay, fresh))
    (before, through), text = sums(decay), jnp.cumsum(fresh, 2)
    inside = jnp.einsum("bnhts,bnshv->bnthv", pairs(r, k, before, through, text, itself=False), v)
    kept, left = leaving(through, text)
    added = jnp.einsum("bnshk,bnshv->bnhkv", k * left, v)
    after, entering = jax.lax.scan(
        lambda s, of: (of[0][..., None] * s + of[1], s), widened(state), jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (kept, added))
    )
    reading = r * jnp.exp(sum(before)) * (text == 0)[..., None, None]
    y = inside + jnp.einsum("bnthk,nbhkv->bnthv", reading, entering)
    return (y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length] + own).astype(kind), after.astype(state.dtype)


def chunks(a: Array) -> Array:
    """`[batch, length, ...]` as `[batch, chunks, tokens, ...]`, with nothing at the end."""
    batch, length, *rest = a.shape
    size = min(CHUNK, length)
    count = -(-length // size)
    a = jnp.pad(a, ((0, 0), (0, count * size - length), *((0, 0) for _ in rest)))
    return a.reshape(batch, count, size, *rest)


def sums(decay: Float[Array, "batch chunks tokens heads head_dim"]) -> tuple[Sums, Sums]:
    """The decay from each chunk's beginning up to each token, without its own and with it."""
    decay = jnp.maximum(decay, STRONGEST)
    coarse = jax.lax.stop_gradient(jnp.round(decay * 1024) / 1024)
    through = jnp.cumsum(coarse, 2), jnp.cumsum(decay - coarse, 2)
    return tuple(jnp.pad(a, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1] for a in through), through


def leaving(through: Sums, text: Int[Array, "batch chunks tokens"]) -> tuple[Array, Array]:
    """What is left at each chunk's end of the state before it, `[batch, chunks, heads, head_dim]`, and of what each token has written."""
    left = jnp.exp(sum(a[:, :, -1:] - a for a in through)) * (text == text[:, :, -1:])[..., None, None]
    return jnp.exp(sum(a[:, :, -1] for a in through)) * (text[:, :, -1] == 0)[..., None, None], left


def pairs(
    r: Float[Array, "batch chunks tokens heads head_dim"],
    k: Float[Array, "batch chunks tokens heads head_dim"],
    reads: Sums,
    writes: Sums,
    text: Int[Array, "batch chunks tokens"],
    *,
    itself: bool,
) -> Float[Array, "batch chunks heads tokens tokens"]:
    """The product of each token's r with the k of every token of its text before it in the chunk (or `itself` too), decayed from there to here.

    Args:
      reads, writes: the decay from the chunk's beginning to where a token reads, and to where it has written.
      text: counts the chunk's texts.
    """
    size = text.shape[2]
    allowed = (text[:, :, :, None] == text[:, :, None]) & jnp.tril(jnp.ones((size, size), bool), 0 if itself else -1)

    @jax.checkpoint  # of a number a pair and channel nothing is kept
    def products(r: Array, k: Array, reads: Sums, writes: Sums) -> Array:
        r, k, reads, writes = jax.tree.map(lambda a: jnp.swapaxes(a, 2, 3), (r, k, reads, writes))
        decay = sum(a[..., :, None, :] - b[..., None, :, :] for a, b in zip(reads, writes, strict=True))
        decay = jnp.exp(jnp.where(allowed[:, :, None, :, :, None], decay, -jnp.inf))
        return (r[..., :, None, :] * k[..., None, :, :] * decay).sum(-1)

    return products(r, k, reads, writes)
