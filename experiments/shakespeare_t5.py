"""A small encoder-decoder learns to fill the gaps of plays, as T5 does (Raffel et al., 2020): spans of a text are replaced by sentinels, and
predicted, each behind its sentinel.

python -m experiments.shakespeare_t5

`--data.denoising TextInfilling --data.denoising.mask 1056 ...` would train it as BART, `lmx.data.ul2` as UL2.
"""

from lmx.data.denoising import SpanCorruption
from lmx.data.recipe import Data
from lmx.models.config import EncoderDecoder, Transformer
from lmx.train.experiment import Evaluation, Experiment, Samples
from lmx.train.loop import main
from lmx.train.objectives import Seq2Seq
from lmx.train.optimizers import AdamW, Schedule

TOKENS = 1024
"""Of the tokenizer. Behind them come 32 sentinels and the decoder's first input."""
SIZES = {"vocab": TOKENS + 64, "layers": 3, "embed": 128, "heads": 4, "mlp": 384, "context": 256, "positions": "relative"}
KIND = {"norm_epsilon": 1e-6, "activation": "gelu_tanh"}

experiment = Experiment(
    name="shakespeare_t5",
    data=Data(
        train="experiments/data/shakespeare/train.jsonl.xz",
        validation="experiments/data/shakespeare/validation.jsonl.xz",
        tokenizer=f"bpe:{TOKENS}",
        length=128,
        decoder_length=32,
        packing="first_fit",
        denoising=SpanCorruption(sentinels=tuple(range(TOKENS + 31, TOKENS - 1, -1)), eos=2, start=TOKENS + 32),
    ),
    model=EncoderDecoder(**SIZES, **KIND, encoder=Transformer(**SIZES, **KIND, causal=False)),
    objective=Seq2Seq(),
    optimizer=AdamW(learning_rate=3e-3, schedule=Schedule(warmup=50)),
    batch=16,
    steps=1200,
    evaluation=Evaluation(every=400),
    samples=Samples(prompt="O Romeo, Romeo! wherefore art thou Romeo? Deny thy father and refuse thy name.", tokens=40),
)

if __name__ == "__main__":
    main(experiment)
