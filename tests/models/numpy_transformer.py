"""A transformer decoder in float64 NumPy, written from the papers: what lmx's is held against. It shares no code with lmx.

One row after another, one layer, one head at a time. Parameters are a dict of plain arrays:

    embed [vocab, embed], positions [context, embed], norm_scale, norm_bias, head [embed, vocab],
    layers: a list of dicts of query, key, value [embed, heads, head_dim], output [heads, head_dim, embed], gate, up [embed, mlp],
    down [mlp, embed]; each with an optional `_bias`; query_norm, key_norm [head_dim]; and for each norm of the layer
    (attention_norm, feedforward_norm, attention_norm_post, feedforward_norm_post) `_scale` and `_bias`.
"""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


def gelu(x):
    """x times the normal distribution function (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x):
    """Its approximation in the same paper."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "relu_squared": lambda x: np.where(x > 0, x, 0.0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def cap(x, limit):
    """Gemma 2's soft cap."""
    return x if limit is None else limit * np.tanh(x / limit)


def layernorm(x, scale, bias, epsilon):
    """Ba et al. (2016), over the last dimension."""
    centred = x - x.mean(-1, keepdims=True)
    y = scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return y if bias is None else y + bias


def rmsnorm(x, scale, epsilon):
    """Zhang and Sennrich (2019), over the last dimension."""
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def normalise(x, parameters, name, kind, epsilon):
    """The named norm of x; x itself where the layer has no such norm."""
    if f"{name}_scale" not in parameters:
        return x
    if kind == "layernorm":
        return layernorm(x, parameters[f"{name}_scale"], parameters.get(f"{name}_bias"), epsilon)
    return rmsnorm(x, parameters[f"{name}_scale"], epsilon)


def turned(x, positions, theta):
    """RoPE of one head's vectors x [length, d] (Su et al., 2021): the pair (i, i + d/2) as a complex number, turned by the angle
    position * theta^(-2i/d)."""
    half = x.shape[1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    pairs = pairs * np.exp(1j * np.outer(positions, theta ** (-2.0 * np.arange(half) / x.shape[1])))
    return np.concatenate([pairs.real, pairs.imag], 1)


def slope(head, heads):
    """ALiBi's slope (Press et al., 2022), head counting from 0: a geometric series from 2^(-8/n); for n that is no power of two, the
    series of the nearest smaller power, then every other one of twice that power's."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if head < power:
        return 2.0 ** (-8.0 * (head + 1) / power)
    return 2.0 ** (-8.0 * (2 * (head - power) + 1) / (2 * power))


def sinusoid(position, size):
    """The positions of Vaswani et al. (2017), section 3.5."""
    return np.array(
        [math.sin(position / 10000 ** (i / size)) if i % 2 == 0 else math.cos(position / 10000 ** ((i - 1) / size)) for i in range(size)]
    )


def project(x, parameters, name):
    """x [length, in] times a weight [in, ...], with its bias where there is one."""
    y = np.tensordot(x, parameters[name], 1)
    return y + parameters[f"{name}_bias"] if f"{name}_bias" in parameters else y


def attention(x, p, config, positions, segments, window):
    """Attention of one row x [length, embed]; a token of segment 0 sees nothing and gets the output bias alone."""
    length, heads = len(x), config.heads
    share = heads // (config.kv_heads or heads)
    query, key, value = (project(x, p, name) for name in ("query", "key", "value"))
    dim = query.shape[-1]
    mixed = np.zeros((length, heads, dim))
    behind = positions[:, None] - positions[None, :]
    seen = np.tril(np.ones((length, length), bool)) & (segments[:, None] == segments[None, :]) & (segments[:, None] != 0)
    if window is not None:
        seen &= behind < window
    for h in range(heads):
        q, k, v = query[:, h], key[:, h // share], value[:, h // share]
        if config.qk_norm:
            q, k = rmsnorm(q, p["query_norm"], config.norm_epsilon), rmsnorm(k, p["key_norm"], config.norm_epsilon)
        if config.positions == "rope":
            q, k = turned(q, positions, config.rope_theta), turned(k, positions, config.rope_theta)
        scores = cap(q @ k.T / math.sqrt(dim), config.attention_softcap)
        if config.positions == "alibi":
            scores = scores - slope(h, heads) * behind
        weights = np.where(seen, np.exp(scores), 0.0)
        mixed[:, h] = weights @ v / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    y = np.tensordot(mixed, p["output"], 2)
    return y + p["output_bias"] if "output_bias" in p else y


def feedforward(x, p, config):
    """Plain, or gated (Shazeer, 2020)."""
    activation = ACTIVATIONS[config.activation]
    if config.gated:
        return project(activation(project(x, p, "gate")) * project(x, p, "up"), p, "down")
    return project(activation(project(x, p, "up")), p, "down")


def layer(x, p, config, positions, segments, window):
    """One layer of one row, its norms where the config has them."""

    def norm(y, name):
        return normalise(y, p, name, config.norm, config.norm_epsilon)

    if config.norm_placement == "post":
        x = norm(x + attention(x, p, config, positions, segments, window), "attention_norm_post")
        return norm(x + feedforward(x, p, config), "feedforward_norm_post")
    read = norm(x, "attention_norm")
    attended = norm(attention(read, p, config, positions, segments, window), "attention_norm_post")
    if config.parallel:
        return x + attended + norm(feedforward(read, p, config), "feedforward_norm_post")
    x = x + attended
    return x + norm(feedforward(norm(x, "feedforward_norm"), p, config), "feedforward_norm_post")


def logits(parameters, config, tokens, positions, segments):
    """Next-token logits [batch, length, vocab] of tokens [batch, length]; `config` is read for its knobs alone."""
    rows = []
    for row in range(len(tokens)):
        x = parameters["embed"][tokens[row]]
        if config.embed_scale:
            x = x * math.sqrt(config.embed)
        if config.positions == "learned":
            x = x + parameters["positions"][positions[row]]
        if config.positions == "sinusoidal":
            x = x + np.stack([sinusoid(at, config.embed) for at in positions[row]])
        for i, p in enumerate(parameters["layers"]):
            window = config.window if config.pattern[i % len(config.pattern)] == "local" else None
            x = layer(x, p, config, positions[row], segments[row], window)
        x = normalise(x, parameters, "norm", config.norm, config.norm_epsilon)
        rows.append(cap(x @ (parameters["embed"].T if config.tied else parameters["head"]), config.logit_softcap))
    return np.stack(rows)


def loss(rows, targets, weights, z_loss=0.0):
    """The weighted sum of -log p(target) + z_loss log(Z)^2, and of right guesses, over logits [batch, length, vocab]."""
    entropy = z = correct = 0.0
    for row, target, weight in zip(rows.reshape(-1, rows.shape[-1]), targets.ravel(), weights.ravel(), strict=True):
        log_z = row.max() + math.log(np.exp(row - row.max()).sum())
        entropy += weight * (log_z - row[target])
        z += weight * z_loss * log_z**2
        correct += weight * (row[target] == row.max())
    return entropy + z, correct
