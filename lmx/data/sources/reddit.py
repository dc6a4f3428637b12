"""PushShift's Reddit dumps, and the links that OpenWebText would have taken from them."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources.paths import byte_parts, documented, each, found, grouped, json_records
from lmx.data.sources.records import iso
from lmx.data.sources.source import UNIT, Omitted, Unit

KEPT = ("subreddit", "author", "score", "title", "url", "permalink", "num_comments", "over_18", "controversiality", "link_id", "parent_id")
GONE = {"[deleted]": "deleted", "[removed]": "removed"}

# Where no article is to be had: sites of pictures, video and music, Reddit itself, what takes scripts or an account; Wikipedia, which has
# its own dumps. OpenWebText's list is of these kinds and has some more.
# fmt: off
BAD_SITES = frozenset((
    "imgur.com", "redd.it", "reddit.com", "redditmedia.com", "reddituploads.com", "gfycat.com", "giphy.com", "flickr.com", "imgflip.com",
    "gyazo.com", "twimg.com", "sli.mg", "deviantart.com", "instagram.com", "pinterest.com", "youtube.com", "youtu.be", "vimeo.com",
    "twitch.tv", "streamable.com", "soundcloud.com", "bandcamp.com", "spotify.com", "itunes.apple.com", "pornhub.com", "twitter.com",
    "facebook.com", "google.com", "discord.gg", "github.com", "xkcd.com", "strawpoll.me", "ebay.com", "walmart.com", "wikipedia.org",
))
BAD_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".gif", ".gifv", ".svg", ".pdf", ".mp4", ".mp3", ".ogv", ".webm", ".wma", ".wmv", ".mov", ".3gp", ".doc",
    ".docx", ".ppt", ".pps", ".pptx", ".xml", ".log", ".csv", ".dat", ".iso", ".bin", ".exe", ".apk", ".jar", ".app", ".gz", ".xz",
    ".bz2", ".tgz", ".tar", ".zip",
)
# fmt: on
HOST = re.compile(r"https?://(?:[^/?#@]*@)?([^/?#:@]+)", re.I)


@dataclass(frozen=True)
class Reddit:
    """Submissions (`RS_2005-06.zst`) and comments (`RC_…`): a file, a glob, or those below a folder; .zst, .xz, .bz2 or unpacked.

    A submission's text is its title, an empty line and its selftext; a comment's is its body. Markdown stays, HTML's entities are undone.
    Ids are Reddit's full names, `t3_8a` of a submission and `t1_c1` of a comment.

    Left out, by reason: `deleted`, `removed`, `empty` (a comment of nothing), `link` (a submission of only a title), `no_score`,
    `low_score`, `over_18`, `subreddit`.
    """

    path: str
    min_score: int | None = None
    """The least score; None: any, or none."""
    over_18: bool = False
    """Whether to keep what is marked so (only submissions are)."""
    subreddits: tuple[str, ...] | None = None
    """The only ones to keep, in any case; None: all."""
    links: bool = False
    """Whether to keep submissions of only a title."""
    name: str = "reddit"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: path.name.startswith(("RS_", "RC_")), "RS_… or RC_…", name=self.name)
        return grouped(files, self.path, size, byte_parts)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        return each(unit, self.path, self._file)

    def _file(self, path: Path, relative: str, start: int, stop: int | None) -> Iterator[Document | Omitted]:
        only = None if self.subreddits is None else {name.lower() for name in self.subreddits}

        def made(record: Any, id: str, source: str, where: str) -> Document | Omitted:
            body = _body(record)
            if reason := self._reason(record, body, only):
                return Omitted(where, reason)
            comment = "body" in record
            text = body if comment else f"{record['title']}\n\n{body}" if body else record["title"]
            id = f"{'t1' if comment else 't3'}_{record['id']}" if record.get("id") else id
            metadata = {field: value for field in KEPT if (value := record.get(field)) is not None}
            return Document(id, unescaped(text), source, metadata, iso(record.get("created_utc")))

        return documented(json_records(path, self.name, start, stop), path, relative, made)

    def _reason(self, record: dict[str, Any], body: str, only: set[str] | None) -> str:
        if body in GONE:
            return GONE[body]
        if not body and "body" in record:
            return "empty"
        if not body and not self.links:
            return "link"
        if only is not None and str(record.get("subreddit")).lower() not in only:
            return "subreddit"
        if record.get("over_18") and not self.over_18:
            return "over_18"
        if self.min_score is None:
            return ""
        score = _score(record)
        return "no_score" if score is None else "low_score" if score < self.min_score else ""


def links(
    path: str, *, min_score: int = 3, bad_sites: frozenset[str] = BAD_SITES, bad_endings: tuple[str, ...] = BAD_ENDINGS
) -> Iterator[str | Omitted]:
    """The URLs that submissions point to, each once, by the rule of WebText and OpenWebText: at least 3 karma, nothing over 18, no `bad_url`.

    `path` as for `Reddit`, files in their order. Left out, by reason: `no_score`, `low_score`, `over_18`, `self` (no link), `bad_url`,
    `duplicate`. Remembers 8 bytes of a hash a URL: of a billion, about 3 in a hundred times one is wrongly left out.
    """
    source, seen = Reddit(path), set()

    def made(record: Any, id: str, file: str, where: str) -> str | Omitted:
        if not isinstance(record, dict) or not isinstance(record.get("url", ""), str):
            raise ValueError("is no submission: expected an object with a `url`")
        url, score = html.unescape(record.get("url", "")), _score(record)
        if score is None or score < min_score:
            reason = "no_score" if score is None else "low_score"
        elif record.get("over_18"):
            reason = "over_18"
        elif record.get("is_self") or not url:
            reason = "self"
        elif is_bad_url(url, bad_sites, bad_endings):
            reason = "bad_url"
        else:
            digest = blake2b(url.encode(), digest_size=8).digest()
            reason = "duplicate" if digest in seen else ""
            seen.add(digest)
        return Omitted(where, reason) if reason else url

    def read(file: Path, relative: str, start: int, stop: int | None) -> Iterator[str | Omitted]:
        return documented(json_records(file, source.name, start, stop), file, relative, made)

    for unit in source.units():
        yield from each(unit, path, read)


def is_bad_url(url: str, sites: frozenset[str] = BAD_SITES, endings: tuple[str, ...] = BAD_ENDINGS) -> bool:
    """Whether it is none of http(s), its host is one of `sites` or below one, or its path has one of `endings`."""
    host = HOST.match(url)
    if not host or url.partition("#")[0].partition("?")[0].lower().endswith(endings):
        return True
    parts = host[1].lower().split(".")
    return any(".".join(parts[i:]) in sites for i in range(len(parts)))


def unescaped(text: str) -> str:
    """Reddit escapes `&`, `<` and `>`, once."""
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") if "&" in text else text


def _body(record: Any) -> str:
    """A comment's body or a submission's selftext. Raises ValueError where it is neither."""
    if not isinstance(record, dict) or not ("body" in record or "title" in record):
        raise ValueError("is neither a submission nor a comment: expected an object with `title` or `body`")
    body, title = record.get("body", record.get("selftext")) or "", record.get("title", "")
    if not isinstance(body, str) or not isinstance(title, str):
        raise ValueError(f"has {type(body).__name__} and {type(title).__name__} for its text and title, expected text")
    return body


def _score(record: dict[str, Any]) -> int | None:
    score = record.get("score")
    if score is None or (isinstance(score, int) and not isinstance(score, bool)):
        return score
    raise ValueError(f"has the score {str(score)[:40]!r}, expected a whole number")
