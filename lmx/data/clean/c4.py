"""The rules of C4 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.2) and
of multilingual C4 (Xue et al. 2021), as their code in TFDS and datatrove apply them: to lines, in this order."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.clean.text import count_sentences
from lmx.data.documents import Document

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class C4Quality:
    """Takes out lines that are no sentences, script warnings and policies; drops documents with code, filler text, or little left."""

    max_word_length: int = 1000
    """Characters; a line with a longer word goes."""
    line_ends: tuple[str, ...] = (".", "?", "!", '"', "'")
    """What a line must end with; `...` is no such end."""
    min_line_words: int = 3
    line_phrases: tuple[str, ...] = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
    """A line with one of them goes (in any case), as does one with `javascript`."""
    citations: bool = True
    """Take out `[1]`, `[edit]` and `[citation needed]`."""
    min_sentences: int = 5
    """In the lines that stay."""
    name: str = "c4_quality"

    def __call__(self, document: Document) -> Verdict:
        counts: Counter[str] = Counter()
        kept, sentences = [], 0
        for line in document.text.splitlines():
            row = line.strip()
            words = row.split()
            if len(row) > self.max_word_length and max(map(len, words)) > self.max_word_length:
                counts["long_word"] += 1
                continue
            if self.citations and "[" in row:
                row, removed = _CITATION.subn("", row)
                counts["citation"] += removed
            if not row.endswith(self.line_ends) or row.endswith("..."):
                counts["no_terminal_punctuation"] += 1
                continue
            if len(words) < self.min_line_words:
                counts["few_words"] += 1
                continue
            lower = row.lower()
            if "lorem ipsum" in lower:
                return Drop("lorem_ipsum", "lorem ipsum")
            if "javascript" in lower:
                counts["javascript"] += 1
                continue
            if "{" in row:
                return Drop("curly_bracket", "{")
            if any(phrase in lower for phrase in self.line_phrases):
                counts["policy"] += 1
                continue
            sentences += count_sentences(row)
            kept.append(row)
        if sentences < self.min_sentences:
            return Drop("too_few_sentences", sentences)
        text = "\n".join(kept).strip()
        return None if text == document.text else Change(text, counts=dict(+counts))


@dataclass(frozen=True, slots=True)
class C4Paragraphs:
    """Multilingual C4's rule: some lines must be long."""

    min_paragraphs: int = 3
    min_length: int = 200
    """Characters."""
    name: str = "c4_paragraphs"

    def __call__(self, document: Document) -> Drop | None:
        long = len([line for line in document.text.split("\n") if len(line) >= self.min_length])
        return Drop("few_paragraphs", long) if long < self.min_paragraphs else None


@dataclass(frozen=True, slots=True)
class C4BadWords:
    """Drops documents with a word or phrase of a list; what was found is told as its line in the list."""

    path: str
    """A text file, one word or phrase in lower case a line."""
    separated: bool = True
    """Only as words of their own; False for languages written without spaces (Japanese, Thai, Chinese)."""
    name: str = "c4_bad_words"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.path,)

    def __call__(self, document: Document) -> Drop | None:
        by_word, anywhere = _bad_words(self.path, self.separated)
        text = document.text.lower()
        candidates = [*anywhere]
        for word in by_word.keys() & set(_WORD.findall(text)) if by_word else ():
            candidates += by_word[word]
        found = [number for phrase, number, pattern in candidates if phrase in text and pattern.search(text)]
        return Drop("bad_word", min(found)) if found else None


@cache
def _bad_words(path: str, separated: bool):
    """The list by the first word of each phrase, and those that have none to look up: (phrase, line from 1, pattern)."""
    if not Path(path).is_file():
        raise ValueError(f"path={path!r} is no file; C4BadWords needs a text file with a word or phrase a line")
    by_word: dict[str, list] = {}
    anywhere = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        phrase = line.strip()
        if not phrase:
            continue
        pattern = re.compile(rf"(?:\W|^){re.escape(phrase)}(?:\W|$)" if separated else re.escape(phrase))
        first = _WORD.match(phrase)
        (by_word.setdefault(first[0], []) if first and separated else anywhere).append((phrase, number, pattern))
    if not by_word and not anywhere:
        raise ValueError(f"path={path!r} holds no words; C4BadWords needs a word or phrase a line")
    return by_word, anywhere
