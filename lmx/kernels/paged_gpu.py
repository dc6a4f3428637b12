"""Paged attention on Hopper GPUs by kernels of our own (Kwon et al., 2023; flash-decoding: Dao et al., 2023).

Rows that decode and chunks of prompts are cut into tiles of up to 64 rows, tokens times the query heads of one key head, so that several tokens
of a text (a chunk, a draft) read its keys and values once. `paged_work` cuts, `paged_mosaic` computes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels import devices
from lmx.kernels import paged_mosaic as mosaic
from lmx.kernels import paged_work as work
from lmx.kernels.paged import View
from lmx.kernels.paged_work import KEYS, Cut, Tiles

TYPES = ("bfloat16", "float16")
NARROW = ("int8", "float8_e4m3fn")
WIDEST = 256
"""Of heads."""
PROCESSORS, WAVES = 132, 2
"""Of an H100 or H200; and how many programs each place on one is to run where there is enough to read."""


def most_rows(dim: int, narrow: bool) -> int:
    """Of a tile, so that its sums, and what narrow pages are widened to, fit the registers."""
    return 64 >> (dim > 128) >> narrow


def refusal(q: Array, cache: dict[str, Array], *, bias=None) -> str | None:
    """What of a call the kernel cannot do, or None."""
    key, value, dim = cache["key"], cache["value"], q.shape[-1]
    page, group = key.shape[2], q.shape[1] // key.shape[1]
    if not devices.on_hopper():
        return f"is for Hopper GPUs (H100, H200), not {devices.kind()}"
    if not devices.alone():
        return "is one device's: under a mesh of several, call it within jax.shard_map over the axes that split heads or rows"
    if q.dtype not in TYPES:
        return f"computes in {' or '.join(TYPES)}, not {q.dtype}"
    if key.dtype != value.dtype or key.dtype not in (q.dtype, *NARROW):
        return f"takes pages of {q.dtype} or of {' or '.join(NARROW)}, not {key.dtype}"
    if dim % 64 or dim > WIDEST or value.shape[-1] != dim:
        return f"takes head dimensions that are multiples of 64 up to {WIDEST}, of values as of keys, not {dim}"
    if page < 8 or max(page, KEYS) % min(page, KEYS):
        return f"takes pages of 8 tokens or more that divide {KEYS} or are its multiples, not {page}"
    if group > (most := most_rows(dim, key.dtype != q.dtype)):
        return f"takes up to {most} query heads of dimension {dim} for one key head of {key.dtype}, not {group}"
    return "takes no learned bias" if bias is not None else None


# One program's layers call it alike: compiled as a function of its own, the kernels of all of them are lowered once, which takes a second.
@partial(jax.jit, static_argnames=("scale", "causal", "window", "softcap", "cut", "interpret"))
def attention(
    q: Float[Array, "tokens heads head_dim"],
    cache: dict[str, Array],
    view: View,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    cut: Cut | None = None,
    interpret: object = None,
) -> Float[Array, "tokens heads head_dim"]:
    """As `paged.attention`, of what `refusal` has nothing against. `interpret`: Pallas' parameters, to run without a GPU."""
    kv_heads, held = cache["key"].shape[1], cache["key"].dtype
    group, most = q.shape[1] // kv_heads, most_rows(q.shape[-1], held != q.dtype)

    def of(q: Array, tiles: Tiles) -> Array:
        programs, _ = mosaic.room(tiles.rows, q.shape[-1], q.dtype, held)
        items = work.items(view, tiles, window, cut or Cut(-(-WAVES * programs * PROCESSORS // kv_heads)))
        lines = None
        if slopes is not None:
            lines = tiles.along_rows(jnp.tile(slopes.astype(jnp.float32).reshape(kv_heads, 1, group), (1, tiles.per, 1)))
        last = tiles.along_rows(jnp.repeat(tiles.last[..., None], group, 2), -1)
        found = mosaic.partials(
            tiles.gathered(q, kv_heads), last, lines, cache, view.pages, items,
            scale=scale, window=window, softcap=softcap, interpret=interpret,
        )  # fmt: skip
        return tiles.scattered(mosaic.combined(*found, items, q.dtype, interpret), group)

    found = []
    if view.singles:
        found.append(of(q[: view.singles], work.single_tiles(view, group)))
    rest = q[view.singles :]
    if view.lengths.shape[0] == view.singles:
        found.append(jnp.zeros_like(rest))
    elif rest.shape[0]:
        found.append(of(rest, work.chunk_tiles(view, rest.shape[0], group, most, causal)))
    return jnp.concatenate(found)
