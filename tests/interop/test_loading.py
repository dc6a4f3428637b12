"""Parameters go straight to where a layout has them."""

import json

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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 48]}, r"w of shape \[3, 5\] in F32 takes 60 bytes, and has 48"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": ["0", "48"]}, "of w it does not say dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [48]}, "of w it does not say dtype, shape and data_offsets"),
        ({"dtype": ["F32"], "shape": [3, 4], "data_offsets": [0, 48]}, "of w it does not say dtype, shape and data_offsets"),
    ],
)
def test_a_header_that_means_no_tensor_is_refused_by_its_file_and_name(tmp_path, entry, words):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    with pytest.raises(ValueError, match=rf"model\.safetensors.* {words}"):
        open_tensors(tmp_path)


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
