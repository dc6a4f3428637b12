"""How well a model predicts texts, in a unit that does not depend on its tokenizer: nats a byte."""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.infer.scoring import score
from lmx.infer.texts import check_continues, lead_of
from lmx.models.config import EncoderDecoder, Model

SHORTEST = 16


def nats_per_byte(
    model: Model,
    params: Tree,
    encode: Callable[[str], Sequence[int]],
    texts: Sequence[str],
    *,
    length: int | None = None,
    rows: int = 16,
    execution: Execution = Execution(),
) -> np.ndarray:
    """Negative log-probability of each text's tokens over its bytes (UTF-8), float64 `[texts]`.

    A text is read as training packs it: in spans, each beginning with the token that the one before ended with, and attention does not reach
    back over a cut. So each token but the first is predicted once; a text of one token has 0 nats.

    Args:
      encode: a tokenizer's; what it puts before and behind a text counts as its tokens.
      length: tokens of a span; None: the model's context, less an adapter's virtual tokens, which stand before each span.
      rows: spans that run at a time, at most. Spans are padded to powers of two, in number and in tokens, so that few programs serve all.

    Raises:
      ValueError: an empty text, a length or rows that are none, a model that is an encoder-decoder or predicts no next token.
    """
    check_continues(model)
    lead = lead_of(model, params)
    most = model.context - lead.prefix - lead.prompt
    length = most if length is None else length
    if isinstance(model, EncoderDecoder):
        raise ValueError("an encoder-decoder reads a source beside a text; nats_per_byte needs a model of texts alone")
    if not 2 <= length <= most or rows < 1:
        virtual = f" less {model.context - most} virtual tokens" if most < model.context else ""
        raise ValueError(f"length={length} must be from 2 to model.context={model.context}{virtual}, and rows={rows} at least 1")
    if empty := [i for i, text in enumerate(texts) if not text]:
        raise ValueError(f"text {empty[0]} is empty; nothing is predicted of it")
    spans = []
    for number, tokens in enumerate(map(list, map(encode, texts))):
        spans += [(number, tokens[start : start + length]) for start in range(0, max(len(tokens) - 1, 1), length - 1)]
    nats = np.zeros(len(texts))
    for padded, alike in groupby(sorted(spans, key=lambda span: len(span[1])), lambda span: _padded(len(span[1]), length)):
        alike = list(alike)
        for start in range(0, len(alike), rows):
            batch = alike[start : start + rows]
            # What is behind a span's last token changes nothing before it.
            filled = [span + [0] * (padded - len(span)) for _, span in batch]
            filled += [[0] * padded] * (min(1 << (len(batch) - 1).bit_length(), rows) - len(batch))
            for (number, span), scored in zip(batch, score(model, params, filled, execution=execution), strict=False):
                nats[number] -= scored.log_probs[: len(span) - 1].sum(dtype=np.float64)
    return nats / [len(text.encode("utf-8", "surrogatepass")) for text in texts]


def _padded(length: int, most: int) -> int:
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), most)
