"""Where a page may come from: lists of domains."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from lmx.data.clean.step import Drop
from lmx.data.documents import Document


@dataclass(frozen=True, slots=True)
class BlockedDomains:
    """Drops documents from listed domains and all that is below them: `example.org` also blocks `www.example.org`.

    Raises:
      ValueError: the list is missing or empty; a document has no address.
    """

    path: str
    """A text file, one domain a line; lines that begin with `#` are comments."""
    field: str = "url"
    """Where a document's metadata have its address."""
    name: str = "blocked_domains"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.path,)

    def __call__(self, document: Document) -> Drop | None:
        url = document.metadata.get(self.field)
        if not isinstance(url, str):
            raise ValueError(f"document {document.id!r} has no address in metadata[{self.field!r}]; set field to the one that has it")
        blocked, domain = _domains(self.path), host(url)
        while domain:
            if domain in blocked:
                return Drop("domain", domain)
            domain = domain.partition(".")[2]
        return None


def host(url: str) -> str:
    """The host of an address in lower case, without port and final dot; empty where there is none."""
    try:
        return (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".")
    except ValueError:  # a bracket left open
        return ""


@cache
def _domains(path: str) -> frozenset[str]:
    if not Path(path).is_file():
        raise ValueError(f"path={path!r} is no file; BlockedDomains needs a text file with a domain a line")
    rows = (line.strip().lower().strip(".") for line in Path(path).read_text("utf-8").splitlines())
    domains = frozenset(row for row in rows if row and not row.startswith("#"))
    if not domains:
        raise ValueError(f"path={path!r} holds no domains; BlockedDomains needs one a line")
    return domains
