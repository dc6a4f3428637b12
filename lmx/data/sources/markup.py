"""Small, clean HTML, as forums let their users write it, as text: code stays code."""

import re
from html import unescape

PRE = re.compile(r"<pre\b[^>]*>(.*?)</pre\s*>", re.S | re.I)
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
TAG = re.compile(r"""<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:[^<>"']++|"[^"]*+"|'[^']*+')*+>""")
PARAGRAPH = dict.fromkeys(("p", "div", "ul", "ol", "table", "blockquote", "dl", "hr", "h1", "h2", "h3", "h4", "h5", "h6"), "\n\n")
OPENS = PARAGRAPH | {"br": "\n", "li": "\n- ", "tr": "\n", "dt": "\n", "dd": "\n", "code": "`", "kbd": "`", "td": " ", "th": " "}
CLOSES = PARAGRAPH | {"code": "`", "kbd": "`"}
ITEM = re.compile(r"^-\n+", re.M)
GAPS = re.compile(r"\n{3,}")


def plain(html: str) -> str:
    """Paragraphs with an empty line between them, items of lists behind `- `, `code` in backquotes, `<pre>` as it stands between lines of
    three. Of links their labels stay, of images nothing."""
    pieces = PRE.split(COMMENT.sub("", html))
    out = []
    for number, piece in enumerate(pieces):
        if number % 2:
            code = unescape(TAG.sub("", piece)).strip("\r\n").replace("\r\n", "\n")
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`{3,}", code)), 0)
            out.append(f"{fence}\n{code}\n{fence}")
        else:
            lines = TAG.sub(_written, " ".join(piece.split())).split("\n")
            text = "\n".join([line.strip() for line in lines])
            out.append(unescape(GAPS.sub("\n\n", ITEM.sub("- ", text))).strip())
    return "\n\n".join(piece for piece in out if piece)


def _written(tag: re.Match) -> str:
    return (CLOSES if tag.group(1) else OPENS).get(tag.group(2).lower(), "")
