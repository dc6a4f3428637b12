"""A run as a scoring function of a perplexity filter."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.params import initial_values
from lmx.data import Data, Document
from lmx.data.clean.perplexity import Perplexity, limits
from lmx.data.tokenizers import ByteTokenizer
from lmx.infer.perplexity import nats_per_byte
from lmx.interop import perplexity
from lmx.interop.perplexity import NatsPerByte
from lmx.models.config import Transformer
from lmx.models.families import functions
from lmx.train.checkpoints import Checkpoints, Manager
from lmx.train.experiment import Experiment
from lmx.train.logging import write_record
from lmx.train.objectives import CausalLM
from lmx.train.state import TrainState

MODEL = Transformer(vocab=257, layers=1, embed=16, heads=2, mlp=16, context=32)
TEXTS = ["Now is the winter of our discontent", "zzzz", "Made glorious summer by this sun of York; and all the clouds"]


def params_of(step):
    return jax.tree.map(lambda a: (2 + step) * a, initial_values(jax.random.key(step), functions(MODEL).specs(MODEL)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plays"
    write_record(
        folder, Experiment(name="plays", data=Data(train="", tokenizer="bytes"), model=MODEL, objective=CausalLM()), sources={}, data={}
    )
    with Manager(folder / "checkpoints", Checkpoints()) as manager:
        for step in (1, 2):
            manager.save(step, TrainState(jnp.int32(step), jax.random.key(0), params_of(step), {}, {}), {"example": 0})
    return str(folder)


def test_a_run_is_loaded_once_a_process_and_scores_as_its_parameters_do(run, monkeypatch):
    loads, load = [], perplexity.load_writer
    monkeypatch.setattr(perplexity, "load_writer", lambda path, **how: loads.append(path) or load(path, **how))
    perplexity._writer.cache_clear()
    for step, asked in ((2, None), (1, 1)):
        scorer = pickle.loads(pickle.dumps(NatsPerByte(run, step=asked)))
        expected = nats_per_byte(MODEL, params_of(step), ByteTokenizer().encode, TEXTS)
        np.testing.assert_allclose(scorer(TEXTS), expected, rtol=1e-6)
        scorer(TEXTS)
    assert loads == [run, run]


def test_a_filter_with_it_decides_the_same_where_it_is_sent(run):
    scorer = NatsPerByte(run)
    head, tail = limits(scorer, TEXTS, shares=(0.3, 0.6))
    step = Perplexity(scorer, head, tail)
    documents = [Document(str(i), text, "here") for i, text in enumerate(TEXTS)]
    here = [step(document) for document in documents]
    assert sorted(type(verdict).__name__ for verdict in here) == ["Change", "Change", "Drop"]
    sent = pickle.dumps(step)
    assert len(sent) < 1000  # a name, not a model
    perplexity._writer.cache_clear()
    assert [pickle.loads(sent)(document) for document in reversed(documents)] == here[::-1]
