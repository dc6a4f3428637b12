r"""GPT-2 small (124M parameters) on a folder of text, as nanoGPT trains it on OpenWebText.

    python -m experiments.gpt2_124m --data.train TEXT/train --data.validation TEXT/validation --data.tokenizer GPT2/tokenizer.json

TEXT/* are folders of .jsonl, .txt or their compressed forms; tokenizer.json is GPT-2's (50,257 tokens; the table is padded to 50,304).
A step is 480 rows of 1,024 tokens, 0.49 million, in 20 microbatches of 24 rows: on smaller GPUs `--microbatches 40` gives the same
result; on eight, `--layout.data 8`. After SIGTERM or a crash, the same command with `--start resume` goes on.

Result to expect: nanoGPT reports a loss of about 2.85 nats per token on OpenWebText after these 600,000 steps (300 billion tokens, four
days on eight A100 GPUs; the same sizes and optimizer, no biases). OpenAI's own GPT-2 124M, trained on other text, has 3.12 there, and about
2.85 once fine-tuned on it. This experiment has not been run here at full length; that it starts is seen on a CPU in two minutes:

    python -m experiments.gpt2_124m --name tiny --data.train experiments/data/shakespeare/train.jsonl.xz --data.validation \
        experiments/data/shakespeare/validation.jsonl.xz --data.tokenizer bpe:1024 --data.length 64 --model.vocab 1024 --model.layers 2 \
        --batch 4 --microbatches 2 --steps 2 --evaluation.batches 2 --samples.tokens 16
"""

from lmx.data.recipe import Data
from lmx.models.config import Transformer
from lmx.train.checkpoints import Checkpoints
from lmx.train.experiment import Evaluation, Experiment, Samples
from lmx.train.loop import main
from lmx.train.optimizers import AdamW, Schedule

experiment = Experiment(
    name="gpt2_124m",
    data=Data(train="text/train", validation="text/validation", tokenizer="gpt2/tokenizer.json", length=1024),
    model=Transformer(
        vocab=50304,
        layers=12,
        embed=768,
        heads=12,
        context=1024,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated=False,
        bias=True,
    ),
    optimizer=AdamW(learning_rate=6e-4, schedule=Schedule(warmup=2000, final=0.1), weight_decay=0.1, clip=1.0, b2=0.95),
    precision="bf16",
    steps=600_000,
    batch=480,
    microbatches=20,
    evaluation=Evaluation(every=1000, batches=200),
    samples=Samples(prompt="In the beginning", every=5000),
    checkpoints=Checkpoints(every=1000, keep=2, period=100_000),
)

if __name__ == "__main__":
    main(experiment)
