"""Text that was damaged on its way, mended: wrong decodings, HTML entities, decomposed letters, control characters, white space."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache

from lmx.data.clean.step import Change
from lmx.data.documents import Document

_LINE_BREAK = re.compile("[\r\x0b\x0c\u2028\u2029]\n?")
# Control characters, invisible ones that only lay out (zero-width space, word joiner, byte-order mark), halves of surrogate pairs, and what
# Unicode keeps out of every text. Joiners stay: scripts and emoji need them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]")
_SPACE = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
_TRAILING = re.compile(r"(?<![ \t])[ \t]+(?=\n|\Z)")
_EMPTY_LINES = re.compile(r"\n{3,}")
# What ftfy may change in a line of ASCII: an entity, a terminal's escape, a control character.
_OTHER = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")
_SUSPECT = re.compile(rf"&#?[0-9A-Za-z]{{1,24}};|{_OTHER.pattern}")
# What is not ASCII, and as much around it as ftfy looks at to tell wrong decodings.
_NEAR = re.compile(r".{0,3}[^\x00-\x7f](?:.{0,6}[^\x00-\x7f])*.{0,3}", re.S)


@dataclass(frozen=True, slots=True)
class Normalise:
    """Changes no wording, and no character that means something: curly quotes, ligatures and full-width letters stay.

    Counts: `mended` lines (ftfy), `composed` (1: the text was not in the Unicode form), `line_break`s of other kinds, `control` characters,
    `space`s of other widths, `trailing` white space of lines, `empty_lines` (runs of two or more, of which one stays).
    """

    form: str = "NFC"
    """The Unicode form: NFC, or NFKC, which loses more."""
    name: str = "normalise"

    def __post_init__(self) -> None:
        if self.form not in ("NFC", "NFKC"):
            raise ValueError(f"form={self.form!r} must be 'NFC' or 'NFKC'")

    def __call__(self, document: Document) -> Change | None:
        counts: Counter[str] = Counter()
        text, counts["line_break"] = _LINE_BREAK.subn("\n", document.text)
        text, counts["mended"] = mend(text)
        text, counts["control"] = _CONTROL.subn("", text)
        text, counts["space"] = _SPACE.subn(" ", text)
        if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
            text, counts["trailing"] = _TRAILING.subn("", text)
        if "\n\n\n" in text:
            text, counts["empty_lines"] = _EMPTY_LINES.subn("\n\n", text)
        if not unicodedata.is_normalized(self.form, text):
            text, counts["composed"] = unicodedata.normalize(self.form, text), 1
        text = text.strip("\n")
        return None if text == document.text else Change(text, counts=dict(+counts))


def mend(text: str) -> tuple[str, int]:
    """A text as ftfy has it (Speer 2019; the fixes that datatrove takes, which leave alone what is only unusual), and the lines it changed."""
    if text.isascii() and not _SUSPECT.search(text):
        return text, 0
    fix, is_bad, entities, plain = _ftfy()
    rows, changed, config = text.split("\n"), 0, entities
    for i, row in enumerate(rows):
        if config is entities and "<" in row:
            config = plain  # as ftfy: a text with tags means its entities
        if row.isascii():
            found = _SUSPECT.search(row)
            suspect = found and (config is entities or found[0][0] != "&" or _OTHER.search(row))
        else:
            strange = not row.replace("\t", "").isprintable() or is_bad("\n".join(_NEAR.findall(row)))
            suspect = strange or (config is entities and _SUSPECT.search(row))
        if suspect:
            fixed = fix(row, config)
            changed += fixed != row
            rows[i] = fixed
    return "\n".join(rows), changed


@cache
def _ftfy():
    try:
        import ftfy
        from ftfy.badness import is_bad
    except ImportError as error:
        raise ValueError("Normalise needs ftfy: pip install 'lmx[data]'") from error
    config = ftfy.TextFixerConfig(
        fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False, normalization=None, explain=False
    )
    return ftfy.fix_text, is_bad, config, config._replace(unescape_html=False)
