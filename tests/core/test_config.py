"""Configs as values: the command line, who set what, JSON, and differences."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core import config
from lmx.core.config import ABSENT, ConfigError, command_line, diff, flatten, from_json, parse, refuse_changes, to_json

type Kind = Literal["local", "global"]


@dataclass(frozen=True)
class AdamW:
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    nesterov: bool = False
    """Whether to look ahead."""


@dataclass(frozen=True)
class Lion:
    learning_rate: float = 1e-4
    beta: float = 0.9


@dataclass(frozen=True)
class Secret:
    salt: int


@dataclass(frozen=True)
class Part:
    path: Path = Path("plays")
    weight: float = 1.0


@dataclass(frozen=True)
class Model:
    layers: int = 4
    """How many layers are stacked."""
    heads: int = 4
    embed: int = 128
    kv_heads: int | None = None
    pattern: tuple[Kind, ...] = ("global",)
    bias: bool = True

    def __post_init__(self):
        if self.embed % self.heads:
            raise ValueError(f"model.embed={self.embed} is not divisible by model.heads={self.heads}")


@dataclass(frozen=True)
class Experiment:
    name: str
    model: Model = Model()
    optimizer: AdamW | Lion | Secret = AdamW()
    evaluation: Part | None = None
    mixture: tuple[Part, ...] = (Part(), Part(Path("poems"), 2.0))
    precision: Literal["fp32", "bf16", "bf16_pure", "fp16"] = "fp32"
    steps: int | Literal["all"] = 100
    note: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    quick: bool = field(default_factory=lambda: False)


BASE = Experiment("base")


def parsed(*argv: str, base: Experiment = BASE) -> Experiment:
    return parse(base, argv)[0]


def refusal(*argv: str, base: Experiment = BASE) -> str:
    with pytest.raises(ConfigError) as error:
        parse(base, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_given_changes_nothing():
    assert parsed() == BASE


@pytest.mark.parametrize(
    ("argv", "change"),
    [
        (["--name", "other"], {"name": "other"}),
        (["--name=--odd=1"], {"name": "--odd=1"}),
        (["--note", "none"], {"note": None}),
        (["--precision", "bf16"], {"precision": "bf16"}),
        (["--steps", "7"], {"steps": 7}),
        (["--steps", "all"], {"steps": "all"}),
        (["--steps", "1", "--steps", "2"], {"steps": 2}),
        (["--betas", "0.5", "-1e-3"], {"betas": (0.5, -0.001)}),
        (["--quick"], {"quick": True}),
        (["--quick", "False"], {"quick": False}),
        (["--quick", "--no-quick"], {"quick": False}),
        (["--model.layers", "5", "--model.kv_heads=2"], {"model": Model(layers=5, kv_heads=2)}),
        (["--model.kv-heads", "None"], {"model": Model()}),
        (["--model.no-bias"], {"model": Model(bias=False)}),
        (["--model.bias", "false"], {"model": Model(bias=False)}),
        (["--model.pattern", "local", "local", "global"], {"model": Model(pattern=("local", "local", "global"))}),
        (["--model.pattern"], {"model": Model(pattern=())}),
        (["--optimizer.learning-rate", "3e-4"], {"optimizer": AdamW(3e-4)}),
        (["--optimizer.beta", "0.5", "--optimizer", "lion"], {"optimizer": Lion(beta=0.5)}),
        (["--evaluation", "part", "--evaluation.weight", "3"], {"evaluation": Part(weight=3.0)}),
        (["--mixture.1.weight", "-3", "--mixture.0.path", "a/b"], {"mixture": (Part(Path("a/b")), Part(Path("poems"), -3.0))}),
    ],
)
def test_flags_set_fields(argv, change):
    assert parsed(*argv) == replace(BASE, **change)


def test_values_have_the_fields_type():
    assert type(parsed("--optimizer.learning-rate", "1").optimizer.learning_rate) is float
    assert type(parsed("--mixture.0.path", "x").mixture[0].path) is type(Path())
    assert math.isinf(parsed("--optimizer.learning-rate", "-inf").optimizer.learning_rate)


def test_a_class_checks_final_values_only():
    assert parsed("--model.heads", "12", "--model.embed", "768").model.heads == 12
    assert refusal("--model.heads", "12") == "model.embed=128 is not divisible by model.heads=12"


def test_choosing_the_class_already_there_keeps_its_values():
    base = replace(BASE, optimizer=AdamW(0.5))
    assert parsed("--optimizer", "AdamW", base=base) == base
    assert parsed("--optimizer", "AdamW", base=replace(BASE, optimizer=Lion(0.5))).optimizer == AdamW()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model.layer", "4"], "--model.layer is not a knob; did you mean --model.layers? (--help lists all)"),
        (["--layers", "4"], "--layers is not a knob; did you mean --model.layers? (--help lists all)"),
        (["--optimizer.layers", "4"], "--optimizer.layers is not a knob; did you mean --model.layers? (--help lists all)"),
        (
            ["--optimizer.learnin_rate", "4"],
            "--optimizer.learnin_rate is not a knob; did you mean --optimizer.learning-rate? (--help lists all)",
        ),
        (["--optimizer.beta", "1"], "--optimizer.beta is not a knob; did you mean --betas? (--help lists all)"),
        (["-name", "x"], "-name is not a knob; did you mean --name? (--help lists all)"),
        (["--xyzzy"], "--xyzzy is not a knob (--help lists all)"),
        (["--mixture.2.weight", "1"], "--mixture.2.weight is not a knob; did you mean --mixture.0.weight? (--help lists all)"),
        (["--optimizer", "4", "--steps", "x"], "--optimizer=4 is not one of AdamW, Lion, Secret"),
        (["--optimizer", "lino"], "--optimizer=lino is not one of AdamW, Lion, Secret; did you mean Lion?"),
        (["--optimizer", "secret"], "--optimizer=secret has fields without defaults; give it in the experiment's module"),
        (["--evaluation", "3"], "--evaluation=3 is not Part or None"),
        (["--model.layers=four"], "--model.layers=four is not an integer"),
        (["--model.layers", "4", "5"], "--model.layers=4 5 is not an integer"),
        (["--model.layers", "4.5"], "--model.layers=4.5 is not an integer"),
        (["--model.layers"], "--model.layers needs a value: an integer"),
        (["--model.kv-heads", "x"], "--model.kv-heads=x is not an integer or None"),
        (["--optimizer.learning-rate", "fast"], "--optimizer.learning-rate=fast is not a number"),
        (["--precision=bf17"], "--precision=bf17 is not one of fp32, bf16, bf16_pure, fp16; did you mean bf16?"),
        (
            ["--model.pattern", "local", "globl"],
            "--model.pattern=local globl is not a list, each one of local, global; did you mean global?",
        ),
        (["--betas", "1"], "--betas=1 is not 2 values: a number, a number"),
        (["--quick", "maybe"], "--quick=maybe is not True or False"),
        (["--no-quick", "True"], "--no-quick takes no value; write --no-quick or --quick True"),
        (["stray"], "'stray' belongs to no knob; write --name value (--help lists all)"),
    ],
)
def test_refusals_name_what_is_wrong_and_what_was_meant(argv, line):
    assert refusal(*argv) == line


def test_a_group_is_not_a_knob():
    assert refusal("--model", "4").startswith("--model is a group of knobs, not a knob; it has --model.layers, --model.heads,")


def test_unknown_flags_are_refused_before_bad_values():
    assert "--setps" in refusal("--model.layers", "four", "--setps", "3")


def test_values_of_the_module_are_checked_too():
    assert refusal(base=replace(BASE, precision="bf17")) == "precision=bf17 is not one of fp32, bf16, bf16_pure, fp16; did you mean bf16?"
    assert refusal(base=replace(BASE, model=Model(kv_heads="2"))) == "model.kv_heads=2 is not an integer or None"
    assert refusal(base=replace(BASE, optimizer=Part())) == "optimizer=Part is not one of AdamW, Lion, Secret"
    assert refusal(base=replace(BASE, model=[1])) == "model=[1] is not Model"


def test_sources_say_who_set_each_field():
    module = Experiment("mine", model=Model(layers=6), optimizer=Lion(beta=0.5))
    _, sources = parse(module, ["--model.heads", "4", "--model.no-bias"])
    assert sources == {
        **dict.fromkeys(flatten(module), "default"),
        "name": "experiment",  # without a default
        "model.layers": "experiment",
        "optimizer": "experiment",
        "optimizer.beta": "experiment",
        "model.heads": "command line",  # given, though equal
        "model.bias": "command line",
    }
    _, sources = parse(module, ["--optimizer", "adamw"])
    assert sources["optimizer"] == "command line"
    assert sources["optimizer.learning_rate"] == "default"


def test_a_default_is_what_the_enclosing_class_sets():
    @dataclass(frozen=True)
    class Deep:
        model: Model = Model(layers=48)

    assert parse(Deep(), [])[1]["model.layers"] == "default"
    assert parse(Deep(Model()), [])[1]["model.layers"] == "experiment"


def test_command_line_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(BASE, ["--model.layer", "4"], description="Trains.")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "--model.layer is not a knob; did you mean --model.layers? (--help lists all)\n")
    experiment, sources = command_line(BASE, ["--steps", "4"], description="Trains.")
    assert experiment.steps == 4
    assert sources["steps"] == "command line"


@pytest.mark.parametrize("argv", [["--help"], ["-h", "--steps", "x"]])
def test_help_explains_every_knob(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(BASE, argv, description="Trains a model.")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in flatten(BASE):
        assert "--" + name.replace("_", "-") in out
    for words in (
        "Trains a model.",
        "How many layers are stacked.",
        "Peak of the schedule.",
        "--optimizer is AdamW; it may be one of AdamW, Lion",
    ):
        assert words in out


def test_help_follows_the_chosen_class(capsys):
    with pytest.raises(SystemExit):
        command_line(BASE, ["--optimizer", "Lion", "--help"], description="Trains.")
    assert "--optimizer.beta" in capsys.readouterr().out


numbers = st.floats(allow_nan=False)
parts = st.builds(Part, path=st.sampled_from([Path("a"), Path("b/c")]), weight=numbers)
experiments = st.builds(
    Experiment,
    name=st.text(),
    model=st.builds(
        Model, layers=st.integers(), kv_heads=st.none() | st.integers(), pattern=st.lists(st.sampled_from(["local", "global"])).map(tuple)
    ),
    optimizer=st.builds(AdamW, numbers, st.booleans()) | st.builds(Lion, numbers, numbers) | st.builds(Secret, st.integers()),
    evaluation=st.none() | parts,
    mixture=st.lists(parts, max_size=3).map(tuple),
    precision=st.sampled_from(["fp32", "bf16"]),
    steps=st.integers() | st.just("all"),
    note=st.none() | st.text(),
    betas=st.tuples(numbers, numbers),
)


@settings(max_examples=100, deadline=None)
@given(experiments)
def test_json_gives_the_same_value_back(experiment):
    written = json.dumps(to_json(experiment), allow_nan=False)
    back = from_json(Experiment, json.loads(written))
    assert back == experiment
    assert repr(back) == repr(experiment)  # tells 1 from 1.0 and 0.0 from -0.0
    assert list(flatten(json.loads(written))) == list(flatten(experiment))


@settings(max_examples=30, deadline=None)
@given(experiments, experiments)
def test_diff_names_exactly_what_differs(a, b):
    changed = diff(a, b)
    assert (not changed) == (a == b)
    old, new = flatten(a), flatten(b)
    assert changed == {n: (old.get(n, ABSENT), new.get(n, ABSENT)) for n in old | new if old.get(n, ABSENT) != new.get(n, ABSENT)}


def test_nan_survives_json_and_equals_itself():
    experiment = replace(BASE, optimizer=AdamW(math.nan))
    back = from_json(Experiment, json.loads(json.dumps(to_json(experiment), allow_nan=False)))
    assert math.isnan(back.optimizer.learning_rate)
    assert not diff(experiment, replace(BASE, optimizer=AdamW(float("nan"))))


def test_flatten_is_in_order_and_records_the_class():
    names = list(flatten(BASE))
    assert names[:3] == ["name", "model.layers", "model.heads"]
    assert names.index("optimizer") + 1 == names.index("optimizer.learning_rate")
    flat = flatten(BASE)
    assert flat["optimizer"] == "AdamW"
    assert flat["evaluation"] is None
    assert flat["mixture.1.weight"] == 2.0
    assert flatten(replace(BASE, mixture=()))["mixture"] == ()
    assert flatten(json.loads(json.dumps(to_json(BASE)))) == {n: str(v) if isinstance(v, Path) else v for n, v in flat.items()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": {"layer": 4}}, "model.layer is not a field of Model; did you mean model.layers?"),
        ({"model": {"layers": "4"}}, "model.layers=4 is not an integer"),
        ({"model": {"layers": True}}, "model.layers=True is not an integer"),
        ({"model": {"pattern": ["local", "far"]}}, "model.pattern.1=far is not one of local, global"),
        ({"model": {"heads": 3}}, "model.embed=128 is not divisible by model.heads=3"),
        ({"model": 3}, "model=3 is not Model"),
        ({"optimizer": {"class": "Lino"}}, "optimizer=Lino is not one of AdamW, Lion, Secret; did you mean Lion?"),
        ({"optimizer": {"class": "Lion", "nesterov": True}}, "optimizer.nesterov is not a field of Lion"),
        ({"optimizer": {"class": "Secret"}}, "optimizer.salt is missing, and Secret has no default for it"),
        ({"mixture": [{"weight": None}]}, "mixture.0.weight=None is not a number"),
        ({"betas": [0.1]}, "betas=[0.1] is not 2 values: a number, a number"),
        ({"name": None}, "name=None is not text"),
    ],
)
def test_from_json_refuses_by_name(change, line):
    with pytest.raises(ConfigError) as error:
        from_json(Experiment, {"name": "x", **change})
    assert str(error.value) == line


def test_from_json_fills_defaults_in_old_records():
    assert from_json(Experiment, {"name": "x"}) == Experiment("x")
    written_before_there_was_a_choice = {"name": "x", "optimizer": {"learning_rate": 0.5}}
    assert from_json(Experiment, written_before_there_was_a_choice) == Experiment("x", optimizer=AdamW(learning_rate=0.5))


def test_refuse_changes_names_all_of_them():
    old, new = BASE, replace(BASE, model=Model(layers=6), steps=5, precision="bf16", optimizer=Lion())
    with pytest.raises(ConfigError) as error:
        refuse_changes(old, new, allowed=("steps", "optim"))  # a prefix is of whole parts
    assert str(error.value) == (
        "model.layers was 4 and is now 6; optimizer was AdamW and is now Lion; optimizer.learning_rate was 0.001 and is now 0.0001; "
        "precision was fp32 and is now bf16: give the old values, or start a new run (only steps, optim may change)"
    )
    refuse_changes(old, new, allowed=("steps", "optimizer", "model.layers", "precision"))
    refuse_changes(old, old, allowed=())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("a knob\nis wrong"), "a knob is wrong\n"),
        (ValueError("bad"), "bad\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: no such file or folder\n"),
        (FileNotFoundError("nothing here"), "nothing here\n"),
    ],
)
def test_exits_with_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as stop, config.exits_with_one_line():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), config.exits_with_one_line():
        raise KeyError("a bug")


def test_versions_start_nothing():
    code = "import runpy, sys; print(*runpy.run_path(sys.argv[1])['versions'](), *{'jax', 'numpy', 'tyro'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code, config.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["python", "lmx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "platform"]
    import jax

    assert config.versions()["jax"] == jax.__version__
