"""E-mail addresses, phone numbers and IP addresses in text. Each finder yields `(start, stop)`, in no order, and may overlap itself."""

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

from lmx.data.clean.identifiers import OTHER, announced

# --- e-mail

# \w lacks the vowel signs of Indic scripts.
_LOCAL = re.compile(r"\w(?:[\w\u0300-\u036f\u0900-\u0dff+%'~!#$^*-]|\.(?!\.)){0,63}\Z")
_DOMAIN = re.compile(
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24})(?!\w|-\w)"
    r"|\[(?:IPv6:)?[0-9a-fA-F.:]{7,45}\]",
)
# `icon@2x.png` is a file.
_FILES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".css", ".html", ".pdf")
# Where a name may be code or a sentence only these make it an address: `look at the dot on the map`.
_TOPS = re.compile(r"com|org|net|edu|gov|info|biz|io|ai|co|uk|de|fr|es|it|nl|eu|ch|at|be|se|no|dk|fi|pl|ru|in|jp|cn|br|au|ca|us|nz|ie|pt")
# The account of version control.
_NOBODY = ("git",)
_USER = re.compile(r"://[^\s/@:]*:[^\s/@]*\Z")  # a password in a URL


def emails(text: str) -> Iterator[tuple[int, int]]:
    """Addresses `local@domain`: RFC 5322's dot-atoms as people use them, also in other scripts, and domains in brackets."""
    at = text.find("@")
    while at >= 0:
        if (domain := _DOMAIN.match(text, at + 1)) and (local := _LOCAL.search(text[max(0, at - 64) : at])):
            name, top = local[0], domain[0].rpartition(".")[2].lower()
            if text[domain.end() : domain.end() + 1] in ("(", "[") and not _TOPS.fullmatch(top):
                pass  # `x@self.weight(3)` multiplies
            elif (
                name[-1] != "."
                and not _USER.search(text[max(0, at - 80) : at])
                and name.lower() not in _NOBODY
                and not domain[0].lower().endswith(_FILES)
            ):
                yield at - len(name), domain.end()
        at = text.find("@", at + 1)


_DOT = r"(?:\s?[\[({<]\s?(?:dot|punkt|punto|point)\s?[\])}>]\s?|\s(?:dot|DOT)\s|\.)"
_SPELT = re.compile(
    rf"(?<![\w.@-])(?P<local>[\w+-]+(?:{_DOT}[\w+-]+){{0,3}}?)"
    r"(?P<at>\s?[\[({<]\s?(?:at|AT|@|arroba|ät)\s?[\])}>]\s?|\s(?:at|AT)\s|\s@\s)"
    rf"(?P<domain>[\w-]+(?:{_DOT}[\w-]+){{0,2}}?(?P<dot>{_DOT})(?P<top>[A-Za-z]{{2,12}}))(?![\w-])"
)
_HINT = re.compile(r"(?i)[\[({<]\s?(?:at|@|arroba|ät)\s?[\])}>]|\sdot\s|[\[(]dot[\])]|\s@\s")


def spelt_emails(text: str) -> Iterator[tuple[int, int]]:
    """Addresses hidden from simple programs: `jane dot doe at example dot com`, `jane [at] example.com`."""
    for hint in _HINT.finditer(text):
        start = max(0, hint.start() - 80)
        for match in _SPELT.finditer(text, start, min(len(text), hint.end() + 80)):
            bracketed = match["at"].strip()[0] in "[({<@"
            spelt = match["dot"].strip() != "."
            if (bracketed or spelt) and (bracketed or _TOPS.fullmatch(match["top"].lower())):
                yield match.span()


# --- IP addresses

# Three dots close together are rare, and a search that begins with a literal is fast: the first number is looked for afterwards.
_IPV4_REST = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w+]|\.[0-9]|-[0-9]+(?![0-9.]))")
_IPV4_FIRST = re.compile(r"(?<![\w.+~^])(?<![A-Za-z_)]-)[0-9]{1,3}\Z")
# What is numbered like an address.
_NUMBERED = re.compile(
    r"(?i)(?:(?<![A-Za-z])(?:v|ver|version|versions|versión|releases?|released|rev|revision|build|firmware|sections?|sec|chapter|clause|paragraph|figure"
    r"|fig|table|theorem|lemma|equation|oid|appendix|article|patch|driver|kernel|sdk|bios|item|step|ec|rv)(?![A-Za-z])[\s:.(#=_\"']*|§\s*|[=~<>!]=\s?"
    r"|(?<![\w:./|])(?-i:[A-Z])[\w-]*/)"  # `Firefox/3.6.2.8`, but `Special:Contributions/75.111.240.218`
    r"(?:[0-9][0-9.]*(?:\s*(?:,|and|or|to|&|–|-)\s*))*\Z"
)
_IPV6_HINT = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6_LEFT = re.compile(r"[0-9A-Fa-f:]*\Z")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?:(?<=:)[0-9]{1,3}(?:\.[0-9]{1,3}){3})?(?![\w:]|\.[0-9])")


def ips(text: str, private: bool = False) -> Iterator[tuple[int, int]]:
    """IPv4 and IPv6 addresses that lead to somebody: public ones; `private`: those of local networks too (never loopback or documentation)."""
    for rest in _IPV4_REST.finditer(text):
        if first := _IPV4_FIRST.search(text[max(0, rest.start() - 6) : rest.start()]):
            start, stop = rest.start() - len(first[0]), rest.end()
            numbered = _NUMBERED.search(text[max(0, start - 60) : start])
            if not numbered and _leads(text[start:stop], private):
                yield start, stop
    stop = 0
    for hint in _IPV6_HINT.finditer(text):
        if hint.start() < stop:
            continue
        start = hint.start() - len(_IPV6_LEFT.search(text[max(0, hint.start() - 40) : hint.start()])[0])
        if match := _IPV6.match(text, start):
            stop = match.end()
            address = match[0] if not match[0].endswith(":") or match[0].endswith("::") else match[0][:-1]
            if _leads(address, private):
                yield start, start + len(address)


@lru_cache(1 << 12)
def _leads(address: str, private: bool) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.is_loopback or ip.is_multicast or ip.is_unspecified:
        return False
    if ip.version == 6:
        # Only 2000::/3 is given out, and `a[2000::5]` is a slice; but what is written in full is nothing else (pairs may be a hardware address).
        parts = [part for part in address.split(":") if part]
        written = len(parts) == 8 and max(map(len, parts)) > 2
        public = ip.is_global and (written or (int(ip) >> 125 == 1 and len(parts) >= 3))
        return public or (private and (ip.is_link_local or int(ip) >> 121 == 0b1111110))
    return ip.is_global or (private and ip.is_private and address.split(".")[0] in ("10", "172", "192"))


# --- phone numbers

# Which words, just before a number, say that one can call it.
_CALLED = re.compile(
    r"(?i)(?<![<\w])(?:tele?|fax|te?le?phone|phone|telefon|telefoon|teléfono|telefono|telefone|téléphone|tél|fon|ph|mob|mobile?|móvil|movil|mobiel|handy"
    r"|mobil|cell|cellular|celular|cellulare|portable|sms|whatsapp|telegram|viber|hotline|helpline|tlf|puh|puhelin|тел|anruf|rufen?|erreichbar|appele[zr]|llam[ae]r?"
    r"|ligue|chiam[ai]re|bellen)(?![\w>])|電話|电话|手机|携帯"
    # Words of many meanings, only where the number follows at once: `call me at`.
    r"|(?<![<\w.])(?:call|ring|text|dial|reach|contact|bel)(?: (?:me|us|him|her|them|the|our|my|now|today|back|office|at|on|is|under|line)){0,4}:? \Z"
)
_NEAR = 40  # characters before a number, in its line, in which a word is about it
# What makes the first or last digits of a run part of something else.
_GLUED_BEFORE = re.compile(r"[\w$€£#%/.-]\Z|[0-9],\Z")
_GLUED_BEHIND = re.compile(r"(?!x[0-9])[\w%@]|[,:.][0-9]|-\w")
_EXTENSION = re.compile(r"(?i),? ?(?:x|ext\.?|extension|durchwahl|poste) ?[0-9]{1,5}(?!\w|[.-][0-9])")
_AMERICAN = re.compile(r"(?:1[-. ])?(?:\([0-9]{3}\)[-. ]{0,2}|[0-9]{3}[-.])[0-9]{3}[-. ][0-9]{4}")
_GROUPS = re.compile(r"[0-9]+")
_DATE = re.compile(
    r"(?:(?:19|20)[0-9]{2}[-./ ][0-9]{1,2}[-./ ][0-9]{1,2}|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:19|20)?[0-9]{2}"
    r"|[0-9]{2} [01][0-9] (?:19|20)[0-9]{2})(?![-./]?[0-9])"
)
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+|\+?[0-9]+\.[0-9]{1,3}|[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?:/[0-9]{1,2})?")
_SPACE = re.compile("[ \u00a0]+")


def phones(text: str, start: int, stop: int, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Phone numbers in a run of digits and what may stand between them, `text[start:stop]`.

    International ones must be valid; national ones valid in a region, and either announced by a word such as `tel.` or written as only
    phone numbers are: with the trunk prefix 0 or brackets and a gap after the area code, or as `415-555-2671` where +1 is dialled.
    """
    while start < stop:
        end = text.find(". ", start, stop)
        end = stop if end < 0 else end
        if end - start >= 7:
            yield from _phones(text, start, end, regions)
        start = end + 2


def _phones(text: str, start: int, stop: int, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Phone numbers in a run without the end of a sentence."""
    while start and text[start - 1] in "+(":
        start -= 1
    first_is_free = not _GLUED_BEFORE.search(text[max(0, start - 2) : start])
    last_is_free = not _GLUED_BEHIND.match(text, stop)
    pieces, at = [], start
    for gap in _SPACE.finditer(text, start, stop):
        pieces.append((at, gap.start()))
        at = gap.end()
    pieces.append((at, stop))
    if len(pieces) > 12:
        return  # a table of numbers
    if text[start] != "+" and OTHER.search(text[max(0, start - 30) : start]):
        return
    called = announced(_CALLED, text, start, _NEAR)
    first = 0 if first_is_free else 1
    while first < len(pieces):
        for last in range(len(pieces) - (not last_is_free), first, -1):
            begin, end = pieces[first][0], pieces[last - 1][1]
            while not text[end - 1].isdecimal():
                end -= 1
            whole = first == 0 and first_is_free and last == len(pieces)
            if _is_phone(text[begin:end], called, whole, regions):
                extension = _EXTENSION.match(text, end)
                yield begin, extension.end() if extension else end
                first = last - 1
                break
        first += 1


@lru_cache(1 << 12)
def _is_phone(number: str, called: bool, whole: bool, regions: tuple[str, ...]) -> bool:
    import phonenumbers

    groups = _GROUPS.findall(number)
    digits = "".join(groups)
    if not 7 <= len(digits) <= 15 or number.count("(") != number.count(")") or _DATE.match(number) or _DECIMAL.fullmatch(number):
        return False
    international = number.lstrip("(").startswith("+") or (digits.startswith("00") and (called or len(groups) > 1))
    american = bool(_AMERICAN.fullmatch(number))
    # Part of a longer row of groups could be part of any number.
    trunk = whole and len(digits) >= 9 and len(groups) > 1 and (number.startswith("(") or (number.startswith("0") and len(groups[0]) > 1))
    if not (international or american or trunk or (called and len(digits) <= 12)):
        return False
    for region in (None,) if international else regions:
        try:
            parsed = phonenumbers.parse("+" + digits[2:] if international and "+" not in number else number, region)
        except phonenumbers.NumberParseException:
            continue
        if international:
            return phonenumbers.is_valid_number(parsed)
        if phonenumbers.is_valid_number(parsed) and (
            called or (american if parsed.country_code == 1 else trunk and _gap_after_area(groups, parsed))
        ):
            return True
    return False


def _gap_after_area(groups: list[str], parsed) -> bool:
    """Whether the digits of an area code, with the trunk prefix, stand apart from the rest. (Where there is no area code: always.)"""
    import phonenumbers

    area = phonenumbers.length_of_national_destination_code(parsed)
    prefix = sum(map(len, groups)) - len(phonenumbers.national_significant_number(parsed))
    return not area or area + prefix in accumulate(map(len, groups))
