"""What an RWKV's layers (`lmx.models.rwkv`) keep for their backward passes, hold and send: of `lmx.parallel.cost` and `lmx.parallel.traffic`."""

from dataclasses import replace

from lmx.kernels.linear_attention import CHUNK
from lmx.parallel.work import Work, gathered_apart

WIDE, NARROW = {5: 17, 6: 19, 7: 44}, {5: 3, 6: 3, 7: 1}
"""Numbers a token and channel that time mixing from RWKV-5 on keeps, in fp32 and in the compute type: what its chunks are formed of in each order
that a product reads them in, and decays from either end."""
STATES, PAIRS = {5: 1, 6: 1, 7: 2}, {5: 1.0, 6: 1.0, 7: 5.75}
"""Matrices of a chunk and head, fp32, that it keeps: of keys by values, and of tokens by tokens (RWKV-7's inverses, of halves of halves too)."""
MIXTURES = {4: 4, 5: 5, 6: 6, 7: 8}
"""Mixtures of a token and the one before it that a layer's projections are of."""
DECAYS = {5: 4, 6: 4, 7: 8}
"""Arrays of a number for each pair of a chunk's tokens and each channel, fp32, that its backward pass has room for on XLA:CPU, which fuses none of
them; there are fewer at once, and gaps between them."""


def kept(work: Work) -> dict[str, int]:
    """Bytes that one layer keeps for its backward pass, by what they are."""
    here, remat, version = work.here, work.layout.remat, work.recurrent
    tokens, gated = here.rows * here.length, version < 7
    channels, hidden = tokens * here.heads * work.compute, tokens * here.mlp * work.compute
    if remat == "full":
        return {"layer inputs": work.between}
    if remat == "sites":
        sizes = dict.fromkeys(("query", "key", "value", "mixed"), channels) | {"hidden": hidden + channels * (version in (5, 6))}
        return {"layer inputs": work.between, "sites": sum(sizes[site] for site in set(work.layout.sites))}
    ranks = tokens * work.compute
    if remat == "dots":
        projected = {4: 3, 5: 4, 6: 5, 7: 7}[version] * channels + ranks * sum(work.ranks)
        return {"layer inputs": work.between, "products": projected + hidden + (3 if gated else 2) * work.between}
    found = {
        "inputs of norms": work.norms * work.between,
        "inputs of projections": 4 * work.whole,  # each token and the one before it, of both sublayers
        "feed-forward": 2 * hidden + 2 * work.between * gated,
    }
    if version == 4:
        found["inputs of projections"] += 2 * channels
        found["queries, keys, values"] = 4 * channels + 4 * tokens * here.heads  # and the logarithms of what sums are divided by
    else:
        found["queries, keys, values"] = NARROW[version] * channels + 4 * WIDE[version] * tokens * here.heads
        matrices = STATES[version] * here.heads * work.state / CHUNK + PAIRS[version] * here.heads * CHUNK / work.state
        found["states of chunks"] = int(4 * tokens * matrices)
        if version == 6:  # and what shares of tokens are added to
            found["inputs of projections"] += 4 * work.whole // work.compute
        found["networks of low rank"] = ranks * sum(work.ranks) * 2 - ranks * (sum(work.ranks[1:3]) if version == 7 else 0)
    if work.dropout:
        found["dropout masks"] = 2 * work.between
    return {name: size for name, size in found.items() if size}


def working(work: Work, *, cpu: bool) -> int:
    """Bytes that the backward pass of one layer holds beside what is kept and its weights; measured."""
    here, again = work.here, work.layout.remat != "none"
    tokens = here.rows * here.length
    channels, hidden = 4 * tokens * here.heads, tokens * here.mlp * work.compute
    if work.recurrent == 4:  # sums from both ends are fp32
        return (13 if again else 11) * channels + (9 if again else 4) * hidden // 4 + 11 * work.whole + (0 if cpu else 3 * channels)
    if not cpu:  # which fuses what pairs and channels are formed of, but for the last
        everything = replace(work, layout=replace(work.layout, remat="none", sites=()))
        return DECAYS[work.recurrent] * 5 * channels + (sum(kept(everything).values()) if again else 0)
    decays = DECAYS[work.recurrent] + 2 * (again and work.recurrent == 7)
    return decays * CHUNK * channels + (1 + again) * (3 * work.whole + 2 * hidden)


def residual(work: Work, *, cpu: bool) -> tuple[int, int, int]:
    """How often tensor devices sum, and gather, the residual stream or its gradient in a layer; and bytes of the gradients that they sum inside
    networks of low rank. The projections of each sublayer have inputs of their own, whose gradients are summed one by one."""
    remat, version = work.layout.remat, work.recurrent
    gated = version < 7  # whose gate reads the input where sequences are split, and what it multiplies once more
    sums = 2 * work.forwards + 4 + (version in (5, 6)) + ((1 + gated) if remat == "full" else 0)
    gathers = 2 * work.forwards + 2 + gated + (2 if remat != "none" else 0)
    if cpu:
        gathers += sum(gathered_apart(work, cpu))
    else:  # forms mixtures of tokens, and gradients of what they are of, in part, and gathers each
        gathers += 3 if version == 6 else MIXTURES[version] + 2 + gated
    low = work.ranks[1:] if version == 6 else work.ranks  # RWKV-6's shares of tokens are of whole sequences
    return sums, gathers, work.here.rows * work.here.length * sum(low) * work.compute
