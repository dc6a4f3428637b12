"""Muon's matrices, split over devices any way, are orthogonalised as whole ones are, and nothing but the planned trades is sent."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lmx.core.params import ParamSpec
from lmx.parallel import hlo
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import partition, rules
from lmx.train import orthogonal

PROJECTION = ParamSpec((3, 8, 4, 6), ("layers", "embed", "heads", None), 1, layers=(0, 1, 2))
BACK = ParamSpec((3, 4, 6, 8), ("layers", "heads", None, "embed"), 2, layers=(0, 1, 2))
EXPERTS = ParamSpec((2, 4, 8, 12), ("layers", "experts", "embed", "mlp"), 1, layers=(0, 1))


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        (PROJECTION, Layout(fsdp=2, tensor=4)),  # fewer matrices than devices
        (BACK, Layout(data=2, fsdp=2, tensor=2)),
        (EXPERTS, Layout(expert=2, fsdp=4)),
        (EXPERTS, Layout(pipeline=2, tensor=2, fsdp=2)),
    ],
    ids=["fsdp and tensor", "two dimensions back", "experts", "pipeline"],
)
def test_matrices_are_whole_wherever_their_parts_are(spec, layout):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=spec.shape)
        whole = x.reshape(-1, *(np.prod([spec.shape[d] for d in side]) for side in spec.sides))
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        s = s / (np.linalg.norm(s, axis=-1, keepdims=True) + orthogonal.EPSILON)
        for _ in range(orthogonal.ITERATIONS):  # of singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        mesh = make_mesh(layout)
        place = NamedSharding(mesh, partition(spec.axes, spec.shape, rules(layout, split=True), dict(mesh.shape)))
        with jax.set_mesh(mesh):
            run = jax.jit(partial(orthogonal.orthogonal, spec), in_shardings=place, out_shardings=place)
            compiled = run.lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()
            found = np.asarray(compiled(jax.device_put(jnp.asarray(x), place)))
    np.testing.assert_allclose(found, (u * s[:, None] @ vt).reshape(spec.shape), rtol=0, atol=1e-12)

    def volumes(collectives, size) -> Counter:
        return sum((Counter({(c.kind, tuple(c.axes)): size(c)}) for c in collectives), Counter())

    planned = volumes(orthogonal.traffic([spec], layout, width=8, streamed=False), lambda t: t.volume)
    assert planned
    assert volumes(hlo.collectives(compiled.as_text(), mesh), lambda c: c.size * c.times) == planned
