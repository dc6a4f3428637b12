"""Shapes in signatures are documentation at run time; here beartype checks them, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
from jaxtyping import install_import_hook

with install_import_hook(["lmx.kernels", "lmx.models", "lmx.core.weights", "lmx.infer.sampling"], "beartype.beartype"):
    import lmx.kernels.attention
    import lmx.models.families
    import lmx.models.losses

import jax
import jax.numpy as jnp
from lmx.core.params import initial_values
from lmx.models import stack
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.models.heads import classes
from lmx.models.dropout import Dropout
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import Embedded, Source
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer


def run(config, *, mode):
    empty_cache, forward, specs = (getattr(functions(config), name) for name in ("empty_cache", "forward", "specs"))
    params = initial_values(jax.random.key(0), specs(config))
    tokens, ids = jnp.zeros((3, 4), jnp.int32), jnp.arange(3, dtype=jnp.int32)
    inputs = {"positions": tokens, "segments": tokens + 1}
    if isinstance(config, EncoderDecoder):
        inputs["source"] = Source(jnp.zeros((3, 5), jnp.int32))
    if mode == "training":
        hidden = forward(params, config, tokens, **inputs, dropout=Dropout(jax.random.key(0), ids, 0.1)).hidden
        return cross_entropy(params, config, hidden, tokens, jnp.ones((3, 4)), z_loss=0.1)
    if mode == "classes":
        first = jnp.zeros(3, jnp.int32)
        return classes(params, config, forward(params, config, tokens, **inputs, token_types=tokens).hidden, first)
    params = params | {"layers": stack.unstack(params["layers"])}
    first = forward(params, config, tokens, **inputs, cache=empty_cache(config, 3, 8))
    return logits(params, config, forward(params, config, tokens[:, :1], cache=first.cache).hidden)


def model(encoder=False, **knobs):
    if encoder:
        return EncoderDecoder(**SIZES, **knobs, encoder=Transformer(**SIZES, **knobs, causal=False))
    return Transformer(**SIZES, **knobs)


SIZES = {"vocab": 8, "layers": 2, "embed": 8, "heads": 2, "mlp": 8, "context": 8}
for knobs in (
    {"kv_heads": 1, "qk_norm": True, "window": 2, "pattern": ("local", "global")},
    {"positions": "alibi", "gated": False, "norm": "layernorm", "bias": True, "norm_placement": "post"},
    {"positions": "learned", "parallel": True, "tied": False},
    {"positions": "sinusoidal", "norm_placement": "sandwich"},
    {"positions": "transformer_xl"},
    {"positions": "relative", "relative_buckets": 8, "relative_distance": 9, "encoder": True},
):
    for mode in ("training", "decoding"):
        jax.eval_shape(lambda: run(model(**knobs), mode=mode))
for mode in ("training", "decoding"):
    jax.eval_shape(lambda: run(RWKV(vocab=8, layers=2, embed=8, channels=12, rescale_every=1), mode=mode))
    for version in (6, 7):
        jax.eval_shape(lambda: run(RWKV(version=version, vocab=8, layers=2, embed=8, channels=12, head_dim=4), mode=mode))
ENCODER = {"causal": False, "embed_size": 4, "token_types": 2, "shared_layers": True, "bias": True, "embed_norm": True}
for head, labels, mode in (("masked", 0, "training"), ("classifier", 3, "classes"), ("tokens", 3, "classes"), ("detector", 0, "classes")):
    jax.eval_shape(lambda: run(Transformer(**SIZES, **ENCODER, head=head, labels=labels), mode=mode))

def see(config):
    module, texts = functions(config), () if type(config) is VisionTransformer else (jnp.zeros((3, 4), jnp.int32),)
    params, pixels = initial_values(jax.random.key(0), module.specs(config)), jnp.zeros((3, 3, 4, 4))
    if isinstance(config, LLaVA):
        return module.forward(params, config, *texts, pixels=pixels).hidden
    found = module.forward(params, config, *texts, pixels)
    if isinstance(config, CLIP):
        return module.contrastive_loss(module.similarities(params, found.images, found.texts))
    return module.classes(params, config, found.hidden)


seen = {"layers": 2, "embed": 8, "heads": 2, "mlp": 8, "image_size": (4, 4), "patch_size": (2, 2)}
jax.eval_shape(lambda: see(VisionTransformer(**seen, head="classifier", labels=3)))
reader = CaptionTransformer(**SIZES, head="projection", end_token=7)
jax.eval_shape(lambda: see(CLIP(VisionTransformer(**seen, head="projection", summary_norm=True), reader)))
jax.eval_shape(lambda: see(LLaVA(**SIZES, image=VisionTransformer(**seen), image_layers=(-1, 0))))
print("checked")
"""

WRONG = """
from jaxtyping import install_import_hook

with install_import_hook("lmx.models", "beartype.beartype"):
    import lmx.models.transformer

import jax.numpy as jnp
from lmx.models.rope import rope_table

rope_table(jnp.zeros((4,), jnp.int32), 8, 1e4)
"""


def python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_shapes_in_signatures_are_those_of_the_arrays():
    done = python(PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "checked\n"


@pytest.mark.parametrize("program", [WRONG])
def test_a_shape_that_is_not_the_signatures_is_noticed(program):
    done = python(program)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr
