"""Tensors of files that torch.save wrote; `data_files/interop_pickled` was written by PyTorch 2.14, with the same tensors as safetensors."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from lmx.interop.files import has_tensors, mapped, open_tensors
from lmx.interop.pickles import unpickled


@pytest.fixture
def folder(root):
    return root / "tests/data_files/interop_pickled"


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_tensors_of_every_type_shared_transposed_and_empty(folder):
    expected = mapped(folder / "expected.safetensors")
    assert len({tensor.dtype for tensor in expected.values()}) == 7
    same(unpickled(folder / "pytorch_model.bin"), expected)
    assert has_tensors(folder)
    same(open_tensors(folder), expected)


def test_several_files_by_their_index(folder, tmp_path):
    expected = mapped(folder / "expected.safetensors")
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(expected)}
    for file in set(places.values()):
        shutil.copy(folder / "pytorch_model.bin", tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    same(open_tensors(tmp_path), expected)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        open_tensors(tmp_path)


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_made(tmp_path):
    path, made = tmp_path / "pytorch_model.bin", tmp_path / "made"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Command(made)}))
    with pytest.raises(ValueError, match=r"it names \w+\.mkdir, which is no part of a tensor, and is not run"):
        unpickled(path)
    assert not made.exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"steps": 3}))
    with pytest.raises(ValueError, match=r"holds something else than tensors by name \(steps\)"):
        unpickled(path)


@pytest.mark.parametrize("length", [100, 4000])
def test_a_file_cut_short_or_of_another_kind_is_refused(folder, tmp_path, length):
    (tmp_path / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"no archive of PyTorch 1\.6 or later \(cut short, or older\); convert it to safetensors"):
        open_tensors(tmp_path)


def test_a_file_that_lacks_something_in_its_middle_is_refused(folder, tmp_path):
    data = (folder / "pytorch_model.bin").read_bytes()
    for start, stop in ((300, 320), (len(data) // 2, len(data) // 2 + 64)):
        (tmp_path / "pytorch_model.bin").write_bytes(data[:start] + data[stop:])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read \(.*; was it downloaded whole"):
            open_tensors(tmp_path)


@pytest.mark.parametrize("strides", [(-1, 3), (3, 1)])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path, strides):
    path, (row, column) = tmp_path / "pytorch_model.bin", strides
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    places = f"I0\n(I2\nI2\nt(I{row}\nI{column}\nt".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"(S'w'\nctorch._utils\n_rebuild_tensor_v2\n(" + storage + places + b"tRd.")
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 2\) and strides .* reaches beyond its 4 numbers"):
        unpickled(path)
