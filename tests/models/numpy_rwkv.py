"""RWKV-5, 6 and 7 in float64 NumPy, token by token as the papers have them (Peng et al., 2024, arXiv 2404.05892, section 3; Peng et al., 2025,
arXiv 2503.14456, section 4): what lmx's are held against. It shares no code with lmx.

Parameters are a dict of plain arrays: embed [vocab, embed], head [embed, vocab], embed_norm and norm (scale, bias), and layers, a list of dicts
of lmx's names.
"""

import numpy as np


def norm(x, p, epsilon):
    return (x - x.mean()) / np.sqrt(x.var() + epsilon) * p["scale"] + p["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lerp(a, b, share):
    """Equation 3: from a to b."""
    return a + (b - a) * share


def time_mixing(p, config, x, before, matrices):
    """What one token gets, and the state that it leaves, a list of matrices."""
    heads, dim = config.heads, config.head_dim
    of_before = {}
    if config.version == 5:
        of_before = {name: 1 - share for name, share in p["shift"].items()}
        decay = p["time"]["decay"]
    else:
        inner = np.tanh(np.einsum("e,enr->nr", lerp(x, before, p["shift"]["base"]), p["down"]["mix"]))
        for i, name in enumerate(("decay", "key", "value", "receptance", "gate")):
            of_before[name] = p["shift"][name] + inner[i] @ p["up"]["mix"][i]
        low = np.tanh(lerp(x, before, of_before["decay"]) @ p["down"]["decay"])
        decay = p["time"]["decay"].reshape(heads, dim) + np.einsum("r,rhd->hd", low, p["up"]["decay"])
    r, k, v, g = (
        np.einsum("e,ehd->hd", lerp(x, before, of_before[name]), p[name]["weight"]) for name in ("receptance", "key", "value", "gate")
    )
    w, u, rows, after = np.exp(-np.exp(decay)), p["time"]["bonus"], [], []
    for h in range(heads):
        outer = np.outer(k[h], v[h])
        read = r[h] @ (matrices[h] + np.diag(u[h]) @ outer)
        after.append(np.diag(w[h]) @ matrices[h] + outer)
        part = {name: p["norm"][name][h * dim : (h + 1) * dim] for name in ("scale", "bias")}
        rows.append(norm(read, part, config.head_norm_epsilon) * g[h] * sigmoid(g[h]))
    return np.einsum("hd,hde->e", np.stack(rows), p["output"]["weight"]), after


def low_rank(x, p, activation=lambda x: x):
    """`activation(x A) B + bias`, [heads, head_dim]."""
    return np.einsum("r,rhd->hd", activation(x @ p["down"]["weight"]), p["up"]["weight"]) + p["up"].get("bias", 0.0)


def delta_mixing(p, config, x, before, matrices, first):
    """RWKV-7's: what one token gets, the state that it leaves (values by keys, as the paper has it), and its values if it is of the first layer,
    which has none to read."""
    mix = {name: lerp(x, before, share) for name, share in p["shift"].items()}
    r, k, v = (np.einsum("e,ehd->hd", mix[name], p[name]["weight"]) for name in ("receptance", "key", "value"))
    w = np.exp(-np.exp(-0.5) * sigmoid(low_rank(mix["decay"], p["decay"], np.tanh)))
    a, g = sigmoid(low_rank(mix["rate"], p["rate"])), low_rank(mix["gate"], p["gate"], sigmoid)
    if first is None:
        first = v
    else:
        v = lerp(v, first, sigmoid(low_rank(mix["value"], p["first"])))
    place, replaced = (p["keys"][name].reshape(k.shape) for name in ("place", "rate"))
    rows, after, dim = [], [], config.head_dim
    for h in range(config.heads):
        removal = k[h] * place[h] / np.linalg.norm(k[h] * place[h])
        added = k[h] * lerp(1, a[h], replaced[h])
        state = matrices[h] @ (np.diag(w[h]) - np.outer(removal, a[h] * removal)) + np.outer(v[h], added)
        after.append(state)
        part = {name: p["norm"][name][h * dim : (h + 1) * dim] for name in ("scale", "bias")}
        bonus = (r[h] * p["keys"]["bonus"][h] * added).sum() * v[h]
        rows.append(g[h] * (norm(state @ r[h], part, config.head_norm_epsilon) + bonus))
    return np.einsum("hd,hde->e", np.stack(rows), p["output"]["weight"]), after, first


def channel_mixing(p, config, x, before):
    share = {name: (1 - s if config.version == 5 else s) for name, s in p["shift"].items()}
    hidden = np.maximum(lerp(x, before, share["key"]) @ p["key"]["weight"], 0) ** 2
    if config.version == 7:
        return hidden @ p["value"]["weight"]
    return sigmoid(lerp(x, before, share["receptance"]) @ p["receptance"]["weight"]) * (hidden @ p["value"]["weight"])


def logits(params, config, tokens):
    """Logits [length, vocab] of one text."""
    before = np.zeros((config.layers, 2, config.embed))
    matrices = [[np.zeros((config.head_dim, config.head_dim)) for _ in range(config.heads)] for _ in range(config.layers)]
    rows = []
    for token in tokens:
        x, first = norm(params["embed"][token], params["embed_norm"], config.norm_epsilon), None
        for i, p in enumerate(params["layers"]):
            y = norm(x, p["attention_norm"], config.norm_epsilon)
            if config.version == 7:
                mixed, matrices[i], first = delta_mixing(p["attention"], config, y, before[i, 0], matrices[i], first)
            else:
                mixed, matrices[i] = time_mixing(p["attention"], config, y, before[i, 0], matrices[i])
            x, before[i, 0] = x + mixed, y
            y = norm(x, p["feedforward_norm"], config.norm_epsilon)
            x, before[i, 1] = x + channel_mixing(p["feedforward"], config, y, before[i, 1]), y
        rows.append(norm(x, params["norm"], config.final_norm_epsilon) @ (params["embed"].T if config.tied else params["head"]))
    return np.stack(rows)
