"""What a user gets wrong is told in one clear line that says what to do, before anything is compiled."""

import dataclasses
import shutil

import jax
import pytest

from lmx.data.denoising import BlankInfilling, PrefixLM
from lmx.models.config import RWKV
from lmx.parallel.layout import Layout
from lmx.train import loop
from lmx.train.optimizers import SGD, AdamW, Schedule

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _seconds, **_: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


@pytest.fixture
def refusal(experiment, capsys):
    """What the door prints for a command line, once it has refused it with code 2 and one line."""

    def of(*argv: str, **changes) -> str:
        compiled = len(COMPILED)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            loop.main(experiment(**changes), list(argv))
        out, error = capsys.readouterr()
        assert left.value.code == 2, error
        assert len(COMPILED) == compiled, "refused only after compiling"
        assert out == ""
        assert error.count("\n") == 1, error
        return error

    return of


WRONG = {
    "an unknown knob": ("--model.layer 4", ["--model.layer is not a knob", "--model.layers"]),
    "an ill-typed value": ("--model.layers four", ["--model.layers", "four", "integer"]),
    "a precision that is none": ("--precision bf61", ["bf61", "fp32, tf32, bf16, bf16_pure", "did you mean bf16"]),
    "masks that nobody makes": (
        "--objective MaskedLM --model.causal false",
        ["objective=MaskedLM with", "both are MaskedLM"],
    ),
    "a tokenizer that is none": ("--data.tokenizer byte", ["data.tokenizer", "byte", "bytes"]),
    "heads that do not divide": (
        "--model.heads 6 --model.embed 48 --layout.tensor 4",
        ["model.heads=6", "layout.tensor=4", "use 1, 2, 3 or 6"],
    ),
    "a width that heads do not divide": ("--model.heads 5", ["model.embed=32", "model.heads=5", "head_dim"]),
    "a mesh bigger than the devices": ("--layout.data 16", ["16 devices", "8 are here", "JAX_NUM_CPU_DEVICES=16"]),
    "a text that is not there": ("--data.train nowhere/*.txt", ["data.train", "nowhere/*.txt"]),
    "a batch that does not divide": ("--batch 6 --layout.data 4", ["6 rows", "4", "multiple"]),
    "microbatches that do not divide": ("--microbatches 3", ["batch=16", "microbatches=3"]),
    "a context beyond the positions": ("--data.length 128", ["data.length=128", "model.context=64"]),
    "a vocabulary below the tokenizer's": ("--model.vocab 100", ["model.vocab=100", "257"]),
    "a window without local layers": ("--model.window 8", ["model.window=8", "pattern"]),
    "ordered reductions of sharded parameters": ("--layout.ordered 8 --layout.fsdp 2", ["layout.ordered", "layout.fsdp"]),
    "a run that is not there": ("--start resume", ["no run to resume", "--name"]),
    "a kernel for another type": ("--layout.attention flash", ["layout.attention=flash", "not in fp32", "precision"]),
    "a kernel that no ring goes by": (
        "--layout.attention cudnn --precision bf16 --layout.context 2 --model.dropout 0",
        ["layout.attention=cudnn", "layout.exchange='ring'", "use auto or xla"],
    ),
    "no steps": ("--steps 0", ["steps=0", "at least 1"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_refused_in_one_line(what, refusal):
    argv, words = WRONG[what]
    line = refusal(*argv.split())
    for word in words:
        assert word in line


IN_A_MODULE = {
    "a word that is no choice": ({"layout": Layout(exchange="ulysses")}, "layout.exchange=ulysses is not one of ring, alltoall"),
    "a degree that is no integer": ({"layout": Layout(data=2.0)}, "layout.data=2.0 is not an integer"),
    "a misspelt offload": ({"layout": Layout(remat="full", offload=("optimiser",))}, "did you mean optimizer?"),
    "shards below none": ({"layout": Layout(ordered=-2)}, "layout.ordered=-2 must be at least 0"),
    "a norm to clip to below 0, which would climb": ({"optimizer": SGD(clip=-1.0)}, "optimizer.clip=-1.0 must be at least 0"),
    "a mean that grows": ({"optimizer": AdamW(b2=1.0)}, "optimizer.b2=1.0 must be at least 0 and below 1"),
    "a fall longer than the run": ({"optimizer": AdamW(schedule=Schedule(kind="wsd", decay=2.0))}, "optimizer.schedule.decay=2.0"),
}


@pytest.mark.parametrize("what", IN_A_MODULE)
def test_what_a_module_says_is_looked_at_too(what, refusal):
    changes, said = IN_A_MODULE[what]
    assert said in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, "takes no dropout"),
        ({"positions": "alibi"}, "takes no ALiBi"),
        ({"attention_softcap": 5.0}, "takes no soft cap"),
        ({"positions": "relative"}, "takes no learned bias"),
        ({"head_dim": 12}, "head dimensions that are multiples of 8 up to 128, not 12"),
    ],
)
def test_a_kernel_that_does_not_do_what_layers_ask(changes, said, refusal, experiment):
    model = dataclasses.replace(experiment().model, **({"dropout": 0.0} | changes))
    line = refusal(model=model, layout=Layout(attention="cudnn"), precision="bf16")
    assert "layout.attention=cudnn" in line
    assert said in line


@pytest.mark.parametrize(
    ("denoising", "model", "said"),
    [
        (PrefixLM(), {"window": 8, "pattern": ("local",)}, "model.window=8 hides what data.denoising=PrefixLM shows"),
        (PrefixLM(), None, "which an RWKV cannot"),
        (BlankInfilling(mask=259, start=260, end=261), {}, "set model.block_positions"),
    ],
)
def test_rows_that_the_model_cannot_read(denoising, model, said, refusal, experiment):
    data = dataclasses.replace(experiment().data, denoising=denoising, packing="first_fit")
    plain = dataclasses.replace(experiment().model, vocab=264)
    assert said in refusal(data=data, model=RWKV(vocab=264, context=64) if model is None else dataclasses.replace(plain, **model))


def test_an_empty_text(refusal, experiment, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    line = refusal("--data.train", str(tmp_path / "empty.txt"))
    assert "data.train" in line
    assert "empty" in line


def test_a_file_that_is_no_text(refusal, tmp_path):
    (tmp_path / "noise.txt").write_bytes(b"fine so far \xff\xfe\x00")
    line = refusal("--data.train", str(tmp_path / "noise.txt"))
    assert "noise.txt" in line
    assert "UTF-8" in line


@pytest.fixture
def trained(experiment):
    """A run of one step."""
    loop.run(loop.prepare_run(experiment(steps=1)))
    return experiment().path


def test_a_folder_that_holds_a_run(trained, refusal):
    line = refusal()
    assert "--start resume" in line
    assert "--start overwrite" in line


def test_a_corrupt_checkpoint(trained, refusal):
    arrays = [p for p in (trained / "checkpoints" / "1" / "state").rglob("*") if p.is_file() and p.stat().st_size > 2000]
    assert arrays
    for path in arrays:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = refusal("--start", "resume")
    assert "checkpoints/1 cannot be read" in line
    assert "delete" in line


def test_a_checkpoint_of_another_vocabulary(trained, refusal, experiment):
    """The record agrees, the arrays do not: a checkpoint copied from elsewhere."""
    other = experiment(name="other", steps=1, model=dataclasses.replace(experiment().model, vocab=512))
    loop.run(loop.prepare_run(other))
    shutil.rmtree(trained / "checkpoints")
    shutil.copytree(other.path / "checkpoints", trained / "checkpoints")
    line = refusal("--start", "resume")
    assert "params/embed is (512, 32) there and (264, 32) here" in line
    assert "model.vocab" in line


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(experiment, capsys, monkeypatch):
    real = loop.place

    def poisoned(batch, *rest, count=[0]):  # noqa: B006
        count[0] += 1
        return real(batch | ({"weights": batch["weights"] * float("nan")} if count[0] == 3 else {}), *rest)

    monkeypatch.setattr(loop, "place", poisoned)
    with pytest.raises(SystemExit) as left:
        loop.main(experiment(checkpoints=dataclasses.replace(experiment().checkpoints, every=1)), [])
    assert str(left.value.code).startswith("step 3: loss nan")
    assert sorted(p.name for p in (experiment().path / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2"]
