"""What a model writes as it trains."""

from collections.abc import Sequence

import numpy as np

from lmx.core.tree import Tree
from lmx.data.denoised import denoise
from lmx.data.recipe import has_two_sides
from lmx.data.tokenizers import Tokenizer
from lmx.infer.dense import continued
from lmx.infer.sampling import Sampling
from lmx.train.experiment import Experiment


def written(experiment: Experiment, tokenizer: Tokenizer, params: Tree) -> str:
    """The prompt, and how the model goes on. An encoder-decoder reads the prompt as the run's denoising corrupts it: shown are what it reads
    and, behind an arrow, what it writes, tokens that are no text as `<id>`.

    Raises:
      ValueError: as `corrupted` and `lmx.infer.dense.continued` do.
    """
    wanted = experiment.samples
    how = {"max_new_tokens": wanted.tokens, "sampling": Sampling(wanted.temperature), "seed": experiment.seed}
    if not has_two_sides(experiment.data):
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        (new,) = continued(
            experiment.model,
            params,
            [tokenizer.encode(wanted.prompt)],
            stop_ids=stop,
            limit=min(tokenizer.vocab, experiment.model.vocab),
            **how,
        )
        return wanted.prompt + tokenizer.decode(new)
    objective, read = experiment.data.denoising, corrupted(experiment, tokenizer)
    stop = () if objective.eos is None else (objective.eos,)
    (new,) = continued(experiment.model, params, [read], start_id=objective.start, stop_ids=stop, **how)
    return f"{_shown(tokenizer, read)} \u2192 {_shown(tokenizer, new)}"


def corrupted(experiment: Experiment, tokenizer: Tokenizer) -> list[int]:
    """The prompt as the run's denoising corrupts it: what an encoder reads. Raises ValueError for one that is too short, or too long."""
    data, text = experiment.data, np.array(tokenizer.encode(experiment.samples.prompt))
    try:
        row = denoise(data.denoising, 0, [text], length=data.length, decoder_length=data.decoder_length, seed=experiment.seed)
    except ValueError as error:
        raise ValueError(f"samples.prompt is corrupted as data.denoising says, but {error}") from error
    return row["tokens"][row["segments"] > 0].tolist()


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Tokens as text, those that the tokenizer does not know as their numbers."""
    text, plain = "", []
    for id in ids:
        if id < tokenizer.vocab:
            plain.append(id)
        else:
            text, plain = f"{text}{tokenizer.decode(plain)}<{id}>", []
    return text + tokenizer.decode(plain)
