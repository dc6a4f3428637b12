"""Settings of a model that one family or another has, on a mesh: the same numbers as on one device."""

from dataclasses import replace

import pytest

import runs
from lmx.models.rope import RopeScaling
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.verify import BOUND, differences

PLAIN = replace(runs.MODEL, norm="rmsnorm", bias=False)
MODELS = {
    "norms on outputs, joint qk-norm": replace(PLAIN, norm_placement="output", qk_norm=True, qk_norm_joint=True, tied=False),
    "one key head, joint qk-norm": replace(PLAIN, kv_heads=1, qk_norm=True, qk_norm_joint=True, norm_offset=True),
    "gated shared experts": replace(PLAIN, experts=4, expert_mlp=8, shared_experts=1, shared_mlp=12, shared_gate=True),
    "parallel norms, biases": replace(
        runs.MODEL, parallel=True, parallel_norms=True, embed_norm=True, head_bias=True, rope_dims=4, projection_bias=False, logit_scale=0.5
    ),
    "Transformer-XL": replace(PLAIN, positions="transformer_xl"),
    "RoPE by the length of a text": replace(PLAIN, rope_scaling=RopeScaling("dynamic", 2.0, 8)),
    "scaled ALiBi": replace(runs.MODEL, positions="alibi", alibi_scaled=True, norm_placement="output"),
}
LAYOUTS = {
    "tensor": Layout(data=2, fsdp=2, tensor=2, sequence=True),
    "pipeline, and expert or context": Layout(fsdp=2, pipeline=2, expert=2),
}
pytestmark = pytest.mark.usefixtures("scanned")


def one_device(name: str) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=MODELS[name]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_numbers_do_not_depend_on_the_layout(name, layout, once):
    degrees = LAYOUTS[layout]
    if MODELS[name].positions == "transformer_xl":
        degrees = replace(degrees, expert=1, data=degrees.data * degrees.expert)
    elif not MODELS[name].experts:
        degrees = replace(degrees, expert=1, context=degrees.expert)
    run = runs.experiment(model=MODELS[name], layout=degrees, microbatches=2)
    check(run)
    found = differences(runs.train_from_shared_start(run), once(one_device, name))
    assert max(found.values()) < BOUND, {part: value for part, value in found.items() if not value < BOUND}
