"""A scoring function for `lmx.data.clean.perplexity.Perplexity`: a run's, or a checkpoint's, model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lmx.core.execution import Execution
from lmx.core.precision import PrecisionName, policy
from lmx.infer.perplexity import nats_per_byte
from lmx.interop.writers import Writer, load_writer


@dataclass(frozen=True)
class NatsPerByte:
    """Nats a byte of texts, as `lmx.infer.perplexity.nats_per_byte` has them. It pickles as what it is, a name: each process loads the model once,
    when it scores its first text. Raises what `load_writer` does, and ValueError for an empty text.
    """

    path: str
    """The folder of a run or of a Hugging Face checkpoint."""
    tokenizer: str | None = None
    """Another than the folder's: bytes, a file, or a folder."""
    step: int | None = None
    """The checkpoint of a run; None: its newest. Name it, so that every process reads the same one."""
    length: int | None = None
    """Tokens that are read together; None: the model's context."""
    rows: int = 16
    """Stretches of so many tokens that run at a time."""
    precision: PrecisionName = "fp32"
    """Types of parameters and activations."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        writer = _writer(self.path, self.tokenizer, self.step, self.precision)
        execution = Execution(precision=policy(self.precision))
        return nats_per_byte(
            writer.model, writer.params, writer.tokenizer.encode, texts, length=self.length, rows=self.rows, execution=execution
        )


@lru_cache(maxsize=2)
def _writer(path: str, tokenizer: str | None, step: int | None, precision: PrecisionName) -> Writer:
    return load_writer(path, tokenizer=tokenizer, step=step, dtype=policy(precision).params)
