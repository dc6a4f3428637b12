"""How a tokenizer treats a text: tokens for a word, bytes in a token, words in pieces, by language, domain or source."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmx.data.documents import Document
from lmx.data.tokenizers import ByteTokenizer, Tokenizer

BATCH = 256  # documents that one call of the tokenizer gets
UNKNOWN = re.compile(r"<unk>|\[UNK\]|<\|unk\|>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Fertility:
    """Counts of one group of documents. A word is what stands between spaces, so that languages without them have few and long ones."""

    group: str
    documents: int
    words: int
    characters: int
    bytes: int
    """UTF-8 bytes of text."""
    tokens: int
    split: int
    """Words, each with a space before it, that are more than one token."""
    unknown: int
    """Tokens that stand for what the tokenizer does not know."""
    fallback: int
    """Tokens that are one byte of a character, for want of a token for all of it."""

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(self.characters, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def split_share(self) -> float:
        """The share of words that are split."""
        return self.split / max(self.words, 1)

    @property
    def unknown_share(self) -> float:
        """The share of tokens that are unknown."""
        return self.unknown / max(self.tokens, 1)

    @property
    def fallback_share(self) -> float:
        """The share of tokens that are a byte of a character."""
        return self.fallback / max(self.tokens, 1)


COLUMNS: dict[str, tuple[str, Callable[[Fertility], float]]] = {
    "tokens per word": ("{:.2f}", lambda row: row.tokens_per_word),
    "tokens per character": ("{:.3f}", lambda row: row.tokens_per_character),
    "bytes per token": ("{:.2f}", lambda row: row.bytes_per_token),
    "words split": ("{:.1%}", lambda row: row.split_share),
    "unknown": ("{:.2%}", lambda row: row.unknown_share),
    "byte fallback": ("{:.2%}", lambda row: row.fallback_share),
}
DRAWN = ("tokens per word", "bytes per token", "words split", "byte fallback")


def by_source(document: Document) -> str:
    return document.source


def by_field(field: str) -> Callable[[Document], str]:
    """Groups by a field of the documents' metadata (`language`, `domain`); those without it are "(none)"."""
    return lambda document: str(document.metadata.get(field, "(none)"))


def fertility(texts: Iterable[Document], tokenizer: Tokenizer, by: Callable[[Document], str] = by_source) -> list[Fertility]:
    """How a tokenizer treats documents, a row a group in the order of their names; of several groups the last row is all of them.

    One pass, with a batch of documents and the different words in memory. Raises ValueError when there is no document.
    """
    counts: dict[str, Counter[str]] = {}
    ids: dict[str, Counter[int]] = {}
    words: dict[str, Counter[str]] = {}

    def add(batch: Sequence[Document]) -> None:
        for document, row in zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True):
            group, text = by(document), document.text
            counts.setdefault(group, Counter()).update({"documents": 1, "characters": len(text), "bytes": len(text.encode())})
            ids.setdefault(group, Counter()).update(row)
            words.setdefault(group, Counter()).update(text.split())

    batch: list[Document] = []
    for document in texts:
        batch.append(document)
        if len(batch) == BATCH:
            add(batch)
            batch = []
    if batch:
        add(batch)
    if not counts:
        raise ValueError("no documents to look at: the corpus is empty")
    different = sorted(set().union(*words.values()))
    split = {word for word, row in zip(different, tokenizer.encode_batch([f" {word}" for word in different]), strict=True) if len(row) > 1}
    used = set().union(*ids.values())
    unknown = {id for id in used if UNKNOWN.fullmatch(tokenizer.token(id))}
    bytes_alone = not isinstance(tokenizer, ByteTokenizer)  # whose byte 10 is a line's end
    part = {id for id in used - unknown if "\ufffd" in tokenizer.decode([id]) or (bytes_alone and BYTE.fullmatch(tokenizer.token(id)))}
    rows = [
        Fertility(
            group=group,
            words=words[group].total(),
            tokens=ids[group].total(),
            split=sum(count for word, count in words[group].items() if word in split),
            unknown=sum(count for id, count in ids[group].items() if id in unknown),
            fallback=sum(count for id, count in ids[group].items() if id in part),
            **counts[group],
        )
        for group in sorted(counts)
    ]
    if len(rows) == 1:
        return rows
    fields = [name for name in Fertility.__dataclass_fields__ if name != "group"]
    return [*rows, Fertility("all", **{name: sum(getattr(row, name) for row in rows) for name in fields})]


def table(rows: Sequence[Fertility]) -> str:
    """The rows as a Markdown table."""
    lines = [["group", "documents", "words", "tokens", *COLUMNS], ["---", *["---:"] * (3 + len(COLUMNS))]]
    for row in rows:
        plain = [row.group.replace("|", "\\|"), *(f"{n:,}" for n in (row.documents, row.words, row.tokens))]
        lines.append([*plain, *(form.format(value(row)) for form, value in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(reports: dict[str, Sequence[Fertility]], path: str | Path) -> None:
    """Bars by group, a colour a tokenizer (`reports` by their names), written to an image file."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row.group for rows in reports.values() for row in rows))
    figure = Figure(figsize=(3.2 * len(DRAWN) + 1, 1.2 + 0.24 * len(groups) * len(reports)), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), sharey=True, squeeze=False)[0]
    height = 0.8 / len(reports)
    for axes, name in zip(panels, DRAWN, strict=True):
        form, value = COLUMNS[name]
        for i, (tokenizer, rows) in enumerate(reports.items()):
            found = {row.group: value(row) for row in rows}
            places = [g + (i - (len(reports) - 1) / 2) * height for g, group in enumerate(groups) if group in found]
            bars = axes.barh(places, [found[group] for group in groups if group in found], height, label=tokenizer)
            axes.bar_label(bars, [form.format(bar.get_width()) for bar in bars], padding=2, fontsize=7)
        axes.set_title(name, fontsize=10)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(groups)), groups)
    panels[0].invert_yaxis()
    if len(reports) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(reports))
    figure.savefig(path, dpi=150)
