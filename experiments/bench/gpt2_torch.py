"""GPT-2's training step in PyTorch, compiled: scaled-dot-product attention by one backend, fused AdamW, bf16 by autocast."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
RATE, BETAS, EPSILON, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int, vocab: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def take(self, weights: dict[str, np.ndarray]) -> None:
        """Takes lmx's parameters, by their names there."""

        def put(to: torch.Tensor, numbers: np.ndarray) -> None:
            to.copy_(torch.from_numpy(np.ascontiguousarray(numbers)).reshape(to.shape))

        put(self.tokens.weight, weights["embed"])
        put(self.positions.weight, weights["positions"])
        put(self.norm.weight, weights["norm/scale"])
        put(self.norm.bias, weights["norm/bias"])
        width = self.tokens.weight.shape[1]
        for i, block in enumerate(self.blocks):
            p = {n.removeprefix("layers/0/0/"): a[i] for n, a in weights.items() if n.startswith("layers")}
            names = [f"attention/{n}" for n in ("query", "key", "value")]
            put(block.qkv.weight, np.concatenate([p[f"{n}/weight"].reshape(width, -1).T for n in names]))
            put(block.qkv.bias, np.concatenate([p[f"{n}/bias"].reshape(-1) for n in names]))
            linears = (("attention/output", block.out), ("feedforward/up", block.up), ("feedforward/down", block.down))
            for name, linear in linears:
                put(linear.weight, p[f"{name}/weight"].reshape(-1, linear.out_features).T)
                put(linear.bias, p[f"{name}/bias"])
            for name, norm in (("attention_norm", block.norm1), ("feedforward_norm", block.norm2)):
                put(norm.weight, p[f"{name}/scale"])
                put(norm.bias, p[f"{name}/bias"])


def stepper(weights, tokens: np.ndarray, targets: np.ndarray, *, heads: int, backend: str, device: str):
    """A function that trains one step on these tokens and gives the loss before it."""
    torch.set_float32_matmul_precision("high")
    vocab, width = weights["embed"].shape
    layers = len(weights["layers/0/0/attention_norm/scale"])
    model = GPT(layers, width, heads, len(weights["positions"]), vocab)
    model.take(weights)
    model = model.to(device).train()
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "positions.weight"]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "positions.weight"]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, fused=True)
    given = [torch.from_numpy(a.astype(np.int64)).to(device) for a in (tokens, targets)]
    forward = torch.compile(model)

    def run() -> float:
        with sdpa_kernel(BACKENDS[backend]), torch.autocast(device, torch.bfloat16):
            loss = forward(*given)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return run
