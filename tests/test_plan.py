"""The door `python -m lmx.plan`, and what it advises."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from experiments.gpt2_124m import experiment as gpt2
from experiments.shakespeare import experiment as shakespeare
from experiments.shakespeare_t5 import experiment as t5
from lmx import plan as plans
from lmx.core.config import ConfigError
from lmx.models.config import RWKV
from lmx.models.families import functions
from lmx.parallel.layout import Layout
from lmx.train import pictures
from lmx.train.advice import candidates

LARGE = dataclasses.replace(
    gpt2,
    model=dataclasses.replace(gpt2.model, layers=48, embed=4096, heads=32, positions="rope", context=4096),
    data=dataclasses.replace(gpt2.data, length=4096),
    precision="bf16",
    batch=64,
    microbatches=1,
)


def on(experiment, **degrees):
    return dataclasses.replace(experiment, layout=Layout(**degrees))


def test_the_door_prints_a_table(capsys):
    plans.main(
        ["experiments.gpt2_124m", "--devices", "8", "--precision", "bf16", "--layout.remat=full", "--microbatches", "20", "--batch", "480"]
    )
    out = capsys.readouterr().out
    for text in ("gpt2_124m on 8 x NVIDIA H100 80GB HBM3: fsdp 8, zero 3, remat full", "parameters", "optimizer", "total", "of 84.94 GB"):
        assert text in out
    assert "reduce-scatter: gradients of layers" in out
    assert "MFU" in out


def test_the_door_compiles_for_simulated_devices(capsys, monkeypatch):
    monkeypatch.setattr(plans, "_start", lambda *_: None)  # the backend has started
    small = [
        "--model.layers",
        "2",
        "--model.embed",
        "96",
        "--model.vocab",
        "256",
        "--batch",
        "16",
        "--microbatches",
        "1",
        "--data.length",
        "64",
    ]
    plans.main(["experiments.gpt2_124m", "--devices", "4", "--compile", *small])
    out = capsys.readouterr().out
    assert "compiled (simulated CPU devices" in out
    assert "planned and compiled" in out


def test_no_backend_and_no_gigabytes_for_thousands_of_devices():
    """In a process of its own: a plan for 16,384 devices starts no backend."""
    code = (
        "import dataclasses, jax; from jax._src import xla_bridge; from lmx import plan; from tests.test_plan import LARGE, on;"
        "large = dataclasses.replace(LARGE, batch=2048); found = plan.plan(on(large, data=16, fsdp=128, tensor=8));"
        "print(found.total, len(xla_bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, _ = map(int, done.stdout.split())
    assert total < 20e9


def test_leaves_with_1_where_it_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr("experiments.gpt2_124m.experiment", LARGE)
    with pytest.raises(SystemExit) as stop:
        plans.main(["experiments.gpt2_124m", "--layout.data", "8"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "it does not fit" in out
    assert "--layout.data 1 --layout.fsdp 8 --layout.zero 3" in out


def test_advice_is_ranked_what_fits_first():
    found = plans.plan(on(LARGE, fsdp=64, zero=0))
    several = plans.advice(found, "h100")
    assert several
    assert not found.fits
    fits = [one.plan.fits for one in several]
    assert fits == sorted(fits, reverse=True)
    assert all(one.plan.total < found.total for one in several)
    assert any("--layout.zero" in one.knob for one in several)
    assert any("--layout.remat" in one.knob for one in plans.advice(plans.plan(on(LARGE, fsdp=64)), "h100"))


def test_each_knob_does_what_it_says():
    def total(**degrees):
        return plans.plan(on(LARGE, **({"fsdp": 64} | degrees))).total

    assert total(zero=0) > total(zero=1) > total(zero=3)
    assert total(remat="none") > total(remat="dots") > total(remat="full")
    halved = plans.plan(dataclasses.replace(on(LARGE, fsdp=32, remat="none"), microbatches=2))
    assert halved.total < total(fsdp=32)


def test_search_ranks_layouts_that_fit():
    found = plans.search(plans.settled(LARGE), 64, best=5)
    assert len(found) == 5
    assert all(one.fits and one.experiment.layout.devices == 64 for one in found)
    steps = [one.time.step for one in found]
    assert steps == sorted(steps)


def test_the_vocabulary_of_a_trained_tokenizer_is_known():
    assert plans.settled(shakespeare).model.vocab == 1024
    named = dataclasses.replace(shakespeare, data=dataclasses.replace(shakespeare.data, tokenizer="some/tokenizer.json"))
    with pytest.raises(ConfigError, match=r"model.vocab=0 takes the tokenizer's vocabulary"):
        plans.settled(named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": 5}, "model.layers=12 is not divisible by layout.pipeline=5"),
        ({"ordered": 2, "data": 2}, "layout.ordered=2 is for debugging and cannot be planned"),
        ({"tensor": 5}, "model.heads=12 is not divisible by layout.tensor=5"),
        ({"data": 7}, "is not divisible by layout.data x layout.fsdp"),
        (
            {"context": 2, "attention": "cudnn"},
            "layout.attention=cudnn cannot go on from what a hop of layout.exchange='ring' found; use auto",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plans.plan(on(gpt2, **changes))


def test_an_rwkv_is_planned_and_a_pipeline_of_it():
    made = on(dataclasses.replace(gpt2, model=RWKV(vocab=512, layers=4, embed=64)), fsdp=2, tensor=2)
    found = plans.plan(made)
    assert found.flops[0] * 4 == functions(made.model).flops_per_token(made.model, 1024) * made.batch * made.data.length
    assert "stage inputs" in plans.plan(on(made, pipeline=2, tensor=2)).memory


def test_later_rwkvs_keep_their_states():
    kept = [RWKV(version=version, vocab=512, layers=4, embed=64, head_dim=32 if version > 4 else 64) for version in (4, 5, 6, 7)]
    totals = [plans.plan(on(dataclasses.replace(gpt2, model=model), fsdp=2)).total for model in kept]
    assert totals == sorted(set(totals))


def test_parallel_blocks_send_less_round_and_a_pipeline_takes_them():
    made = dataclasses.replace(gpt2, model=dataclasses.replace(gpt2.model, parallel=True))
    apart = plans.plan(on(gpt2, tensor=2, collective_matmul=True))
    assert plans.plan(on(made, tensor=2, collective_matmul=True)).total < apart.total
    staged = plans.plan(on(made, pipeline=2, tensor=2, collective_matmul=True, remat="full"))
    assert staged.memory["stage inputs"] < staged.total


def test_an_encoder_decoder_counts_the_tokens_of_both_sides(capsys):
    longer = dataclasses.replace(t5, data=dataclasses.replace(t5.data, length=256))
    short, long = (plans.plan(one) for one in (t5, longer))
    multiplied = 3 * (4 * 128 * 128 + 3 * 128 * 384) + 2 * 3 * 128 * 128  # by the encoder, and to keys and values of what it gives
    attended = 2 * 3 * 128 * (256**2 - 128**2) + 2 * 3 * 128 * 32 * 128  # scores and sums
    assert long.flops[0] - short.flops[0] == t5.batch * (6 * multiplied * 128 + 6 * attended)
    assert long.memory["parameters"] == short.memory["parameters"]
    assert long.total > short.total
    plans.main(["experiments.shakespeare_t5"])
    assert "source" in capsys.readouterr().out


def test_models_whose_cost_is_not_known_are_refused():
    model = dataclasses.replace(gpt2.model, positions="transformer_xl")
    with pytest.raises(ConfigError, match="positions=transformer_xl cannot be planned yet"):
        plans.settled(dataclasses.replace(gpt2, model=model))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name an experiment's module first"),
        (["experiments.nothing"], "experiments.nothing is no module with an `experiment` in it"),
        (["experiments.gpt2_124m", "--chip", "h900"], "chip='h900' is not known; use one of h100"),
        (["experiments.gpt2_124m", "--devices", "many"], "--devices many: give the number of devices"),
        (["experiments.gpt2_124m", "--devices", "12", "--layout.tensor", "8"], "--devices 12 is not divisible by 8"),
        (["experiments.gpt2_124m", "--layout.tensr", "8"], "layout.tensor"),
        (["experiments.gpt2_124m", "--picture", "plan.jpg"], "--picture plan.jpg: give a file to draw to, plan.png say"),
    ],
)
def test_a_wrong_command_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plans.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_pipeline_idles_as_its_schedule_says():
    def planned(**degrees):
        return plans.plan(dataclasses.replace(on(LARGE, pipeline=4, fsdp=8, **degrees), microbatches=8))

    found = planned()
    assert found.time.bubble == pytest.approx(3 / (8 + 3))
    assert planned(rounds=2).time.bubble == pytest.approx(3 / (16 + 3))
    assert found.time.step > found.time.compute / (1 - found.time.bubble)
    assert found.flops[1] > 1.2 * found.flops[0]  # each stage's forward pass is done again
    kept = [planned(schedule=schedule, remat="full").memory["stage inputs"] for schedule in ("1f1b", "gpipe")]
    assert kept[0] / kept[1] == 7 / 8  # 2 stages - 1, of all microbatches


def test_search_ranks_pipelines_and_experts_too():
    mixture = dataclasses.replace(LARGE, batch=256, model=dataclasses.replace(LARGE.model, experts=8, expert_capacity=1.25))
    found = [degrees for degrees, _ in candidates(plans.settled(mixture), 64, 8)]
    for knob, value in (("pipeline", 4), ("rounds", 2), ("expert", 8), ("tensor", 8), ("zero", 1)):
        assert any(degrees[knob] == value for degrees in found)
    assert all(plans.plan(p.experiment).fits for p in plans.search(mixture, 64, best=3))


def test_the_picture_shows_all_memory_and_every_device(tmp_path, capsys):
    path = tmp_path / "plan.png"
    plans.main(["experiments.gpt2_124m", "--layout.pipeline", "2", "--layout.fsdp", "2", "--microbatches", "20", "--picture", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    for case in ({"pipeline": 4, "fsdp": 8}, {"fsdp": 64, "zero": 1, "remat": "dots"}):
        plan = plans.plan(dataclasses.replace(on(LARGE, **case), microbatches=8 if "pipeline" in case else 1))
        assert sum(pictures.parts(plan).values()) == plan.total
        assert pictures.parts(plan)["the rest"] < 0.01 * plan.total


def test_who_holds_what():
    layout = Layout(pipeline=2, rounds=2, fsdp=2, tensor=2)
    held = pictures.holdings(layout, 8)
    assert len(held) == layout.devices
    assert held[0].layers == ((0, 1), (4, 5))
    assert held[-1].layers == ((2, 3), (6, 7))
    assert [one.part for one in held] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert len(pictures.holdings(Layout(data=1024), 8)) == pictures.SHOWN


def test_devices_go_to_fsdp():
    assert plans.widened(on(gpt2, tensor=2), 8).layout == Layout(tensor=2, fsdp=4)
    assert plans.widened(gpt2, 0) is gpt2
    assert len(jax.devices()) == 8
