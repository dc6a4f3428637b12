"""Private: personal data found in a text, and replaced, or the text dropped.

What is found is decided by form and check, never by a model: see `contacts.py`, `identifiers.py` and `keys.py` for the rules of each type.
Names of people are found only by a function that the user gives.
"""

import hashlib
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal, NamedTuple

from lmx.data.clean.contacts import emails, ips, phones, spelt_emails
from lmx.data.clean.identifiers import NATIONAL_IDS, cards, ibans, national_ids
from lmx.data.clean.keys import runs, secrets
from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.documents import Document

Action = Literal["placeholder", "pseudonym", "drop", "keep"]
ACTIONS = ("placeholder", "pseudonym", "drop", "keep")

# Of findings that overlap the earlier type stays, of one type the longer, then the first.
TYPES = ("secret", "iban", "credit_card", "national_id", "email", "ip", "phone", "person")


class Span(NamedTuple):
    """Personal data at `text[start:stop]`."""

    start: int
    stop: int
    type: str
    """One of `TYPES`."""


# Seven digits or more with what stands between the digits of cards, phones and ids. Begins with a digit, so that it is searched for fast.
_DIGITS = re.compile(r"[0-9](?:[0-9]|[ .()/\-\u00a0\u2011]{1,3}[0-9]){6,}")
# Capitals and digits, as IBANs and half of the national ids begin.
_CAPITALS = re.compile(r"[A-Z][A-Z]{0,5}[ -]?[0-9]{2}")
_LOWER = re.compile(r"(?<![A-Za-z0-9])[a-z]{2}[0-9]{2}")


@dataclass(frozen=True, slots=True)
class Private:
    """A cleaning step: what becomes of each type of personal data.

    - `"placeholder"`: `<EMAIL>`, `<CREDIT_CARD>`;
    - `"pseudonym"`: `<EMAIL:qzkvtrbanw>`, the same for the same address in all documents, and for nobody to undo without `key`;
    - `"drop"`: a document that holds one is dropped, with the type as the reason;
    - `"keep"`: not looked for.

    Placeholders and pseudonyms are not found again. Counts of a change are by type. Raises ValueError for an action, region or country
    that it does not know, a pseudonym without a key, and a missing package (the extra `data`).
    """

    name: ClassVar[str] = "private"

    email: Action = "placeholder"
    phone: Action = "placeholder"
    ip: Action = "placeholder"
    credit_card: Action = "placeholder"
    iban: Action = "placeholder"
    national_id: Action = "placeholder"
    secret: Action = "placeholder"
    """Keys, tokens and passwords."""
    person: Action = "keep"
    """Names of people, as `people` finds them."""

    regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "IN", "AU", "BR", "JP")
    """Where phone numbers are dialled without a country code; with one, those of all countries are found. ISO 3166."""
    countries: tuple[str, ...] = tuple(NATIONAL_IDS)
    """Whose national ids are looked for."""
    spelt: bool = False
    """Also addresses hidden from simple programs: `jane at example dot com`."""
    private_ips: bool = False
    """Also addresses of local networks."""
    people: Callable[[str], Iterable[tuple[int, int]]] | None = None
    """A function at the top of a module (it is pickled) from a text to `(start, stop)` of each name: around spaCy or another tagger."""
    key: str = field(default="", repr=False)
    """What pseudonyms depend on. Keep it from whoever gets the text: there are so few phone numbers that all can be tried."""

    def __post_init__(self) -> None:
        for type in TYPES:
            if getattr(self, type) not in ACTIONS:
                raise ValueError(f"{type}={getattr(self, type)!r} is no action; use one of {', '.join(ACTIONS)}")
            if getattr(self, type) == "pseudonym" and not self.key:
                raise ValueError(f"{type}='pseudonym' needs key, a secret text, which is empty")
        if (self.person == "keep") != (self.people is None):
            raise ValueError(
                f"person={self.person!r} with people={self.people!r}; set both or neither: people is a function from a text to the "
                "(start, stop) of each name in it, for example around spaCy (pip install spacy)"
            )
        if unknown := [country for country in self.countries if country not in NATIONAL_IDS]:
            raise ValueError(f"countries holds {unknown[0]!r}; national ids are known of {', '.join(NATIONAL_IDS)}")
        if self._any_number() and (unknown := [region for region in self.regions if region not in _phone_regions()]):
            raise ValueError(f"regions holds {unknown[0]!r}, which phonenumbers does not know; use ISO 3166 codes: US, GB, DE")

    def __call__(self, document: Document) -> Verdict:
        spans = self.find(document.text)
        if not spans:
            return None
        counts: dict[str, int] = {}
        for span in spans:
            counts[span.type] = counts.get(span.type, 0) + 1
        for type in TYPES:
            if type in counts and getattr(self, type) == "drop":
                return Drop(type, counts[type])
        pieces, at = [], 0
        for start, stop, type in spans:
            pieces += document.text[at:start], self._instead(document.text[start:stop], type)
            at = stop
        return Change("".join([*pieces, document.text[at:]]), counts)

    def find(self, text: str) -> list[Span]:
        """Personal data of the types that are not kept, in the order of the text; no two overlap."""
        spans: list[Span] = []
        found = list(self._found(text))
        if self.people is not None:
            found += [(start, stop, "person") for start, stop in self.people(text) if 0 <= start < stop <= len(text)]
        while _add(spans, found):
            # The rest is looked at again as it will stand, next to placeholders. `cut[n]`: characters less up to `ends[n]`.
            pieces, ends, cut, at = [], [-1], [0], 0
            for start, stop, _ in spans:
                pieces += text[at:start], "<>"
                cut.append(cut[-1] + stop - start - 2)
                ends.append(stop - cut[-1])
                at = stop
            rest = self._found("".join([*pieces, text[at:]]))
            found = [(start + cut[bisect(ends, start) - 1], stop + cut[bisect(ends, stop - 1) - 1], type) for start, stop, type in rest]
        return spans

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """What the rules find, which may overlap."""
        if self.email != "keep":
            yield from ((*span, "email") for span in emails(text))
            if self.spelt:
                yield from ((*span, "email") for span in spelt_emails(text))
        if self.ip != "keep":
            yield from ((*span, "ip") for span in ips(text, self.private_ips))
        if self.secret != "keep":
            yield from ((*span, "secret") for span in secrets(text))
        if self._any_number():
            yield from self._numbers(text)

    def _any_number(self) -> bool:
        return not self.phone == self.credit_card == self.national_id == self.iban == "keep"

    def _numbers(self, text: str) -> Iterator[tuple[int, int, str]]:
        regions, countries = tuple(self.regions), tuple(self.countries)
        for run in _DIGITS.finditer(text):
            start, stop = run.span()
            if self.credit_card != "keep" and stop - start >= 12:
                yield from ((*span, "credit_card") for span in cards(text, start, stop + 2))
            if self.phone != "keep":
                yield from ((*span, "phone") for span in phones(text, start, stop, regions))
            if self.national_id != "keep":
                yield from ((*span, "national_id") for span in national_ids(text, max(0, start - 3), stop + 6, countries))
        for match in _CAPITALS.finditer(text):
            start = match.start()
            if start and text[start - 1].isalnum():
                if self.national_id != "keep" and text[start - 1].isdecimal():  # `180424A0953`
                    yield from ((*span, "national_id") for span in national_ids(text, max(0, start - 6), start + 6, countries))
                continue
            if self.iban != "keep":
                yield from ((*span, "iban") for span in ibans(text, start))
            if self.national_id != "keep":
                yield from ((*span, "national_id") for span in national_ids(text, start, start + 26, countries))
        if self.iban != "keep":
            for start, stop in runs(text):
                for match in _LOWER.finditer(text, start, stop):
                    yield from ((*span, "iban") for span in ibans(text, match.start()))

    def _instead(self, value: str, type: str) -> str:
        if getattr(self, type) == "placeholder":
            return f"<{type.upper()}>"
        if type in ("phone", "credit_card", "iban", "national_id"):
            same = re.sub(r"[^\w+]", "", value).upper()  # however it is grouped
        else:
            same = value.lower() if type in ("email", "ip") else value
        digest = int.from_bytes(hashlib.blake2b(f"{type}:{same}".encode(), digest_size=8, key=_key(self.key)).digest())
        # Letters only: digits would be a number, and found again.
        return f"<{type.upper()}:{''.join(chr(97 + digest // 26**place % 26) for place in range(10))}>"


def _add(spans: list[Span], found: list[tuple[int, int, str]]) -> bool:
    """Put into `spans`, sorted, what overlaps none of them or of its betters. Whether there was any."""
    before = len(spans)
    for start, stop, type in sorted(found, key=lambda one: (TYPES.index(one[2]), one[0] - one[1], one[0])):
        span = Span(start, stop, type)
        place = bisect(spans, span)
        if (not place or spans[place - 1].stop <= start) and (place == len(spans) or stop <= spans[place].start):
            spans.insert(place, span)
    return len(spans) > before


@cache
def _key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@cache
def _phone_regions() -> frozenset[str]:
    try:
        import phonenumbers
        import stdnum  # noqa: F401
    except ImportError as error:
        raise ValueError(f"private: {error.name} is not installed; pip install 'lmx[data]'") from error
    return frozenset(phonenumbers.SUPPORTED_REGIONS)
