"""A transformer, decoder or encoder, in float64 NumPy, written from the papers: what lmx's is held against. It shares no code with lmx.

One row after another, one layer, one head at a time. Parameters are a dict of plain arrays:

    embed [vocab, embed], positions [rows, embed], token_types [kinds, embed], embed_norm_scale, embed_norm_bias, embed_projection [embed,
    embed] and its bias, norm_scale, norm_bias, transform [embed, embed] and its bias, transform_norm_scale, transform_norm_bias,
    head [embed, vocab], head_bias [vocab],
    layers: a list of dicts (those of one pattern, where all repeats share them) of query, key, value [embed, heads, head_dim],
    output [heads, head_dim, embed], gate, up [embed, mlp],
    down [mlp, embed]; each with an optional `_bias`; query_norm, key_norm [head_dim] (joint: [heads * head_dim]); and for each norm of the layer
    (attention_norm, feedforward_norm, attention_norm_post, feedforward_norm_post) `_scale` and `_bias`;
    relative [buckets, heads]; distances_projection [embed, heads, head_dim], distances_content and distances_position [heads, head_dim] of a
    layer with Transformer-XL's positions. Of an encoder-decoder: encoder, another such dict, and in the decoder's layers what attends to it, `cross_`
    before each name.

Every value with a name passes through `site(name, value)`, without the batch's dimension, which may give another back.
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
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu_tanh": gelu_tanh,
    "tanh": np.tanh,
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


def normalise(x, parameters, name, config):
    """The named norm of x; x itself where the layer has no such norm. Gemma's scale is what is added to 1."""
    if f"{name}_scale" not in parameters:
        return x
    if config.norm == "layernorm":
        return layernorm(x, parameters[f"{name}_scale"], parameters.get(f"{name}_bias"), config.norm_epsilon)
    return rmsnorm(x, parameters[f"{name}_scale"] + (1.0 if config.norm_offset else 0.0), config.norm_epsilon)


def turned(x, positions, segments, config, local):
    """RoPE of one head's vectors x [length, dim] (Su et al., 2021): of its first d dimensions the pair (i, i + d/2), or (2i, 2i + 1), as a
    complex number, turned by the angle position / wavelength."""
    d = config.rope_dims or x.shape[1]
    first = list(range(0, d, 2)) if config.rope_interleaved else list(range(d // 2))
    second = [i + 1 for i in first] if config.rope_interleaved else [i + d // 2 for i in first]
    base, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        base, scaling = config.local_rope_theta, None
    out = x.copy()
    for text in set(segments):
        here = segments == text
        wavelengths, grown = stretched([base ** (2 * i / d) for i in range(d // 2)], base, d, scaling, positions[here].max() + 1)
        for a, b, wavelength in zip(first, second, wavelengths, strict=True):
            pair = (x[here, a] + 1j * x[here, b]) * np.exp(1j * positions[here] / wavelength) * grown
            out[here, a], out[here, b] = pair.real, pair.imag
    return out


def stretched(wavelengths, base, d, scaling, longest):
    """Wavelengths over 2 pi for longer texts, and what turned vectors are multiplied by; `longest`: the length of the text at hand."""
    if scaling is None:
        return wavelengths, 1.0
    s, original = scaling.factor, scaling.original_context
    if scaling.kind == "linear":  # Chen et al. (2023)
        return [w * s for w in wavelengths], 1.0
    if scaling.kind == "dynamic":  # a base by which the longest wavelength grows as the text does
        growth = s * max(longest, original) / original - s + 1
        return [(base * growth ** (d / (d - 2))) ** (2 * i / d) for i in range(d // 2)], 1.0
    if scaling.kind == "longrope":  # Ding et al. (2024)
        factors = scaling.long_factors if longest > original else scaling.short_factors
        return [w * f for w, f in zip(wavelengths, factors, strict=True)], math.sqrt(1 + math.log(s) / math.log(original))
    found = []
    for i, w in enumerate(wavelengths):
        if scaling.kind == "llama3":  # Grattafiori et al. (2024): by how often a wavelength fits
            fits = original / (2 * math.pi * w)
            kept = 1.0 if fits > scaling.high else 0.0 if fits < scaling.low else (fits - scaling.low) / (scaling.high - scaling.low)
        else:  # YaRN (Peng et al., 2023): by the pair's index, between those that fit beta times

            def index(beta):
                return d * math.log(original / (2 * math.pi * beta)) / (2 * math.log(base))

            low, high = max(math.floor(index(scaling.high)), 0), min(math.ceil(index(scaling.low)), d - 1)
            kept = 1.0 - min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        found.append(1 / (kept / w + (1 - kept) / (s * w)))
    return found, 0.1 * math.log(s) + 1 if scaling.kind == "yarn" else 1.0


def qk_normalised(heads, scale, config):
    """Queries or keys of one row [length, heads, head_dim], normalised per head or over all of them."""
    scale = scale + (1.0 if config.norm_offset else 0.0)
    if config.qk_norm_joint:
        return rmsnorm(heads.reshape(len(heads), -1), scale, config.norm_epsilon).reshape(heads.shape)
    return rmsnorm(heads, scale, config.norm_epsilon)


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


def bucket(behind, config):
    """T5's bucket of a distance (Raffel et al., 2020, section 2.1, and their code), in whole numbers: past `exact` the n-th boundary is where
    (distance / exact)^m reaches (furthest / exact)^n, of m buckets."""
    side = config.relative_buckets if config.causal else config.relative_buckets // 2
    exact, first = side // 2, side if behind < 0 and not config.causal else 0
    distance, m, furthest = abs(behind) if not config.causal else max(behind, 0), side - side // 2, config.relative_distance
    if distance < exact:
        return first + distance
    passed = [n for n in range(m) if distance**m * exact**n >= furthest**n * exact**m]
    return first + exact + passed[-1]


def project(x, parameters, name):
    """x [length, in] times a weight [in, ...], with its bias where there is one."""
    y = np.tensordot(x, parameters[name], 1)
    return y + parameters[f"{name}_bias"] if f"{name}_bias" in parameters else y


def plain(name, value):
    return value


def within(site, where):
    return lambda name, value: site(f"{where}/{name}", value)


def attention(x, p, config, positions, segments, window, relative=None, source=None, site=plain):
    """Attention of one row x [length, embed], to itself or to a source, an encoder's output and its segments; a token of segment 0 sees
    nothing and gets the output bias alone."""
    length, heads = len(x), config.heads
    share = heads // (config.kv_heads or heads)
    if source is None:
        order, read, own = config.positions, x, segments
        behind = positions[:, None] - positions[None, :]
        seen = behind == behind if not config.causal else np.tril(np.ones((length, length), bool))
    else:
        order, (read, own) = "none", source
        seen = np.ones((length, len(read)), bool)
    query, key, value = project(x, p, "query"), project(read, p, "key"), project(read, p, "value")
    if config.qk_norm:
        query, key = qk_normalised(query, p["query_norm"], config), qk_normalised(key, p["key_norm"], config)
    dim = query.shape[-1]
    scale = config.attention_scale or 1 / math.sqrt(dim)
    if order == "rope":
        for h in range(heads):
            query[:, h] = turned(query[:, h], positions, segments, config, window is not None)
        for h in range(heads // share):
            key[:, h] = turned(key[:, h], positions, segments, config, window is not None)
    query, key, value = site("query", query), site("key", key), site("value", value)
    mixed = np.zeros((length, heads, dim))
    scored, weighed = np.zeros((2, heads, length, len(read)))
    seen = seen & (segments[:, None] == own[None, :]) & (segments[:, None] != 0)
    if window is not None:
        seen &= behind < window
    for h in range(heads):
        q, k = query[:, h], key[:, h // share]
        scores = cap(scale * (q @ k.T), config.attention_softcap)
        if order == "transformer_xl":  # Dai et al. (2019), section 3.3, the four terms one by one
            content, position = p["distances_content"][h], p["distances_position"][h]
            far = {d: sinusoid(d, x.shape[1]) @ p["distances_projection"][:, h] for d in set(behind.ravel().tolist())}
            by_distance = np.array([[q[i] @ far[d] + position @ far[d] for d in row] for i, row in enumerate(behind.tolist())])
            scores = scores + scale * (by_distance + (k @ content)[None])
        if order == "alibi":
            scores = scores - (scale if config.alibi_scaled else 1.0) * slope(h, heads) * behind
        if order == "relative":
            scores = scores + np.array([[relative[bucket(int(d), config), h] for d in row] for row in behind])
        scored[h] = scores
    scored = site("scores", scored)
    for h in range(heads):
        weights = np.where(seen, np.exp(scored[h]), 0.0)
        weighed[h] = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    weighed = site("weights", weighed)
    for h in range(heads):
        mixed[:, h] = weighed[h] @ value[:, h // share]
    y = np.tensordot(site("mixed", mixed), p["output"], 2)
    return y + p["output_bias"] if "output_bias" in p else y


def feedforward(x, p, config, site=plain):
    """Plain, or gated (Shazeer, 2020)."""
    activation = ACTIVATIONS[config.activation]
    hidden = activation(project(x, p, "gate" if config.gated else "up")) * (project(x, p, "up") if config.gated else 1.0)
    return project(site("feedforward/hidden", hidden), p, "down")


def layer(x, p, config, positions, segments, window, relative=None, source=None, site=plain):
    """One layer of one row, its norms where the config has them."""
    of_cross = {name.removeprefix("cross_"): value for name, value in p.items() if name.startswith("cross_")}

    def norm(y, name):
        return normalise(y, p, name, config)

    here, there = within(site, "attention"), within(site, "cross")
    if config.norm_placement == "post":
        attended = here("output", attention(x, p, config, positions, segments, window, relative, site=here))
        x = norm(x + attended, "attention_norm_post")
        if source is not None:
            x = there("input", x)
            crossed = there("output", attention(x, of_cross, config, positions, segments, None, source=source, site=there))
            x = norm(x + crossed, "cross_norm_post")
        x = site("residual", x)
        return norm(x + site("feedforward/output", feedforward(x, p, config, site)), "feedforward_norm_post")
    read = norm(x, "attention_norm")
    attended = norm(attention(read, p, config, positions, segments, window, relative, site=here), "attention_norm_post")
    attended = here("output", attended)
    if config.parallel:
        other = norm(x, "feedforward_norm") if config.parallel_norms else read
        return x + attended + site("feedforward/output", norm(feedforward(other, p, config, site), "feedforward_norm_post"))
    x = x + attended
    if source is not None:
        x = there("input", x)
        crossed = attention(norm(x, "cross_norm"), of_cross, config, positions, segments, None, source=source, site=there)
        x = x + there("output", norm(crossed, "cross_norm_post"))
    x = site("residual", x)
    fed = feedforward(norm(x, "feedforward_norm"), p, config, site)
    return x + site("feedforward/output", norm(fed, "feedforward_norm_post"))


def transform(x, parameters, config):
    """BERT's masked head (Devlin et al., 2019) before its matrix."""
    y = ACTIVATIONS[config.head_activation or config.activation](project(x, parameters, "transform"))
    return normalise(y, parameters, "transform_norm", config)


def logits(parameters, config, tokens, positions, segments, source=None, token_types=None, blocks=None, sites=None):
    """Logits [batch, length, vocab] of tokens [batch, length]; `config` is read for its knobs alone. `source`: tokens, positions and segments
    that an encoder reads; `sites`: the function `site` of each row."""
    hidden = states(parameters, config, tokens, positions, segments, source, token_types, blocks, sites)
    if config.head == "masked":
        hidden = np.stack([transform(x, parameters, config) for x in hidden])
    heard = (config.logit_scale or 1.0) * (hidden @ (parameters["embed"].T if config.tied else parameters["head"]))
    return cap(heard + parameters.get("head_bias", 0.0), config.logit_softcap)


def states(parameters, config, tokens, positions, segments, source=None, token_types=None, blocks=None, sites=None):
    """What the last layer gives, normalised, [batch, length, embed]."""
    rows = []
    if source is not None:
        of_encoder = sites and [within(site, "encoder") for site in sites]
        encoded = states(parameters["encoder"], config.encoder, *source, sites=of_encoder)
    for row in range(len(tokens)):
        site = sites[row] if sites else plain
        x = parameters["embed"][tokens[row]]
        if config.embed_scale:
            x = x * math.sqrt(config.embed)
        if config.positions == "learned":
            x = x + parameters["positions"][config.first_position + positions[row]]
        if config.token_types:
            x = x + parameters["token_types"][token_types[row]]
        if config.positions == "sinusoidal":
            x = x + np.stack([sinusoid(at, x.shape[-1]) for at in positions[row]])
        if config.block_positions:
            x = x + parameters["block_positions"][blocks[row]]
        x = normalise(x, parameters, "embed_norm", config)
        if config.embed_size:
            x = project(x, parameters, "embed_projection")
        x = site("embeddings", x)
        for i in range(config.layers):
            here = within(site, f"layers/{i}")
            p = parameters["layers"][i % len(parameters["layers"])]
            window = config.window if config.pattern[i % len(config.pattern)] == "local" else None
            across = source and (encoded[row], source[2][row])
            x = here("input", x)
            x = layer(x, p, config, positions[row], segments[row], window, parameters.get("relative"), across, here)
            x = here("output", x)
        rows.append(site("final", normalise(x, parameters, "norm", config)))
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
