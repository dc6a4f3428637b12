"""GPT-2's training step written by hand in bare JAX, without lmx: what a framework is to cost nothing against."""

from functools import partial

import jax
import jax.numpy as jnp

RATE, B1, B2, EPSILON, DECAY, CLIP = 3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0


def norm(x, scale, bias):
    x = x.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x * scale + bias).astype(jnp.bfloat16)


def block(x, p, attend):
    """One layer; p names its parameters as lmx's table does."""

    def project(y, name, form):
        return jnp.einsum(form, y, p[f"{name}/weight"].astype(jnp.bfloat16)) + p[f"{name}/bias"].astype(jnp.bfloat16)

    y = norm(x, p["attention_norm/scale"], p["attention_norm/bias"])
    q, k, v = (project(y, f"attention/{n}", "bld,dhk->blhk") for n in ("query", "key", "value"))
    x = x + project(attend(q, k, v), "attention/output", "blhk,hkd->bld")
    y = norm(x, p["feedforward_norm/scale"], p["feedforward_norm/bias"])
    y = jax.nn.gelu(project(y, "feedforward/up", "bld,dm->blm"), approximate=True)
    return x + project(y, "feedforward/down", "blm,md->bld")


def loss(params, tokens, targets, attend):
    layers = {n.removeprefix("layers/0/0/"): a for n, a in params.items() if n.startswith("layers")}
    table = params["embed"].astype(jnp.bfloat16)
    x = table[tokens] + params["positions"][: tokens.shape[1]].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(lambda x, p: (block(x, p, attend), None), x, layers, unroll=True)
    x = norm(x, params["norm/scale"], params["norm/bias"])
    logits = jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).mean()


@partial(jax.jit, static_argnames="implementation", donate_argnums=(0, 1, 2))
def step(params, mean, square, count, tokens, targets, implementation):
    """AdamW with clipping: parameters, both moments, and the loss before the step."""
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    value, gradient = jax.value_and_grad(loss)(params, tokens, targets, attend)
    size = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradient.values()))
    gradient = {n: g * jnp.minimum(1, CLIP / size) for n, g in gradient.items()}
    mean = {n: B1 * mean[n] + (1 - B1) * g for n, g in gradient.items()}
    square = {n: B2 * square[n] + (1 - B2) * g * g for n, g in gradient.items()}

    def moved(n, p):
        update = mean[n] / (1 - B1**count) / (jnp.sqrt(square[n] / (1 - B2**count)) + EPSILON)
        return p - RATE * (update + (DECAY * p if n == "embed" or n.endswith("weight") else 0))

    return {n: moved(n, p) for n, p in params.items()}, mean, square, value


def stepper(weights, tokens, targets):
    """A function that trains one step on these tokens and gives the loss before it."""
    params = {n: jnp.asarray(a) for n, a in weights.items()}
    state = params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
    implementation, count = ("cudnn" if jax.default_backend() == "gpu" else "xla"), 0

    def run() -> float:
        nonlocal state, count
        count += 1
        *state, value = step(*state, jnp.float32(count), tokens, targets, implementation)
        return float(jax.block_until_ready((state, value))[1])

    return run
