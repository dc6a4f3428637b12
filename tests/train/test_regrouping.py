"""Losses are sums with weights: any regrouping of the same examples leaves loss and gradient unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.core.tree import disagreement
from lmx.models import transformer
from lmx.models.config import Transformer
from lmx.parallel.feed import batch_sharding, place
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules
from lmx.train.objectives import CausalLM
from lmx.train.step import Task, accumulate

pytestmark = pytest.mark.usefixtures("compiled_here")

RULES = rules(Layout())
MODEL = Transformer(vocab=40, layers=2, embed=16, heads=2, mlp=32, context=32, init_std=0.2)
LENGTH, TEXTS = 16, 8
TASK = Task(MODEL, CausalLM(z_loss=1e-2), Execution(rules=RULES))
PARAMS = None


def params():
    global PARAMS
    if PARAMS is None:
        PARAMS = initial_values(jax.random.key(0), transformer.specs(MODEL))
    return PARAMS


@jax.jit
def gradients(params, batch):
    seed = 1 / TASK.objective.weight(batch)
    (loss, _), gradient = accumulate(TASK)(params, batch, jax.random.key(1), seed)
    return loss * seed, gradient


def packed(texts, rows, order, gaps):
    """Texts (of at most 8 tokens) as a batch of `rows` rows, two to a row, in an order, with padding before and between them."""
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: np.zeros((rows, LENGTH), np.int32) for name in names} | {"weights": np.zeros((rows, LENGTH), np.float32)}
    for place_, text in enumerate(order):
        row, half = divmod(place_, 2)
        tokens = texts[text]
        n = len(tokens) - 1
        start = 8 * half + min(gaps[place_], 8 - n)
        span = slice(start, start + n)
        batch["tokens"][row, span], batch["targets"][row, span] = tokens[:-1], tokens[1:]
        batch["segments"][row, span], batch["positions"][row, span], batch["weights"][row, span] = half + 1, range(n), 1
    batch["example_id"] = np.arange(rows, dtype=np.uint32)
    return batch


texts = st.lists(st.lists(st.integers(0, 39), min_size=2, max_size=9), min_size=TEXTS, max_size=TEXTS)
GROUPINGS = {
    "microbatches": (4, 2, Layout()),
    "padding rows": (1, 8, Layout()),
    "data shards": (1, 4, Layout(data=4)),
    "microbatches over shards of data, fsdp and tensor": (2, 4, Layout(data=2, fsdp=2, tensor=2)),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(texts=texts, seed=st.integers(0, 2**16))
def test_loss_and_gradient_do_not_depend_on_how_examples_are_grouped(grouping, texts, seed):
    random = np.random.default_rng(seed)
    microbatches, rows, layout = GROUPINGS[grouping]
    plain = packed(texts, 4, range(TEXTS), [0] * TEXTS)
    expected_loss, expected = gradients(params(), {name: jnp.asarray(a)[None] for name, a in plain.items()})

    total = microbatches * rows
    other = packed(texts, total, random.permutation(TEXTS), random.integers(0, 8, TEXTS))
    shuffled = random.permutation(total)
    other = {name: a[shuffled] for name, a in other.items()}
    mesh = make_mesh(layout)
    with jax.set_mesh(mesh):
        batch = place(other, np.arange(total), (microbatches, rows), batch_sharding(mesh, microbatches=True))
        loss, gradient = gradients(jax.device_get(params()), batch)

    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert max(disagreement(gradient, expected).values()) < 2e-5


def test_a_lost_segment_mask_or_a_mean_of_means_would_be_seen():
    """The property above has teeth: leaking across packed texts, or averaging microbatch means, moves the loss by far more."""
    texts = [list(range(i, i + 3 + i % 5)) for i in range(TEXTS)]
    batch = packed(texts, 4, range(TEXTS), [0] * TEXTS)
    loss, _ = gradients(params(), {name: jnp.asarray(a)[None] for name, a in batch.items()})
    leaky = batch | {"segments": (batch["segments"] > 0).astype(np.int32)}
    leaked, _ = gradients(params(), {name: jnp.asarray(a)[None] for name, a in leaky.items()})
    parts = [gradients(params(), {name: jnp.asarray(a[i : i + 1])[None] for name, a in batch.items()})[0] for i in range(4)]
    assert abs(leaked - loss) > 1e-3
    assert abs(np.mean(parts) - loss) > 1e-3
