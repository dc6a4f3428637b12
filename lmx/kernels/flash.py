"""Flash attention of our own (Dao, 2023; Shah et al., 2024), for Hopper GPUs: the door to the kernels in `flash_forward` and `flash_backward`.

Scores never leave the chip, products are of bf16 or fp16 with fp32 sums, and blocks in which no query sees any key are not visited: those
beyond causality and windows, and those of other segments where segments are in order. The backward pass is deterministic.
"""

from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from lmx.kernels import chunked, devices, flash_blocks
from lmx.kernels.masks import Mask

TYPES = ("bfloat16", "float16")
WIDTHS = (64, 128, 192, 256)
"""Of heads."""
BACKWARD = 128
"""Up to this head dimension the backward pass is a kernel too. Beyond, sums of two gradients find no room in registers, and it is chunked."""


def refusal(q: Array, k: Array, v: Array, mask: Mask, *, scale=1.0, softcap=None, slopes=None, keep=None, bias=None) -> str | None:
    """What of a call these kernels cannot do, or None; where they run, `devices.on_hopper` says."""
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        return f"computes in {' or '.join(TYPES)}, one for all, not {', '.join(sorted({str(a.dtype) for a in (q, k, v)}))}"
    if q.shape[-1] not in WIDTHS or v.shape[-1] != q.shape[-1]:
        return f"takes head dimensions of {', '.join(map(str, WIDTHS))}, the same for values, not {q.shape[-1]} and {v.shape[-1]}"
    if scale <= 0 or (softcap is not None and softcap <= 0):
        return f"takes a scale and a soft cap above 0, not {scale} and {softcap}"
    for name, value in (("learned bias", bias), ("dropout", keep)):
        if value is not None:
            return f"takes no {name}"
    return None


def check(q: Array, k: Array, v: Array, mask: Mask, **asked) -> None:
    """Raises ValueError where a call cannot be done by these kernels, or they cannot run."""
    reason = refusal(q, k, v, mask, **asked)
    if reason or not devices.on_hopper():
        raise ValueError(f"attention='flash' {reason or f'runs on Hopper GPUs, not {devices.kind()}'}; use auto")


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    interpret: object = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """As `reference.attention`, of what `refusal` has nothing against. `interpret`: what Pallas takes to run without a GPU."""
    return _attention((scale, softcap, interpret), q, k, v, mask, slopes)


def with_lse(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    interpret: object = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """Attention and each query's log-sum-exp, `chunked.NONE` where it sees no key: for who adds up attention over parts of the keys, as a ring
    does, and then calls `gradients` with the sum's. Not itself differentiable."""
    out, lse = _forward((scale, softcap, interpret), q, k, v, mask, slopes)
    return out, lse.swapaxes(1, 2)


def gradients(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    lse: Float[Array, "batch queries heads"],
    delta: Float[Array, "batch queries heads"],
    g: Float[Array, "batch queries heads head_dim"],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    interpret: object = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v through these keys, given the log-sum-exp over all keys and `delta = chunked.weigh(g, out)`."""
    from lmx.kernels.flash_backward import keys_gradient, queries_gradient

    if q.shape[-1] > BACKWARD:
        found = chunked.backward((scale, softcap), q, k, v, mask, slopes, lse, delta, g)[:3]
        return tuple(a.astype(like.dtype) for a, like in zip(found, (q, k, v), strict=True))
    lines = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    knobs = {"scale": scale, "softcap": softcap, "interpret": interpret}
    blocks = {kernel: _blocks(kernel, q, mask, slopes) for kernel in ("queries", "keys")}
    dq = queries_gradient(q, k, v, mask, slopes, *lines, g, blocks=blocks["queries"], **knobs)
    # One after the other: each fills the GPU, and two at a time stop Pallas' interpreter.
    dq, g = jax.lax.optimization_barrier((dq, g))
    return dq, *keys_gradient(q, k, v, mask, slopes, *lines, g, blocks=blocks["keys"], **knobs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, mask, slopes):
    return _forward(static, q, k, v, mask, slopes)[0]


def _attention_forward(static, q, k, v, mask, slopes):
    out, lse = _forward(static, q, k, v, mask, slopes)
    return out, (q, k, v, mask, slopes, out, lse)


def _attention_backward(static, saved, g):
    q, k, v, mask, slopes, out, lse = saved
    scale, softcap, interpret = static
    knobs = {"scale": scale, "softcap": softcap, "slopes": slopes, "interpret": interpret}
    return *gradients(q, k, v, mask, lse.swapaxes(1, 2), chunked.weigh(g, out), g, **knobs), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(static, q, k, v, mask, slopes):
    from lmx.kernels.flash_forward import forward  # Pallas takes a third of a second to import, which not every program is to pay

    scale, softcap, interpret = static
    return forward(q, k, v, mask, slopes, scale=scale, softcap=softcap, blocks=_blocks("forward", q, mask, slopes), interpret=interpret)


def _blocks(kernel: str, q: Array, mask: Mask, slopes: Array | None) -> flash_blocks.Blocks:
    plain = slopes is None and not jax.tree.leaves(mask)
    return flash_blocks.table()[kernel, q.shape[-1], "plain" if plain else "reading"]
