"""A run that trains an RWKV, from the command line to the sample."""

import math

import pytest

from lmx.core.config import command_line
from lmx.models.config import RWKV
from lmx.train.experiment import Evaluation, Samples
from lmx.train.loop import prepare_run, run

FLAGS = "--model RWKV --model.layers 2 --model.embed 16 --model.context 64 --steps 12 --optimizer.learning_rate 0.01"


def test_an_experiment_trains_evaluates_and_samples_an_rwkv(experiment, tmp_path):
    plain = experiment(folder=str(tmp_path), evaluation=Evaluation(batches=1), samples=Samples(prompt="The", tokens=5))
    chosen, _ = command_line(plain, FLAGS.split(), description="")
    assert chosen.model == RWKV(layers=2, embed=16, context=64)
    start = prepare_run(chosen)
    assert run(start).metrics["loss"] < math.log(start.experiment.model.vocab) - 0.1
    assert (chosen.path / "samples.txt").read_text().count("--- step") == 1


@pytest.mark.parametrize("flag", ["--model.heads 4", "--model.positions rope"])
def test_what_an_rwkv_has_not_is_refused(experiment, flag, capsys):
    with pytest.raises(SystemExit):
        command_line(experiment(), [*FLAGS.split(), *flag.split()], description="")
    assert flag.split()[0] in capsys.readouterr().err
