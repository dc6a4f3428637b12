"""The rules that FineWeb adds to C4's and Gopher's (Penedo et al. 2024, "The FineWeb Datasets", section 3.6)."""

from dataclasses import dataclass

from lmx.data.clean.gopher import duplicates
from lmx.data.clean.step import Drop
from lmx.data.clean.text import TERMINAL, lines, words
from lmx.data.documents import Document


@dataclass(frozen=True, slots=True)
class FineWebQuality:
    """Lists, menus and pages put together of pieces: few lines end like sentences, most are short, lines repeat, or breaks are many."""

    min_punctuated_lines: float = 0.12
    """Share of lines that end with `line_ends`."""
    line_ends: tuple[str, ...] = tuple(TERMINAL)
    max_short_lines: float = 0.67
    short_line: int = 30
    """Characters of a short line, at most."""
    max_duplicate_line_characters: float = 0.01
    """Of the text without its line breaks."""
    max_breaks_per_word: float = 0.3
    name: str = "fineweb_quality"

    def __call__(self, document: Document) -> Drop | None:
        rows = lines(document.text)
        if not rows:
            return Drop("empty", 0)
        if (ratio := sum(row.endswith(self.line_ends) for row in rows) / len(rows)) < self.min_punctuated_lines:
            return Drop("punctuated_lines", ratio)
        if (ratio := sum(len(row) <= self.short_line for row in rows) / len(rows)) > self.max_short_lines:
            return Drop("short_lines", ratio)
        breaks = document.text.count("\n")
        if (ratio := duplicates(rows)[1] / (len(document.text) - breaks)) > self.max_duplicate_line_characters:
            return Drop("duplicate_line_characters", ratio)
        if breaks and (ratio := breaks / len(words(document.text))) > self.max_breaks_per_word:
            return Drop("breaks_per_word", ratio)
        return None
