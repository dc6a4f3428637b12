"""A small decoder learns to write plays: the first thing to run.

python -m experiments.shakespeare

Two and a half minutes on two CPU cores; expect a validation loss of about 3.43 nats per token, 1.48 per byte, on two plays held out
(Much Ado About Nothing and Othello), and a sample with the look of a play.
"""

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.experiment import Evaluation, Experiment, Samples
from lmx.train.loop import main
from lmx.train.optimizers import AdamW, Schedule

experiment = Experiment(
    name="shakespeare",
    data=Data(
        train="experiments/data/shakespeare/train.jsonl.xz",
        validation="experiments/data/shakespeare/validation.jsonl.xz",
        tokenizer="bpe:1024",
        length=128,
    ),
    model=Transformer(layers=4, embed=128, heads=4, mlp=384, context=512),
    optimizer=AdamW(learning_rate=3e-3, schedule=Schedule(warmup=50)),
    batch=16,
    steps=1200,
    evaluation=Evaluation(every=400),
    samples=Samples(prompt="ROMEO.\n", tokens=150),
)

if __name__ == "__main__":
    main(experiment)
