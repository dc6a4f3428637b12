"""Wikitext as the text that a reader of the page sees: paragraphs, lists and headings, labels of links."""

import re
from collections.abc import Iterable

PREFIXES = frozenset({"file", "image", "media", "category"})
DROPPED = re.compile(
    "ref|references|gallery|table|timeline|imagemap|score|graph|mapframe|maplink|templatestyles|section|indicator|categorytree|inputbox|style|"
    "script|templatedata|hiero|chem|ce"
)
LINES = re.compile("p|div|br|hr|li|ul|ol|dl|dt|dd|tr|blockquote|center|poem|h[1-6]")
CODE = frozenset({"pre", "syntaxhighlight", "source"})

# What is plainly dropped goes before the parser sees it, innermost first: that is half of an article, and the parser is slow (3 MB/s).
# Templates and tables stay where there is text that is not wikitext, which may look like them.
# Patterns are written to take linear time: a page may be anything.
BEFORE = (
    re.compile(r"<!--.*?(?:-->|\Z)", re.S),
    re.compile(r"<ref\b(?:[^<>/]|/(?!>))*+(?:/>|>[^<]*+(?:<(?!/?ref\b)[^<]*+)*+</ref\s*>)", re.I),
    re.compile(r"</?ref\b[^<>]*>", re.I),  # what is not closed, or never was opened
)
OPEN_TABLES = 100  # that are left to the parser: on thousands that are not closed it takes hours
DEPTH = 20  # of templates and tables that are taken away before the parser
INNERMOST = (
    re.compile(r"(?<!\{)\{\{(?!\{)[^{}]*+\}\}(?!\})"),
    re.compile(r"^[ \t:]*\{\|.*(?:\n(?![ \t:]*(?:\{\||\|\}(?!\}))).*)*+\n[ \t:]*\|\}(?!\})", re.M),
)
VERBATIM = re.compile(r"<(?:math|nowiki|pre|syntaxhighlight|source|code)\b", re.I)
QUOTES = re.compile(r"'{2,}")
MAGIC = re.compile(r"__[A-Z]{3,}__")
RUNS = re.compile(r"[ \t\u00a0]+")
EMPTY = re.compile(r" ?[(（][\s,;:–-]*[)）]")
TABLE = re.compile(r"^[ \t:]*(?:\{\||\|).*\n?", re.M)  # what is left of a table that is not closed
LANGUAGE = re.compile(r"\s*[a-z]{2,3}(?:-[a-z-]+)?\s*:")
SPACES = re.compile(r"^ | $| (?=[,.](?:\s|$))", re.M)
GAPS = re.compile(r"\n{3,}")


def plain(text: str, prefixes: Iterable[str] = PREFIXES) -> str:
    """Templates, tables, references, comments, files, categories and links to other languages are dropped, links and tags are their
    labels, a heading is a line of its own (none where nothing is left under it). `prefixes` are the lower-case names of the namespaces
    that links into are dropped.

    Raises ValueError where mwparserfromhell fails.
    """
    import mwparserfromhell

    prefixes = PREFIXES.union(prefixes)
    text = text.replace("\0", "")
    sections: list[tuple[int, str, list[str]]] = [(0, "", [])]
    code: list[str] = []
    for pattern in BEFORE:
        text = pattern.sub("", text)
    for pattern in INNERMOST * DEPTH if not VERBATIM.search(text) else ():
        text = pattern.sub("", text)
    if text.count("{|") > OPEN_TABLES:
        text = TABLE.sub("", text)
    try:
        nodes = mwparserfromhell.parse(text, skip_style_tags=True).nodes
    except (mwparserfromhell.parser.ParserError, RecursionError) as error:
        raise ValueError(f"mwparserfromhell raised {type(error).__name__}") from error
    for node in nodes:
        if type(node).__name__ == "Heading":
            title: list[str] = []
            _write(node.title.nodes, title, code, prefixes)
            sections.append((node.level, _clean("".join(title)), []))
        else:
            _write([node], sections[-1][2], code, prefixes)
    parts: list[str] = []
    below = 0  # the level of the section that was kept last, going backwards
    for level, title, written in reversed(sections):
        body = _clean("".join(written))
        if body or below > level > 0:
            parts += [part for part in (body, title) if part]
            below = level
    return re.sub("\0([0-9]+)\0", lambda match: code[int(match.group(1))], "\n\n".join(reversed(parts)))


def _write(nodes, out: list[str], code: list[str], prefixes: frozenset[str]) -> None:
    for node in nodes:
        match type(node).__name__:
            case "Text":
                out.append(node.value)
            case "Wikilink":
                title = str(node.title)
                prefix, colon, _ = title.partition(":")
                if colon and prefix.strip().replace("_", " ").lower() in prefixes:
                    continue
                if node.text is not None:
                    _write(node.text.nodes, out, code, prefixes)
                elif not LANGUAGE.match(title):
                    out.append(title.lstrip(":").replace("_", " "))
            case "ExternalLink":
                if node.title is not None:
                    _write(node.title.nodes, out, code, prefixes)
                elif not node.brackets:
                    out.append(str(node.url))
            case "HTMLEntity":
                out.append(node.normalize())
            case "Tag":
                tag = str(node.tag).strip().lower()
                if DROPPED.fullmatch(tag):
                    continue
                if tag in CODE:
                    verbatim: list[str] = []
                    _write(node.contents.nodes if node.contents is not None else (), verbatim, code, prefixes)
                    out.append(f"\n\0{len(code)}\0\n")  # its spaces and quotes stay as they are
                    code.append("".join(verbatim).strip("\n"))
                    continue
                line = LINES.fullmatch(tag) and not node.wiki_markup
                out.append("\n" if line else "")
                if node.contents is not None and not node.self_closing:
                    _write(node.contents.nodes, out, code, prefixes)
                    out.append("\n" if line else "")


def _clean(text: str) -> str:
    if "''" in text:
        text = "\n".join(_unquoted(line) if "''" in line else line for line in text.split("\n"))
    text = TABLE.sub("", MAGIC.sub("", RUNS.sub(" ", text)))
    return GAPS.sub("\n\n", SPACES.sub("", RUNS.sub(" ", EMPTY.sub("", text)))).strip()


def _unquoted(line: str) -> str:
    """A line without the marks of bold (three) and italics (two). Of more than fit, and of a bold mark that would be left open together with
    an italic one (`''Nature'''s`), MediaWiki shows the first as an apostrophe."""
    marks = list(QUOTES.finditer(line))
    lengths = [len(mark.group()) for mark in marks]
    apostrophes = {number: length - 5 if length > 5 else 1 for number, length in enumerate(lengths) if length == 4 or length > 5}
    bold = [number for number, length in enumerate(lengths) if length in (3, 4) or length >= 5]
    italic = [number for number, length in enumerate(lengths) if length == 2 or length >= 5]
    if len(bold) % 2 and len(italic) % 2:
        before = {
            number: f"  {line[max(marks[number].start() - 2, 0) : marks[number].start()]}"[-2:] for number in bold if lengths[number] == 3
        }
        threes = [number for number, text in before.items() if not text[1].isspace()]
        single = [number for number in threes if before[number][0].isspace()]
        if threes:
            apostrophes[(single or threes)[0]] = 1
    counter = iter(range(len(marks)))
    return QUOTES.sub(lambda mark: "'" * apostrophes.get(next(counter), 0), line)
