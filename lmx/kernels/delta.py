"""The generalised delta rule, in chunks: how RWKV-7 mixes tokens (Peng et al., 2025, arXiv 2503.14456).

A head's state is a matrix S of keys' channels by values' channels. Token t first reads what the state has at one place, `u_t = a_t S`, and leaves
`diag(w_t) S + b_t u_t + k_t v_t` (outer products), of which it reads `r_t S`. With b = -a times a rate that replaces part of what was at that place.

In a chunk (Yang et al., 2024, arXiv 2406.06484) u is the solution of a triangular system, since what is read there is what earlier tokens wrote:
u = T (reads of v) + T (a S), S being the state at the chunk's beginning, so all chunks are worked on at once, but for the states from one to the
next. Decays, padding and texts are as in `lmx.kernels.linear_attention`; all is computed in fp32 at least.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from lmx.kernels.linear_attention import chunks, leaving, pairs, sums
from lmx.kernels.wide import widened


def delta_rule(
    r: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads values"],
    decay: Float[Array, "batch length heads head_dim"],
    a: Float[Array, "batch length heads head_dim"],
    b: Float[Array, "batch length heads head_dim"],
    real: Bool[Array, "batch length"],
    fresh: Bool[Array, "batch length"],
    state: Float[Array, "batch heads head_dim values"] | None = None,
) -> tuple[Float[Array, "batch length heads values"], Float[Array, "batch heads head_dim values"]]:
    """What each token reads, in v's type, and the state after the last. Of one token it is the recurrent step.

    Args:
      r: what reads (receptance).
      decay: the logarithm of what a token multiplies the state by, below 0.
      a, b: where a token reads the state that it finds, and where it writes what is there.
      real: False at padding.
      fresh: where a text begins.
      state: that before the first token; nothing when None.
    """
    kind, length = v.dtype, r.shape[1]
    r, k, v, decay, a, b = (widened(x) for x in (r, k, v, decay, a, b))
    if state is None:
        state = jnp.zeros((r.shape[0], *k.shape[2:], v.shape[3]), r.dtype)
    there = real[..., None, None]
    k, b = jnp.where(there, k, 0), jnp.where(there, b, 0)
    decay = jnp.where(there, decay, 0)
    r, k, v, decay, a, b, fresh = (chunks(x) for x in (r, k, v, decay, a, b, fresh))
    (before, through), text = sums(decay), jnp.cumsum(fresh, 2)
    first = (text == 0)[..., None, None]

    system = jnp.eye(r.shape[2], dtype=r.dtype) - pairs(a, b, before, through, text, itself=False)
    found = jnp.einsum("bnhts,bnshv->bnhtv", pairs(a, k, before, through, text, itself=False), v)
    places = jnp.swapaxes(a * jnp.exp(sum(before)) * first, 2, 3)
    solved = inverse(system)
    places, found = solved @ places, solved @ found  # u = places S + found, [batch, chunks, heads, tokens, ...]

    kept, left = leaving(through, text)
    added = jnp.einsum("bnshk,bnhsv->bnhkv", left * b, found) + jnp.einsum("bnshk,bnshv->bnhkv", left * k, v)
    moved = jnp.einsum("bnshk,bnhsj->bnhkj", left * b, places) + kept[..., None] * jnp.eye(k.shape[-1], dtype=k.dtype)

    def step(s: Array, of: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.einsum("bhkj,bhjv->bhkv", of[0], s) + of[1], s

    after, entering = jax.lax.scan(step, widened(state), (jnp.moveaxis(moved, 1, 0), jnp.moveaxis(added, 1, 0)))
    u = jnp.einsum("bnhtk,nbhkv->bnhtv", places, entering) + found
    y = jnp.einsum("bnhts,bnhsv->bnthv", pairs(r, b, through, through, text, itself=True), u)
    y += jnp.einsum("bnhts,bnshv->bnthv", pairs(r, k, through, through, text, itself=True), v)
    y += jnp.einsum("bnthk,nbhkv->bnthv", r * jnp.exp(sum(through)) * first, entering)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length].astype(kind), after.astype(state.dtype)


def inverse(a: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The inverse of lower triangular matrices with ones on the diagonal, by halves: a few products, where a CPU's solver takes thirty times as
    long for matrices as small as these."""
    n = a.shape[-1]
    if n == 1:
        return jnp.ones_like(a)
    first, second = inverse(a[..., : n // 2, : n // 2]), inverse(a[..., n // 2 :, n // 2 :])
    below = -second @ a[..., n // 2 :, : n // 2] @ first
    above = jnp.zeros_like(jnp.swapaxes(below, -1, -2))
    return jnp.concatenate([jnp.concatenate([first, above], -1), jnp.concatenate([below, second], -1)], -2)
