"""Parameters go straight to where a layout has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import interop
from lmx.interop.files import mapped, open_tensors, write_tensors
from lmx.parallel.layout import Layout, make_mesh


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2", "llava"])
def test_each_device_gets_its_part(shared, case):
    layout = Layout(fsdp=2, tensor=2, expert=2)
    _, whole = interop.load(shared / "goldens" / case)
    _, split = interop.load(shared / "goldens" / case, mesh=make_mesh(layout), layout=layout)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    _, narrow = interop.load(shared / "goldens" / case, dtype=jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), narrow, whole)


def test_many_files_are_one_checkpoint(shared, tmp_path):
    tensors = mapped(shared / "goldens" / "llama" / "model.safetensors")
    given = {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()}
    write_tensors(tmp_path, given, shard=40_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    found = open_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], tensors[name])
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors is missing"):
        open_tensors(tmp_path)
