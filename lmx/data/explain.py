"""A batch as a person reads it: its tokens as text, coloured by segment and by whether they are predicted."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmx.data.pipeline import require_supervised
from lmx.data.tokenizers import Tokenizer

Role = Literal["predicted", "context", "padding"]

# Backgrounds of segments by turns; dark text on them is readable in light and dark surroundings alike.
SEGMENTS = ("#bfdbfe", "#fde68a", "#bbf7d0", "#fbcfe8", "#ddd6fe")
CONTEXT, PADDING, INK = "#d1d5db", "#6b7280", "#111827"


@dataclass(frozen=True)
class Piece:
    """A stretch of a row: the text of one token (or a count of padding), its segment (0: padding) and its role."""

    text: str
    segment: int
    role: Role


@dataclass(frozen=True)
class Row:
    title: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, repr=False)
class Explanation:
    """Rows of a batch. Shows itself in a terminal (`rich.print`), in a notebook (HTML) and, as `str`, in plain text."""

    title: str
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self):
        from rich.text import Text

        text = Text(f"{self.title}\n", style="bold")
        text.append("legend: ", style="not bold")
        for i, color in enumerate(SEGMENTS[:3], 1):
            text.append(f"segment {i}", style=f"not bold {INK} on {color}")
            text.append(" ")
        text.append("context (weight 0)", style=f"not bold italic {INK} on {CONTEXT}")
        text.append(" ")
        text.append("padding", style=f"not bold {PADDING}")
        for row in self.rows:
            text.append(f"\n\n{row.title}\n", style="bold")
            for piece in row.pieces:
                text.append(piece.text, style=f"not bold {_rich_style(piece)}")
        return text

    def _repr_html_(self) -> str:
        chip = 'style="padding:0 .4em;border-radius:3px;{}"'
        legend = [f"<span {chip.format(_css(Piece('', i, 'predicted')))}>segment {i}</span>" for i in (1, 2, 3)]
        legend.append(f"<span {chip.format(_css(Piece('', 1, 'context')))}>context (weight 0)</span>")
        legend.append(f"<span {chip.format(_css(Piece('', 0, 'padding')))}>padding</span>")
        parts = [f"<div><b>{html.escape(self.title)}</b><div>legend: {' '.join(legend)}</div>"]
        for row in self.rows:
            tokens = "".join(
                f'<span title="segment {p.segment}, {p.role}" style="{_css(p)}">{html.escape(p.text)}</span>' for p in row.pieces
            )
            title = f'<div style="margin-top:.8em"><b>{html.escape(row.title)}</b></div>'
            parts.append(f'{title}<pre style="white-space:pre-wrap;line-height:1.5;margin:0">{tokens}</pre>')
        return "".join(parts) + "</div>"

    def __str__(self) -> str:
        return "\n\n".join([self.title] + [f"{row.title}\n{''.join(piece.text for piece in row.pieces)}" for row in self.rows])


def explain(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, rows: int = 2) -> Explanation:
    """The first `rows` rows of a batch (see `lmx.data.Batch`), a span of each document as text.

    A span shows its inputs and, at its end, the target that is no input. A token is shown as predicted where the weight of predicting it is
    not 0, else as context: the first of each span always is. Where targets are not the next tokens, as in masked language modelling, they
    stand behind an arrow. Of rows with an encoder and a decoder (see `lmx.data.denoise`) the encoder's side comes first, all of it context.
    Raises ValueError when nothing in the batch is predicted.
    """
    require_supervised(batch)
    if "decoder_tokens" in batch:
        return _both_sides(batch, tokenizer, rows)
    batch = {"segments": (batch["weights"] != 0).astype(np.int32)} | dict(batch)  # a stream has none
    weights, segments = batch["weights"], batch["segments"]
    count = len(weights)
    rest = f", the first {rows} shown" if rows < count else ""
    empty = np.count_nonzero(segments == 0)
    title = f"{count} rows of {weights.shape[1]} tokens, {np.count_nonzero(weights)} predicted, {empty} padding ({empty / segments.size:.1%}){rest}"
    return Explanation(title, tuple(_row(batch, i, tokenizer) for i in range(min(rows, count))))


def _both_sides(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, rows: int) -> Explanation:
    sources = {name: batch[name] for name in ("tokens", "segments", "example_id")}
    # A source predicts nothing: as its own targets, tokens show as they are.
    sources |= {"targets": batch["tokens"], "weights": np.zeros(batch["tokens"].shape, np.float32)}
    decoder = dict(batch) | {name: batch[f"decoder_{name}"] for name in ("tokens", "segments")}
    shown = explain({name: decoder[name] for name in (*sources, "weights")}, tokenizer, rows=rows)
    arrow = Piece("\n\u2192 ", 0, "padding")
    both = (Row(row.title, (*_row(sources, i, tokenizer).pieces, arrow, *row.pieces)) for i, row in enumerate(shown.rows))
    return Explanation(shown.title, tuple(both))


def _row(batch: Mapping[str, np.ndarray], i: int, tokenizer: Tokenizer) -> Row:
    tokens, targets, weights, segments = (batch[name][i] for name in ("tokens", "targets", "weights", "segments"))
    edges = np.flatnonzero(np.diff(segments)) + 1
    pieces: list[Piece] = []
    for first, stop in zip([0, *edges], [*edges, len(segments)], strict=True):
        segment, predicted = int(segments[first]), weights[first:stop] != 0
        if not segment:
            pieces.append(Piece(f"[{stop - first} padding]", 0, "padding"))
            continue
        inputs, outputs = tokens[first:stop], targets[first:stop]
        if np.array_equal(inputs[1:], outputs[:-1]):
            ids = [*inputs, outputs[-1]]
            shown = [_text(tokenizer, id, before) for before, id in zip([None, *ids], ids, strict=False)]
            roles = [False, *predicted]
        else:
            shown = [
                _text(tokenizer, a) + (f"\u2192{_text(tokenizer, b)}" if w else "")
                for a, b, w in zip(inputs, outputs, predicted, strict=True)
            ]
            roles = list(predicted)
        pieces += [Piece(text, segment, "predicted" if is_target else "context") for text, is_target in zip(shown, roles, strict=True)]
    spans = len(np.unique(segments[segments > 0]))
    title = (
        f"example {batch['example_id'][i]}: {spans} segment{'s' * (spans != 1)}, {np.count_nonzero(weights)} of {len(weights)} predicted"
    )
    return Row(title, tuple(pieces))


def _text(tokenizer: Tokenizer, id: int, before: int | None = None) -> str:
    """A token as it reads in running text after another: spaces as spaces, a line's end as a mark and the line's end."""
    text = tokenizer.decode([int(id)])
    if before is not None:
        # Some tokenizers write the space in front of a word only where something stands before it.
        context = tokenizer.decode([int(before)])
        both = tokenizer.decode([int(before), int(id)])
        text = both[len(context) :] if both.startswith(context) else text
    if not text or "\ufffd" in text or not text.replace("\n", "").isprintable():
        return tokenizer.token(int(id))
    return text.replace("\n", "\u23ce\n")


def _rich_style(piece: Piece) -> str:
    if piece.role == "padding":
        return PADDING
    if piece.role == "context":
        return f"italic {INK} on {CONTEXT}"
    return f"{INK} on {SEGMENTS[(piece.segment - 1) % len(SEGMENTS)]}"


def _css(piece: Piece) -> str:
    if piece.role == "padding":
        return f"color:{PADDING}"
    if piece.role == "context":
        return f"color:{INK};background:{CONTEXT};font-style:italic"
    return f"color:{INK};background:{SEGMENTS[(piece.segment - 1) % len(SEGMENTS)]}"
