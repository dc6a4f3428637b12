"""Talking while computing: what XLA is told, and what it then does in a step compiled for absent H100s."""

import jax
import pytest

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.parallel import hlo, overlap
from lmx.parallel.layout import Layout, make_mesh
from lmx.train.experiment import Experiment
from lmx.train.planning import compile_step

SCHEDULED = """
%fused (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  ROOT %dot.1 = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cheap (a: f32[8,8]) -> f32[8,8] {
  ROOT %add.1 = f32[8,8]{1,0} add(%a, %a)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %ag.1 = (f32[8], f32[64]) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %x.1 = f32[8,8]{1,0} fusion(%a, %a), kind=kCustom, calls=%fused
  %ag.2 = (f32[8], f32[64]) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %done.1 = f32[64] all-gather-done(%ag.1)
  %y.1 = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%cheap
  %done.2 = f32[64] all-gather-done(%ag.2)
  %z.1 = f32[8,8]{1,0} custom-call(%a, %a), custom_call_target="__cublas$gemm"
  %rs.1 = f32[64] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_a_collective_is_covered_by_products_between_its_start_and_its_end():
    found = hlo.collectives(SCHEDULED, make_mesh(Layout(fsdp=8)))
    assert [(one.kind, one.covered) for one in found] == [("all-gather", True), ("all-gather", False), ("all-reduce", False)]
    assert hlo.covered(found) == pytest.approx(found[0].volume / sum(one.volume for one in found))


def test_a_cpu_and_a_single_device_are_told_nothing():
    assert overlap.options(make_mesh(Layout(fsdp=8)), Layout(fsdp=8, remat="full")) is None
    assert overlap.options(make_mesh(Layout()), Layout(remat="full")) is None


def test_an_option_is_set_under_the_newest_name_that_is_known_and_left_out_where_none_is(monkeypatch):
    mesh = make_mesh(Layout(fsdp=8)).abstract_mesh
    monkeypatch.setattr(overlap.absent, "prepared", lambda: True)
    monkeypatch.setattr(overlap.absent, "devices", lambda number: [type("Device", (), {"platform": "gpu"})])
    (scheduler,) = overlap.SCHEDULED
    gradients, ahead = ["xla_gpu_pipeline_reduce_scatter", "xla_gpu_enable_pipelined_all_reduce"], ["xla_gpu_pipeline_all_gather"]
    monkeypatch.setattr(overlap, "known", lambda device, name, value: name != "xla_gpu_pipeline_all_reduce")

    def asked(**degrees) -> list[str]:
        return list(overlap.options(mesh, Layout(**degrees)))

    assert asked(fsdp=8, remat="full") == asked(fsdp=8, remat="sites") == [scheduler, *gradients, *ahead]
    assert asked(fsdp=8) == asked(fsdp=8, remat="dots") == [scheduler]
    nothing_to_gather = ({"fsdp": 8, "zero": 2}, {"data": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "pipeline": 2})
    assert all(asked(**degrees, remat="full") == [scheduler, *gradients] for degrees in nothing_to_gather)
    monkeypatch.setattr(overlap, "known", lambda device, name, value: name == scheduler)
    assert asked(fsdp=8, remat="full") == [scheduler]


def test_an_unknown_option_is_found_out_by_the_compiler():
    device = jax.devices()[0]
    assert overlap.known(device, "xla_cpu_enable_fast_math", True)
    assert not overlap.known(device, "xla_no_such_option", True)


# For absent H100s. `pytest -m aot -n 0`, where the extra `cuda` is installed.


def loops() -> dict[tuple[str, bool], float]:
    """The share of bytes beside products of each kind of collective in the scans, forward and backward (True), of eight layers' step on
    eight H100s."""
    model = Transformer(vocab=8192, layers=8, embed=2048, heads=16, mlp=8192, context=2048)
    layout = Layout(fsdp=8, zero=3, remat="full")
    run = Experiment(name="overlap", data=Data(train="unread", length=2048), model=model, layout=layout, precision="bf16", batch=64)
    found = [c for c in compile_step(run, "h100").collectives if c.times > 1]
    return {
        (kind, back): hlo.covered(c for c in found if c.kind == kind and ("transpose(jvp" in c.name) == back)
        for kind in ("all-gather", "reduce-scatter")
        for back in (False, True)
    }


@pytest.mark.aot
def test_layers_are_gathered_and_gradients_summed_beside_products(h100, monkeypatch):
    told = loops()
    modes = [name for names in (*overlap.GRADIENTS, overlap.PARAMETERS) for name, value in names.items() if value == overlap.PIPELINED]
    off = dict.fromkeys(modes, "COLLECTIVE_PIPELINING_MODE_OFF")
    monkeypatch.setattr(overlap, "options", lambda mesh, layout: off | dict.fromkeys(overlap.SCHEDULED, False))
    untold = loops()
    assert not any(untold.values())
    assert told["all-gather", False] > 0.7
    assert told["all-gather", True] > 0.8
    assert told["reduce-scatter", True] > 0.9
