"""Project Gutenberg's books without what Gutenberg puts before and after them, and PG-19, which is made of them."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lmx.data.documents import Document
from lmx.data.sources.compressed import opened
from lmx.data.sources.paths import each, found, grouped, suffix, unreadable, whole
from lmx.data.sources.records import utf8
from lmx.data.sources.source import UNIT, Omitted, Unit

# The markers have been worded in many ways since 1991. Old books have none at their beginning but the end of the "small print".
EBOOK = r"TH(?:E|IS)\s+(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG(?:'S)?\s+E-?(?:BOOK|TEXT)"
START = re.compile(rf"^[ \t]*\*\*\*?\s*START\s+OF\s+{EBOOK}(?:(?:[^*\n]*\n(?=[^\n]*\S)){{0,3}}[^*\n]*\*\*)?[^\n]*\n", re.M | re.I)
SMALL_PRINT = re.compile(r"^[ \t]*\*+\s*END\s*\*?\s*(?:OF\s+)?THE\s+SMALL\s+PRINT[^\n]*\n", re.M | re.I)
END = re.compile(r"[ \t*]*End\s+of\s+(?:(?:the|this)\s+)?(?:copyrighted\s+)?Project\s+Gutenberg", re.I)
NAME = re.compile("Gutenberg|GUTENBERG")
CREDITS = re.compile(
    r"\s*\[?(?:Produced|E-?text (?:prepared|produced|scanned)|Th(?:e|is) (?:e-?text|e-?book) was (?:prepared|produced|created|typed|scanned)"
    r"|(?:Transcribed|Scanned|Typed|Prepared|Converted) (?:from|by)|HTML version by)\b[^\n]*"
    r"(?:(?:\n(?![ \t]*\n)[^\n]*){0,4}(?=\n[ \t]*\n))?",  # its paragraph, or in a file without empty lines its line
    re.I,
)
FIELD = re.compile(
    r"^(Title|Author|Editor|Translator|Illustrator|Contributor|Release Date|Posting Date|First Posted|Original Publication|Language"
    r"|Character Set Encoding|Credits)[ \t]*:[ \t]*([^\n]*(?:\n[ \t]+\S[^\n]*)*)",
    re.M | re.I,
)
NUMBER = re.compile(r"\[\s*e-?(?:book|text)\s*#\s*(\d+)\s*\]", re.I)
DATE = re.compile(r"(?P<month>[A-Z][a-z]{2})[a-z]*\.?(?:\s+(?P<day>\d{1,2}))?,?\s+(?P<year>\d{4})|\b(?P<iso>\d{4}(?:-\d{2}-\d{2})?)\b")
BEGINNING = 20_000  # characters that the marker and the header are looked for in: the longest small print has 15,000
TAIL = 2_000  # characters that the first of several ends is at most before the last: a book may hold a book with an end of its own


@dataclass(frozen=True)
class Gutenberg:
    """`1342-0.txt`, `1342-8.txt`, `1342.txt`: a file, a glob, or the .txt files below a folder. A document's id is its path below that.

    Header, licence and the line of who produced it are left out, a file without markers is kept whole. Its fields are the metadata
    (`title`, `author`, `language`, `ebook`, …), its release date is when it was created. Where a book lies in a folder in several encodings
    the widest is read.
    """

    path: str
    unwrapped: bool = False
    """A paragraph a line; verse, lists and headings keep their lines (`unwrap`)."""
    name: str = "gutenberg"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        return grouped(found(self.path, lambda path: suffix(path) == ".txt", ".txt", name=self.name), self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        if Path(self.path).is_dir() and _wider(path):
            yield Omitted(str(path), "other_encoding")
            return
        with opened(path, self.name) as file:
            data = file.read()
        try:
            text = decoded(data, path.name)
        except ValueError as error:
            yield Omitted(str(path), str(error), damaged=True)
            return
        body, fields, whole = stripped(text)
        created = released(str(fields.get("release_date", "")))
        yield Document(relative, unwrap(body) if self.unwrapped else body, str(path), fields, created)
        if not whole:
            yield Omitted(f"{path}, its end", "has no END marker: the file was cut off", damaged=True)


@dataclass(frozen=True)
class PG19:
    """The folder of PG-19: `train/`, `validation/` and `test/` with `<book id>.txt`, and `metadata.csv`. Ids are `train/<book id>`."""

    path: str
    name: str = "pg19"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        if not (Path(self.path) / "metadata.csv").is_file():
            raise FileNotFoundError(f"{self.name}: {self.path!r} is no folder with metadata.csv in it, expected that of PG-19")
        return grouped(found(self.path, lambda path: suffix(path) == ".txt", "train/<book id>.txt", name=self.name), self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        table = Path(self.path) / "metadata.csv"
        books = {}
        try:
            # id, title, year, link; titles hold commas, quoted or not
            rows = [row for row in csv.reader(io.StringIO(utf8(table.read_bytes()).replace("\0", ""), newline="")) if row]
            books = {row[0]: {"title": ",".join(row[1:-2]), "year": row[-2], "url": row[-1]} for row in rows if len(row) > 3}
        except (OSError, ValueError, csv.Error) as error:
            yield unreadable(str(table), error)
        yield from each(unit, self.path, lambda path, relative, *_: self._file(path, relative, books))

    def _file(self, path: Path, relative: str, books: dict[str, dict[str, str]]) -> Iterator[Document | Omitted]:
        book = books.get(path.name.partition(".")[0], {})
        with opened(path, self.name) as file:
            yield whole(file, relative.removesuffix(".txt"), str(path), book, book.get("year", ""))


def decoded(data: bytes, filename: str) -> str:
    """A file's text: UTF-8 (with or without BOM), else in the encoding that its header or the `-8` of its name says; lines end in `\n`.

    Raises ValueError where none of them reads it.
    """
    try:
        text = utf8(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        said = re.search(rb"Character set encoding:[ \t]*([^\r\n]+)", data[:BEGINNING], re.I)
        encoding = _encoding(said.group(1).decode("latin-1") if said else "", filename)
        if not encoding:
            raise
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as second:
            raise ValueError(f"{error}; nor is it the {encoding} that it says") from second
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stripped(text: str) -> tuple[str, dict[str, str | int], bool]:
    """A book without header and licence, the fields of its header, and whether it ends as it should: a start marker wants an end's."""
    start = START.search(text, 0, BEGINNING) or SMALL_PRINT.search(text, 0, BEGINNING)
    header = text[: start.end()] if start else text[:BEGINNING] if _ends(text, 0) else ""
    fields: dict[str, str | int] = {}
    for match in FIELD.finditer(header):
        fields.setdefault(match[1].lower().replace(" ", "_"), " ".join(NUMBER.sub("", match[2]).split()))
    if number := NUMBER.search(header):
        fields["ebook"] = int(number[1])
    first = start.end() if start else 0
    if credits := CREDITS.match(text, first) if start else None:
        fields.setdefault("credits", " ".join(credits[0].split()))
        first = credits.end()
    ends = _ends(text, first)
    last = min((end for end in ends if end >= ends[-1] - TAIL), default=len(text))
    whole = bool(ends) or not (start and "START" in start[0].upper())
    return text[first:last].strip("\n") + "\n" if start or ends else text, fields, whole


def released(said: str) -> str:
    """`June 12, 2008`, `Aug, 1997` or `2007-05-12` as a date, or where there is no day as a year."""
    match = DATE.search(said)
    if not match:
        return ""
    if match["iso"]:
        return match["iso"]
    try:
        day = datetime.strptime(f"{match['month']} {match['day'] or 1} {match['year']}", "%b %d %Y").date()
    except ValueError:
        return match["year"]
    return day.isoformat() if match["day"] else match["year"]


def unwrap(text: str) -> str:
    """Joins lines that were broken to fit a width: not indented, and the next line's first word would not have fitted.

    The width is what nine in ten lines stay below; five characters are forgiven. Verse, lists, headings and letters' ends keep their lines.
    """
    lines = text.split("\n")
    lengths = sorted(len(line) for line in lines if line)
    if not lengths:
        return text
    width = lengths[len(lengths) * 9 // 10] - 5
    pieces = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        pieces.append(line)
        if not after or after[0].isspace() or not line or line[0].isspace() or len(line) + 1 + len(after.split(None, 1)[0]) < width:
            pieces.append("\n")
        elif not line.endswith("-"):
            pieces.append(" ")
    return "".join(pieces[:-1])


def _ends(text: str, first: int) -> list[int]:
    """Where lines begin that say that the book ends. Looks only at lines that name Gutenberg: that is quick."""
    lines = {max(first, text.rfind("\n", 0, name.start()) + 1) for name in NAME.finditer(text, first)}
    return sorted(line for line in lines if END.match(text, line))


def _encoding(said: str, filename: str) -> str:
    said = said.lower()
    if latin := re.search(r"8859[-_ ]?(\d+)", said):
        return f"iso8859-{latin[1]}"
    if "1252" in said:
        return "cp1252"
    if "latin" in said or (not said and re.search(r"-8\.txt", filename)):
        return "iso8859-1"
    return ""


def _wider(path: Path) -> bool:
    """Whether the same book lies beside it in a wider encoding."""
    match = re.fullmatch(r"(\d+)(-8)?\.txt", path.name)
    if not match:
        return False
    return path.with_name(f"{match[1]}-0.txt").is_file() or (not match[2] and path.with_name(f"{match[1]}-8.txt").is_file())
