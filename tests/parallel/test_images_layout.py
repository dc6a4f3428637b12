"""Models that see, on eight devices: losses, gradients and where they are, and parameters after two steps are one device's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.core.tree import disagreement, named_leaves
from lmx.models import clip, llava, vision
from lmx.models.families import check, functions
from lmx.models.losses import cross_entropy
from lmx.models.vision_config import CaptionTransformer, LLaVA, VisionTransformer
from lmx.parallel.context import arrange
from lmx.parallel.layout import SHARDS, Layout, make_mesh
from lmx.parallel.rules import rules, shardings

SIZES = {"layers": 3, "embed": 16, "heads": 4, "mlp": 32, "init_std": 0.2}
SEES = VisionTransformer(**SIZES, image_size=(8, 8), patch_size=(4, 4), head="classifier", labels=4)
MODELS = {
    "vit": SEES,
    "llava": LLaVA(**SIZES, vocab=48, context=16, image=replace(SEES, head="none", labels=0), image_token=3, image_layers=(-2, 1)),
}
MODELS["llava of patches alone"] = replace(MODELS["llava"], image=replace(MODELS["llava"].image, class_token=False), image_class=True)
CASES = [
    ("vit", Layout(fsdp=4, tensor=2, zero=1, sequence=False)),
    ("llava", Layout(data=2, fsdp=2, tensor=2)),
    ("llava of patches alone", Layout(data=2, tensor=2, context=2)),
]
ROWS, LENGTH, IMAGE = 8, 16, slice(10, 14)  # of a ring of two devices, the first has its end and the second its beginning


def batch() -> dict:
    """Rows that are an image, its class, and a text with the image in it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 48, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, IMAGE] = 3
    pixels = rng.normal(size=(ROWS, 3, 8, 8)).astype(np.float32)
    return {"pixels": pixels, "classes": rng.integers(0, 4, ROWS).astype(np.int32), "tokens": tokens}


def loss_of(config, params, batch: dict, execution: Execution):
    if isinstance(config, VisionTransformer):
        rows = vision.classes(params, config, vision.forward(params, config, batch["pixels"], execution=execution).hidden, execution)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(rows), batch["classes"][:, None], 1))
    tokens = batch["tokens"]
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
    read = arrange({"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": weights}, execution)
    hidden = llava.forward(params, config, read["tokens"], pixels=batch["pixels"], execution=execution).hidden
    return cross_entropy(params, config, hidden, read["targets"], read["weights"], execution=execution)[0] / weights.sum()


def trained(config, layout: Layout | None) -> dict:
    """Losses of two steps of descent, the first one's gradient, and the parameters after them."""
    check(config)
    specs = functions(config).specs(config)
    if layout is None:
        layout, execution = Layout(), Execution()
    else:
        split = rules(layout, split=layout.zero >= 2)
        execution = Execution(rules=rules(layout), split=split)
    mesh = make_mesh(layout)
    where, gradients = (shardings(specs, mesh, rules(layout, split=layout.zero >= least)) for least in (3, 2))
    params = jax.jit(partial(initial_values, specs=specs), out_shardings=where)(jax.random.key(0))

    def step(params, rows):
        loss, gradient = jax.value_and_grad(partial(loss_of, config))(params, rows, execution)
        return loss, gradient, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(), NamedSharding(mesh, P(SHARDS)))
        step = jax.jit(step, out_shardings=(None, None, where))
        loss, first, params = step(params, rows)
        again, _, params = step(params, rows)
    if layout.devices > 1:
        for name, leaf in named_leaves(first).items():
            unread = not leaf.any()  # the last norm of eyes that are not asked for all layers
            assert unread or leaf.sharding.is_equivalent_to(named_leaves(gradients)[name], leaf.ndim), name
    return jax.device_get({"losses": (loss, again), "gradient": first, "params": params})


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_numbers_do_not_depend_on_the_layout(name, layout):
    found = disagreement(trained(MODELS[name], layout), trained(MODELS[name], None))
    assert max(found.values()) < 2e-5, sorted(found.items(), key=lambda pair: -pair[1])[:5]


@pytest.mark.parametrize("end_token", [9, None])
def test_texts_that_a_ring_splits_are_read_at_their_first_end(end_token):
    rng, layout = np.random.default_rng(0), Layout(context=4)
    tokens, execution = rng.integers(0, 9, (4, 16)), Execution(rules=rules(layout))
    tokens[:, [6, 14]] = 9  # of the first device is the last of eight pieces, beside the first
    hidden = rng.normal(size=(4, 16, 8))

    @jax.jit
    def read(batch):
        placed = arrange(batch, execution)
        return clip.pooled(CaptionTransformer(end_token=end_token), placed["tokens"], placed["hidden"], execution=execution)

    with jax.set_mesh(make_mesh(layout)):
        found = read({"tokens": tokens, "hidden": hidden})
    np.testing.assert_allclose(found, hidden[:, 6], rtol=1e-6)
