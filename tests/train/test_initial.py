"""A run that begins with another's parameters, an imported checkpoint's or its own kind's."""

import jax
import numpy as np
import pytest

from lmx import interop
from lmx.core.params import initial_values
from lmx.interop.checkpoint import Model
from lmx.models import transformer
from lmx.models.config import Transformer
from lmx.parallel.layout import Layout
from lmx.train.loop import prepare_run, run
from lmx.train.optimizers import SGD, Schedule

MODEL = Transformer(vocab=264, layers=2, embed=16, heads=2, mlp=32, context=64, bias=False)
STILL = SGD(learning_rate=0.0, schedule=Schedule(kind="constant", warmup=0))


@pytest.fixture
def imported(tmp_path):
    params = initial_values(jax.random.key(7), transformer.specs(MODEL))
    interop.save(Model(MODEL, "llama"), params, tmp_path / "there")
    interop.import_run(tmp_path / "there", tmp_path / "imported")
    return tmp_path / "imported", params, interop.load_run(tmp_path / "imported")[0].config


def test_it_begins_with_an_imported_checkpoint(experiment, imported):
    folder, params, model = imported
    tiny = experiment(model=model, initial=str(folder), steps=1, optimizer=STILL, layout=Layout(fsdp=2, tensor=2))
    result = run(prepare_run(tiny))
    jax.tree.map(np.testing.assert_array_equal, result.state.params, params)
    interop.export_run(tiny.path, folder.parent / "back", "llama")
    before, after = ((folder.parent / name / "model.safetensors").read_bytes() for name in ("there", "back"))
    assert before == after


def test_another_model_is_refused(experiment, imported):
    folder, _, model = imported
    with pytest.raises(ValueError, match=r"is a run of another model: model\.embed is 16 there and 32 here"):
        prepare_run(experiment(initial=str(folder)))
    with pytest.raises(FileNotFoundError, match="is not a run"):
        prepare_run(experiment(model=model, initial="nowhere"))
