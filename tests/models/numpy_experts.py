"""A mixture of experts in float64 NumPy, written from the papers: one token, one expert at a time. It shares no code with lmx.

Parameters are a dict of plain arrays: router [embed, experts]; gate, up [experts, embed, mlp]; down [experts, mlp, embed]; and for shared
experts shared_gate, shared_up, shared_down, each with an optional `_bias`, and token_gate [embed, 1].
"""

import math

import numpy as np
from numpy_transformer import ACTIVATIONS, feedforward


def routed(probabilities, choices, *, renormalize):
    """The likeliest experts of a token, and their weights (Mixtral, Jiang et al., 2024, section 2.1)."""
    chosen = sorted(range(len(probabilities)), key=lambda e: (-probabilities[e], e))[:choices]
    weights = probabilities[chosen]
    return chosen, weights / weights.sum() if renormalize else weights


def through(x, p, expert, activation):
    """A token through one expert."""
    hidden = (
        ACTIVATIONS[activation](x @ p["gate"][expert]) * (x @ p["up"][expert])
        if "gate" in p
        else ACTIVATIONS[activation](x @ p["up"][expert])
    )
    return hidden @ p["down"][expert]


def experts(x, p, config, segments):
    """The layer on rows x [batch, length, embed], and for each row its balance loss, router z-loss and share of choices dropped."""
    batch, length, _ = x.shape
    count, choices = config.experts, config.experts_per_token
    slots = length
    if config.expert_capacity is not None:
        slots = min(length, math.ceil(config.expert_capacity * choices * length / count))
    out, balance, router_z, dropped = np.zeros_like(x), np.zeros(batch), np.zeros(batch), np.zeros(batch)
    for b in range(batch):
        wanted, mean, real = np.zeros(count), np.zeros(count), max(1, int((segments[b] > 0).sum()))
        for t in range(length):
            if segments[b, t] == 0:
                continue
            logits = x[b, t] @ p["router"]
            probabilities = np.exp(logits) / np.exp(logits).sum()
            for expert, weight in zip(*routed(probabilities, choices, renormalize=config.renormalize_experts), strict=True):
                if wanted[expert] < slots:
                    out[b, t] += weight * through(x[b, t], p, expert, config.activation)
                else:
                    dropped[b] += 1 / (choices * real)
                wanted[expert] += 1
            mean += probabilities / real
            router_z[b] += math.log(np.exp(logits).sum()) ** 2 / real
        balance[b] = count * (wanted / (choices * real) * mean).sum()
        if config.shared_experts:
            shared = {name.removeprefix("shared_"): value for name, value in p.items() if name.startswith("shared_")}
            gate = 1 / (1 + np.exp(-x[b] @ p["token_gate"])) if config.shared_gate else 1.0
            out[b] += gate * feedforward(x[b], shared, config)
    return out, {"balance": balance, "router_z": router_z, "dropped": dropped}
