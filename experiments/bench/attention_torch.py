"""PyTorch's side of `experiments.bench.attention`: SDPA with a backend that is forced, and flex_attention, compiled."""

import itertools
import json

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench.attention import CAP, TEXT, WINDOW, shape
from experiments.bench.turns import serve

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def sdpa(case: str, backend: str):
    """`f(q, k, v)` of `[rows, heads, length, head_dim]`."""

    def run(q, k, v):
        with sdpa_kernel(BACKENDS[backend]):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=case != "full", enable_gqa=case == "grouped")

    return run


def flex(case: str, length: int, heads: int):
    """The same with flex_attention; the block mask is made once, as a training run would."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device="cuda") / heads)

    def seen(b, h, query, key):
        allowed = query >= key
        if case == "window":
            allowed &= query - key < WINDOW
        if case == "packed":
            allowed &= query // TEXT == key // TEXT
        return allowed

    def score(score, b, h, query, key):
        if case == "softcap":
            return CAP * torch.tanh(score / CAP)
        return score - slopes[h] * (query - key)

    blocks = create_block_mask(seen, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, score_mod=score if case in ("softcap", "alibi") else None)


def milliseconds(run, times: int) -> list[float]:
    """Of the GPU, for each of a number of calls after three."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def measured(case: str, length: int, head_dim: int, implementation: str, times: int) -> dict:
    rows, heads, kv_heads = shape(case, length, head_dim)
    q, k, v, g = (torch.randn(rows, h, length, head_dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads, heads))
    for a in (q, k, v):
        a.requires_grad_()
    try:
        run = flex(case, length, heads) if implementation == "flex" else sdpa(case, implementation)

        def both():
            torch.autograd.grad(run(q, k, v), (q, k, v), g)

        with torch.no_grad():
            forward = milliseconds(lambda: run(q, k, v), times)
        return {"forward": forward, "both": milliseconds(both, times)}
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"refused": str(error).splitlines()[0][:120]}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    serve(lambda request: measured(**json.loads(request)))
