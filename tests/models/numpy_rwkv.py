"""RWKV-5 and 6 in float64 NumPy, token by token as the paper has them (Peng et al., 2024, arXiv 2404.05892, section 3): what lmx's are held
against. It shares no code with lmx.

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


def channel_mixing(p, config, x, before):
    share = {name: (1 - s if config.version == 5 else s) for name, s in p["shift"].items()}
    hidden = np.maximum(lerp(x, before, share["key"]) @ p["key"]["weight"], 0) ** 2
    return sigmoid(lerp(x, before, share["receptance"]) @ p["receptance"]["weight"]) * (hidden @ p["value"]["weight"])


def logits(params, config, tokens):
    """Logits [length, vocab] of one text."""
    before = np.zeros((config.layers, 2, config.embed))
    matrices = [[np.zeros((config.head_dim, config.head_dim)) for _ in range(config.heads)] for _ in range(config.layers)]
    rows = []
    for token in tokens:
        x = norm(params["embed"][token], params["embed_norm"], config.norm_epsilon)
        for i, p in enumerate(params["layers"]):
            y = norm(x, p["attention_norm"], config.norm_epsilon)
            mixed, matrices[i] = time_mixing(p["attention"], config, y, before[i, 0], matrices[i])
            x, before[i, 0] = x + mixed, y
            y = norm(x, p["feedforward_norm"], config.norm_epsilon)
            x, before[i, 1] = x + channel_mixing(p["feedforward"], config, y, before[i, 1]), y
        rows.append(norm(x, params["norm"], config.final_norm_epsilon) @ (params["embed"].T if config.tied else params["head"]))
    return np.stack(rows)
