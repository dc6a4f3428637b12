"""Meshes of devices that are not there, and what is known of chips."""

import pytest

from lmx.parallel import absent, chips
from lmx.parallel.layout import Layout


def test_chips_are_known_by_name_and_by_kind():
    assert chips.chip("h100").kind == "NVIDIA H100 80GB HBM3"
    assert chips.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert chips.peak_flops("cpu", "float32") is None
    with pytest.raises(ValueError, match=r"chip='h1000' is not known; use one of h100, "):
        chips.chip("h1000")


def test_a_chip_without_a_description_is_refused():
    with pytest.raises(ValueError, match=r"chip='a100' cannot be compiled for in its absence; use one of h100"):
        absent.devices(8, "a100")


def test_without_the_wheels_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(absent, "installed", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"extra `cuda`"):
        absent.prepare()


def test_every_chip_that_can_be_compiled_for_is_known():
    assert set(absent.TARGETS) <= set(chips.CHIPS)
    for name, target in absent.TARGETS.items():
        assert f"device_memory_size: {chips.chip(name).memory}" in target
        assert chips.chip(name).kind in target


@pytest.mark.aot
def test_a_mesh_of_absent_gpus_knows_its_hosts(h100):
    mesh = absent.mesh(Layout(data=8, tensor=8), h100)
    assert mesh.devices.size == 64
    hosts = [{device.process_index for device in row} for row in mesh.devices.reshape(8, 8)]
    assert [len(host) for host in hosts] == [1] * 8
    assert len(set.union(*hosts)) == 8
    assert mesh.devices.flat[0].device_kind == chips.chip("h100").kind
