"""Rows and batches of denoising objectives: texts are cut so that what is made of them fits, several to a row, and corrupted as they are read."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from lmx.data.corruption import Draws, corrupt
from lmx.data.denoising import SHORTEST, Objective, check, fit, has_decoder, marks
from lmx.data.packing import Plan, place
from lmx.data.pipeline import Batch, Batches
from lmx.data.store import TokenStore

TextPacking = Literal["first_fit", "stream"]
TEXT_PACKINGS = get_args(TextPacking)


def denoise(
    objective: Objective,
    example_id: int,
    texts: Sequence[np.ndarray],
    *,
    length: int,
    decoder_length: int | None = None,
    seed: int,
    words: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """One row of a batch: texts, int `[tokens]` each, corrupted and put behind each other. A pure function of its arguments.

    With all but the example and its texts bound by `functools.partial`, it is what Grain's `map_with_index` takes.

    int32 `[length]` but for `weights`, float32, and `example_id`, a uint32; 0 on padding:

    - of one side: `tokens`, `targets`, `weights`, `segments` (1, 2, .. for the texts), `positions` (from 0 in each text) as in
      `lmx.data.Batch`. Further `prefix`, but for `MaskedLM` (which is for models that look in both directions everywhere): 1 where a token
      is seen by all its segment, 0 where only by later ones; and for `BlankInfilling` `block_positions`.
    - form encoder_decoder: `tokens`, `segments`, `positions` for the encoder; `decoder_tokens`, `decoder_segments`, `decoder_positions`,
      `targets`, `weights`, all `[decoder_length]`, for the decoder. A text has the same segment on both sides.

    `decoder_length` and its default are `fit`'s; `words` is `corrupt`'s. Raises ValueError for a text that is too short, has a token that
    marks what was corrupted, or does not fit with those before it.
    """
    two_sides = has_decoder(objective)
    if two_sides == (decoder_length is None):  # one to find, or one too many
        decoder_length = fit(objective, length, decoder_length)[1]
    reserved, parts = marks(objective), []
    for nth, text in enumerate(texts):
        where = f"text {nth} of example {example_id}"
        if len(text) < SHORTEST:
            raise ValueError(f"{where} has {len(text)} tokens; a denoising objective needs {SHORTEST}, one to keep and one to predict")
        present = np.isin(text, reserved)
        if present.any():
            raise ValueError(
                f"{where} has token {text[present][0]}, with which {type(objective).__name__} marks what it took out; "
                f"remove it from the text, or give the objective ids that text never has"
            )
        parts.append(corrupt(objective, text, Draws(seed, example_id, nth), words=words))
    fields = parts[0] if parts else corrupt(objective, np.zeros(SHORTEST, np.int64), Draws(0, 0), words=words)
    row: dict[str, np.ndarray] = {"example_id": np.uint32(example_id)}
    for side, columns in {"": length, "decoder_": decoder_length}.items() if two_sides else [("", length)]:
        counts = [len(part[f"{side}tokens"]) for part in parts]
        if sum(counts) > columns:
            raise ValueError(
                f"example {example_id} needs {sum(counts)} columns for its texts of {', '.join(str(len(text)) for text in texts)} tokens, "
                f"but data.{side}length={columns}; give it less text (fit says how much), or use more"
            )
        row[f"{side}segments"] = _padded([np.repeat(np.arange(1, len(parts) + 1), counts)], columns, np.int32)
    for name in fields:
        decoder = two_sides and name not in ("tokens", "positions")
        dtype = np.float32 if name == "weights" else np.int32
        row[name] = _padded([part[name] for part in parts], decoder_length if decoder else length, dtype)
    return row


def _padded(parts: list[np.ndarray], columns: int, dtype: type) -> np.ndarray:
    row = np.zeros(columns, dtype)
    line = np.concatenate(parts) if parts else row[:0]
    row[: len(line)] = line
    return row


def plan_texts(
    lengths: np.ndarray,
    objective: Objective,
    length: int,
    decoder_length: int | None = None,
    *,
    order: np.ndarray | None = None,
) -> Plan:
    """First fit, as in `lmx.data.packing.plan`, of documents of `lengths` tokens into rows of an objective.

    A span is a text: `tokens[start:stop]` of a document, all of them (here none is only a target), and each token is in one span. A document
    that is longer than a row's text is cut into full ones and a rest, which is never a single token. Each text is counted with what
    it needs at most, on the side of the row that it fills more. Raises ValueError when no document has two tokens.
    """
    text, decoder_columns = fit(objective, length, decoder_length)
    lengths = np.asarray(lengths, np.int64)
    if not (lengths >= SHORTEST).any():
        raise ValueError(f"nothing to predict: none of the {len(lengths)} documents has {SHORTEST} tokens; give data.train more text")
    if text <= SHORTEST and lengths.max() > text:
        raise ValueError(f"data.length={length} has room for texts of {text} tokens, too few to cut longer documents; use more")
    order = np.arange(len(lengths)) if order is None else order
    order = order[lengths[order] >= SHORTEST]
    count = -(-lengths[order] // text)
    document = np.repeat(order, count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = nth * text
    stop = np.minimum(start + text, lengths[document])
    single = np.flatnonzero(stop - start < SHORTEST)
    start[single] -= 1
    stop[single - 1] -= 1
    sizes, which = np.unique(stop - start, return_inverse=True)
    need = np.array([objective.sizes(int(n)) for n in sizes])
    # One number for both sides: what is left of a row is what is left of its fuller side, so nothing overflows.
    capacity = length * max(decoder_columns, 1)
    cost = np.maximum(need[:, 0] * max(decoder_columns, 1), need[:, 1] * length)
    example = place(cost[which], capacity)
    by_example = np.argsort(example, kind="stable")
    return Plan(document[by_example], start[by_example], stop[by_example], np.append(0, np.cumsum(np.bincount(example))))


class DenoisedBatches(Batches):
    """The batches of a run with a denoising objective: `Batches`, with rows as `denoise` makes them.

    - `length`, `decoder_length`: columns of a row, as for `fit`.
    - `vocab`: the number of ids that the model knows, the objective's special tokens included.
    - `packing`: `"first_fit"`, or `"stream"`, where the text is cut without regard to documents, a text to a row (as T5 does).
    - `words`: bool `[ids]`, which tokens begin a word, for `MaskedLM.whole_word`.

    A token that ends a document in the store and is also the objective's `eos` is left out, for the objective puts it back. An example is
    corrupted anew in each epoch. Raises ValueError as `check`, `plan_texts` and `Batches` do.
    """

    def __init__(
        self,
        store: TokenStore,
        objective: Objective,
        *,
        rows: int,
        length: int,
        decoder_length: int | None = None,
        vocab: int,
        seed: int,
        packing: TextPacking = "first_fit",
        shuffle: bool = True,
        epochs: int | None = None,
        words: np.ndarray | None = None,
    ):
        if packing not in TEXT_PACKINGS:
            raise ValueError(f"data.packing={packing!r} is not one of {', '.join(TEXT_PACKINGS)}, which denoising objectives can have")
        if getattr(objective, "whole_word", False) and (words is None or len(words) < store.vocab):
            has = "none" if words is None else f"{len(words)}"
            raise ValueError(
                f"objective.whole_word needs words for all {store.vocab} ids of the text and has {has}; use word_starts(tokenizer)"
            )
        if vocab < store.vocab:
            raise ValueError(f"vocab={vocab} is smaller than the vocabulary of the text, {store.vocab}; use at least that")
        check(objective, vocab=vocab, length=length, decoder_length=decoder_length)
        self.objective, self.decoder_length, self._words = objective, fit(objective, length, decoder_length)[1] or None, words
        super().__init__(store, rows=rows, length=length, seed=seed, packing=packing, shuffle=shuffle, epochs=epochs)

    def examples(self, ids: np.ndarray) -> Batch:
        """Global examples by number, int64 `[rows]`, as a batch. Those past the end of a finite run are padding."""
        return _stacked([self._row(int(id)) for id in np.asarray(ids, np.int64)])

    def _row(self, id: int) -> dict[str, np.ndarray]:
        texts = []
        if id < self.total:
            epoch, within = divmod(id, self.examples_per_epoch)
            spans, order = self._epoch(epoch)
            example = within if order is None else order[within]
            for i in range(spans.first[example], spans.first[example + 1]):
                begin = self._begins[spans.document[i]]
                texts.append(self.store.tokens[begin + spans.start[i] : begin + spans.stop[i]])
        sizes = {"length": self.length, "decoder_length": self.decoder_length}
        return denoise(self.objective, id, texts, seed=self.seed, words=self._words, **sizes)

    def _plan(self, order: np.ndarray | None) -> Plan:
        lengths, eos = self._lengths.copy(), getattr(self.objective, "eos", None)
        if eos is not None:
            some = lengths > 0
            lengths[some] -= self.store.tokens[(self._begins + self._lengths - 1)[some]] == eos
        return plan_texts(lengths, self.objective, self.length, self.decoder_length, order=order)


def _stacked(rows: list[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
