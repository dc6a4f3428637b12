"""Engines over several devices write what an engine on one does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.infer import Engine, Replicas, Sampling
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.parallel.layout import Layout

pytestmark = pytest.mark.usefixtures("cheaply_compiled")
MODEL = Transformer(vocab=32, layers=3, embed=16, heads=4, kv_heads=2, mlp=16, context=32, window=6, pattern=("local", "global"))
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [1, 2, 3, 4, 5, 6, 7, 8, 20], [21, 22], list(range(3, 17))]
OPTIONS = {"rows": 2, "chunk": 8, "page": 4, "pages": 10}
SCORED = Sampling(temperature=0, log_probs="raw")


def params_of(model):
    rng = np.random.default_rng(0)
    return map_named(
        lambda _, spec: jnp.asarray(0.4 * rng.normal(size=spec.shape), jnp.float32), functions(model).specs(model), is_leaf=is_spec
    )


def texts(engine, **wishes):
    jobs = [engine.submit(prompt, max_new_tokens=8, sampling=SCORED, **wishes) for prompt in PROMPTS]
    engine.run()
    return [(one.tokens, one.log_probs) for job in jobs for one in job.completions]


def agree(found, wanted):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(tensor=4), Layout(pipeline=2), Layout(pipeline=2, tensor=2)], ids=lambda l: f"{l.pipeline}x{l.tensor}"
)
def test_tokens(layout):
    params = params_of(MODEL)
    agree(texts(Engine(MODEL, params, layout=layout, **OPTIONS)), texts(Engine(MODEL, params, **OPTIONS)))
