"""Filters by classifiers, word lists and perplexity."""

import pickle
import random

import numpy as np
import pytest

from lmx.data import Document
from lmx.data.clean.linear import Features, Training
from lmx.data.clean.perplexity import Perplexity, limits
from lmx.data.clean.quality import Quality, pareto, train_quality
from lmx.data.clean.step import Change, Drop
from lmx.data.clean.toxicity import MILD, Toxicity, ToxicWords, train_toxicity


def texts(words, count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words.split(), k=draw.randint(5, 30))) for _ in range(count)]


def document(text, id="a"):
    return Document(id, text, "here")


SMALL = {"features": Features(bits=12), "training": Training(held_out=0.3)}
BOTH = "the of and to in is was for on with "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "quality.npz"
    good, other = texts(BOTH + "summer rose temperate lovely darling", 150, 0), texts(BOTH + "click buy cheap cookie login", 150, 1)
    evaluation = train_quality(good, other, path, **SMALL)
    assert evaluation.auc > 0.97
    return str(path)


def test_quality_by_threshold(model):
    step = pickle.loads(pickle.dumps(Quality(model, keep="threshold", threshold=0.5)))
    kept, dropped = step(document("the lovely summer rose is temperate")), step(document("click to buy cheap cookie"))
    assert isinstance(kept, Change)
    assert kept.metadata["quality"] > 0.7
    assert isinstance(dropped, Drop)
    assert dropped.reason == "threshold"
    assert dropped.value < 0.3


def test_quality_by_pareto_keeps_the_share_that_the_score_says(model):
    step = Quality(model)
    for text in ("the lovely summer rose", "the of and to", "click to buy cheap cookie"):
        verdicts = [step(document(text, f"doc:{i}")) for i in range(2000)]
        score = next(v.value if isinstance(v, Drop) else v.metadata["quality"] for v in verdicts)
        kept = sum(isinstance(v, Change) for v in verdicts)
        share = (2 - score) ** -9.0
        assert abs(kept - 2000 * share) < 4 * np.sqrt(2000 * share * (1 - share)) + 1
    again = [step(document(text, f"doc:{i}")) for i in range(2000)]
    assert again == verdicts
    assert [Quality(model, seed=1)(document(text, f"doc:{i}")) for i in range(2000)] != verdicts


def test_pareto_is_distributed_as_numpy_draws():
    mine = np.array([pareto(f"{i}", 9.0) for i in range(20_000)])
    theirs = np.random.default_rng(0).pareto(9.0, 20_000)
    grid = np.quantile(theirs, np.linspace(0.01, 0.99, 50))
    distance = np.abs(np.searchsorted(np.sort(mine), grid) - np.searchsorted(np.sort(theirs), grid)).max() / 20_000
    assert distance < 1.95 * np.sqrt(2 / 20_000)  # Kolmogorov-Smirnov, p = 0.001


def test_the_classifier_that_is_meant_can_be_named(model):
    with pytest.raises(ValueError, match="has fingerprint"):
        Quality(model, fingerprint="0" * 64)(document("a"))
    with pytest.raises(FileNotFoundError, match=r"model='nowhere\.npz' does not exist"):
        Toxicity("nowhere.npz")(document("a"))


def test_toxicity_sees_through_letters_that_look_alike(tmp_path):
    path = tmp_path / "toxicity.npz"
    assert train_toxicity(texts(BOTH + "damn idiot moron", 150, 0), texts(BOTH + "summer rose", 150, 1), path, **SMALL).auc > 0.95
    step = Toxicity(str(path), threshold=0.6)
    plain, disguised = (
        step(document("damn idiot moron damn idiot")),
        step(document("d\u0430mn \uff49diot m\u043er\u200bon damn \u0456diot")),
    )
    assert isinstance(plain, Drop)
    assert plain == disguised
    assert step(document("the summer rose")).metadata["toxicity"] < 0.5


def test_toxic_words_by_rate(tmp_path):
    clean = " ".join(["word"] * 99)
    assert ToxicWords()(document(clean)) is None
    assert ToxicWords()(document("")) is None
    assert ToxicWords(rate=0.01)(document(clean + " d4mn")) == Change(metadata={"toxic_words": 1})
    assert ToxicWords(rate=0)(document(clean + " d4mn")) == Drop("listed_words", 0.01)
    assert ToxicWords(rate=0, least=2)(document(clean + " d4mn")) == Change(metadata={"toxic_words": 1})
    assert ToxicWords(rate=0.01)(document(clean + " damn idiot")) == Drop("listed_words", 2 / 101)
    (tmp_path / "list.txt").write_text("# fruit\nbanana\n\nplum tree\n", encoding="utf-8")
    step = pickle.loads(pickle.dumps(ToxicWords(lists=(str(tmp_path / "list.txt"),), rate=0)))
    assert step(document("a plum-tree")).reason == "listed_words"
    assert step(document("damn fruit")) is None
    assert len(MILD) < 20


class Length:
    """Nats a byte: the text's length."""

    def __call__(self, texts):
        return [float(len(text)) for text in texts]


def test_perplexity_buckets():
    head, tail = limits(Length(), ["x" * i for i in range(1, 102)] + [""], shares=(0.3, 0.6), batch=7)
    assert (head, tail) == (31.0, 61.0)
    step = pickle.loads(pickle.dumps(Perplexity(len_of, head, tail, least=3)))
    told = {length: step(document("x" * length)) for length in (1, 3, 31, 32, 61, 62)}
    assert told[1] == Drop("too_predictable", 1.0)
    assert told[3].metadata == {"nats_per_byte": 3.0, "perplexity": "head"}
    assert [told[i].metadata["perplexity"] for i in (31, 32, 61)] == ["head", "middle", "middle"]
    assert told[62] == Drop("tail", 62.0)
    assert Perplexity(len_of, head, tail, keep=("tail",))(document("x")) == Drop("head", 1.0)
    assert step(document("")) == Drop("empty")


len_of = Length()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perplexity(len_of, 2, 1), "least=0.0, head=2 and tail=1 must be in this order"),
        (lambda: Perplexity(len_of, 1, 2, keep=("best",)), r"keep=\('best',\) must name some of head, middle, tail"),
        (lambda: Perplexity(lambda _: [float("nan")], 1, 2)(document("a")), "scorer gives nan nats a byte to document 'a'"),
        (lambda: limits(len_of, [""]), "the sample has no text"),
        (lambda: limits(len_of, ["a"], shares=(0.6, 0.3)), r"shares=\(0.6, 0.3\) must rise"),
        (lambda: Quality("m", keep="best"), "keep='best' must be 'pareto' or 'threshold'"),
        (lambda: Quality("m", alpha=0), "alpha=0 must be positive"),
        (lambda: Toxicity("m", threshold=0), "threshold=0 must be above 0"),
        (lambda: ToxicWords(rate=1), "rate=1 must be at least 0 and below 1"),
        (lambda: ToxicWords(lists=("nowhere",))(document("a")), "lists has 'nowhere', which does not exist"),
    ],
)
def test_what_they_refuse(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()
