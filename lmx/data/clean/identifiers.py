"""Numbers that name a person or an account, told by their checks: credit cards, IBANs, national ids.

A check digit alone lets one of ten through (two: one of a hundred). So a number whose form anything could have counts only where a word
just before it says what it is; one that is written as nothing else is, by itself.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

NEAR = 60  # characters before a number, in its line, in which a word is about it
AFTER = 16  # and after it: `123456782 (BSN)`


@dataclass(frozen=True, slots=True)
class Identifier:
    """How a country's number for a person is written and checked."""

    check: str
    """The module of python-stdnum whose `is_valid` decides; empty: the pattern says all."""
    pattern: str
    """It as people write it."""
    words: str
    """What announces it, as a regex."""
    alone: str = ""
    """Those forms of it that are nothing else, and need no word; empty: none."""


_SOLID_DATE = r"[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"

NATIONAL_IDS: dict[str, tuple[Identifier, ...]] = {
    "AU": (Identifier("au.tfn", r"[0-9]{3} ?[0-9]{3} ?[0-9]{2,3}", r"tfn|tax file"),),
    "BE": (
        Identifier(
            "be.nn",
            r"[0-9]{2}[. ]?[0-9]{2}[. ]?[0-9]{2}[- ]?[0-9]{3}[. -]?[0-9]{2}",
            r"rijksregister|registre national|national register|insz|niss|nrn?",
            r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}[. ][0-9]{2}",
        ),
    ),
    "BR": (
        Identifier(
            "br.cpf", r"[0-9]{3}\.?[0-9]{3}\.?[0-9]{3}-?[0-9]{2}", r"cpf|contribuinte|cadastro", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}"
        ),
    ),
    "CA": (Identifier("ca.sin", r"[0-9]{3}[- ]?[0-9]{3}[- ]?[0-9]{3}", r"sin|nas|social insurance|assurance sociale"),),
    "CH": (
        Identifier(
            "ch.ssn",
            r"756[. ]?[0-9]{4}[. ]?[0-9]{4}[. ]?[0-9]{2}",
            r"ahv|avs|oasi|sozialversicherung\w*",
            r"756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}",
        ),
    ),
    "CL": (
        Identifier("cl.rut", r"[0-9]{1,2}\.?[0-9]{3}\.?[0-9]{3}-?[0-9Kk]", r"rut|run|cédula", r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9Kk]"),
    ),
    "CN": (Identifier("cn.ric", r"[1-9][0-9]{5}(?:19|20)[0-9]{9}[0-9Xx]", r"id|identity|resident|身份证\w*", r".*"),),
    "CZ": (Identifier("cz.rc", r"[0-9]{6}/?[0-9]{3,4}", r"rodné číslo|rodné|r\.?č|rč|birth number", r"[0-9]{6}/[0-9]{4}"),),
    "DE": (Identifier("de.idnr", r"[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", r"steuer\w*|idnr|tax id|tin|identifikationsnummer"),),
    "DK": (Identifier("dk.cpr", r"[0-3][0-9][01][0-9]{3}[- ]?[0-9]{4}", r"cpr\w*|personnummer", r"[0-9]{6}-[0-9]{4}"),),
    "ES": (
        Identifier("es.dni", r"[0-9]{2}\.?[0-9]{3}\.?[0-9]{3}[- ]?[A-Za-z]", r"dni|nif|documento|identidad", r"[0-9.]{8,10}-?[A-Z]"),
        Identifier("es.nie", r"[XYZxyz][- ]?[0-9]{7}[- ]?[A-Za-z]", r"nie|extranjero|identidad", r".*"),
    ),
    "FI": (Identifier("fi.hetu", r"[0-3][0-9][01][0-9]{3}[-+A-FU-Y][0-9]{3}[0-9A-Ya-y]", r"hetu|henkilötunnus|personbeteckning", r".*"),),
    "FR": (
        Identifier(
            "fr.nir",
            r"[12378] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}",
            r"nir|insee|sécu\w*|sécurité sociale|social security",
            r"[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]).*",
        ),
    ),
    "GB": (
        Identifier(
            "",
            r"[A-Z]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-DT]",
            r"nino|national insurance|ni",
            r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:(?: [0-9]{2}){3} [A-D]| ?[0-9]{6} ?[A-D])",
        ),
        Identifier("gb.nhs", r"[0-9]{3}[- ]?[0-9]{3}[- ]?[0-9]{4}", r"nhs|health service"),
    ),
    "IN": (
        Identifier("in_.aadhaar", r"[2-9][0-9]{3}[ -]?[0-9]{4}[ -]?[0-9]{4}", r"aadhaar|aadhar|uidai|uid|आधार"),
        Identifier("in_.pan", r"[A-Z]{3}[ABCFGHJLPT][A-Z][0-9]{4}[A-Z]", r"pan|permanent account", r".*"),
    ),
    "IT": (
        Identifier(
            "it.codicefiscale",
            r"[A-Za-z]{6}[0-9LMNP-V]{2}[A-Za-z][0-9LMNP-V]{2}[A-Za-z][0-9LMNP-V]{3}[A-Za-z]",
            r"codice fiscale|c\.?f",
            r".*",
        ),
    ),
    "KR": (Identifier("kr.rrn", _SOLID_DATE + r"-?[1-8][0-9]{6}", r"rrn|resident|주민등록번호|주민", r"[0-9]{6}-[0-9]{7}"),),
    "MX": (Identifier("mx.curp", r"[A-Z]{4}" + _SOLID_DATE + r"[HMX][A-Z]{5}[0-9A-Z][0-9]", r"curp", r".*"),),
    "NL": (
        Identifier(
            "nl.bsn",
            r"[0-9]{4}[. ]?[0-9]{2}[. ]?[0-9]{3}|[0-9]{3}[. ]?[0-9]{3}[. ]?[0-9]{3}",
            r"bsn|burgerservice\w*|sofi\w*|citizen service",
        ),
    ),
    "NO": (
        Identifier(
            "no.fodselsnummer",
            r"[0-7][0-9][0-9]{4} ?[0-9]{5}",
            r"fødselsnummer|fodselsnummer|fnr|personnummer|d-nummer",
        ),
    ),
    "PL": (Identifier("pl.pesel", r"[0-9]{11}", r"pesel"),),
    "SE": (
        Identifier(
            "se.personnummer",
            r"(?:19|20)?[0-9]{2}[01][0-9][0-9]{2}[-+ ]?[0-9]{4}",
            r"personnummer|pnr|personal identity|samordningsnummer",
            r"(?:19|20)?[0-9]{6}[-+][0-9]{4}",
        ),
    ),
    "TR": (Identifier("tr.tckimlik", r"[1-9][0-9]{10}", r"t\.?c\.?|kimlik\w*|tckn"),),
    "US": (
        Identifier("us.ssn", r"[0-9]{3}[- ]?[0-9]{2}[- ]?[0-9]{4}", r"ssn|social security|social|ss", r"[0-9]{3}-[0-9]{2}-[0-9]{4}"),
        Identifier("us.itin", r"9[0-9]{2}[- ]?[0-9]{2}[- ]?[0-9]{4}", r"itin|taxpayer|tin|tax id", r"[0-9]{3}-[0-9]{2}-[0-9]{4}"),
    ),
    "ZA": (Identifier("za.idnr", _SOLID_DATE + r" ?[0-9]{4} ?[0-9]{3}", r"id|identity|south african"),),
}


_BEFORE, _BEHIND = r"(?<![\w.,/$€£#-])(?:", r")(?!\w|[-./,][0-9])"


@cache
def _any(countries: tuple[str, ...]) -> re.Pattern:
    """What is an id of none of the countries is not tried with each."""
    return re.compile(_BEFORE + "|".join(one.pattern for country in countries for one in NATIONAL_IDS[country]) + _BEHIND)


@cache
def _compiled(country: str) -> tuple[tuple[re.Pattern, re.Pattern, re.Pattern | None, str], ...]:
    return tuple(
        (
            re.compile(_BEFORE + one.pattern + _BEHIND),
            # A placeholder, `<NATIONAL_ID>`, announces nothing.
            re.compile(rf"(?i)(?<![\w<])(?:{one.words})(?![\w>])"),
            re.compile(one.alone) if one.alone else None,
            one.check,
        )
        for one in NATIONAL_IDS[country]
    )


def overlapping(pattern: re.Pattern, text: str, start: int, stop: int) -> Iterator[re.Match]:
    """All matches, also those that begin inside another: a number that is none must not hide the next."""
    while match := pattern.search(text, start, stop):
        yield match
        start = match.start() + 1


# The end of a sentence, and not of `no.`.
_SENTENCE = re.compile(r"(?i)(?<=[\w.)>\]])(?<!\bn[or])(?<!\bn[uú]m)[.;] ")


def announced(words: re.Pattern, text: str, start: int, near: int) -> bool:
    """Whether one of the words stands in the `near` characters before `start`, in its line and sentence. (A short one may be cut: `Tel. `)"""
    line = text[max(0, start - near) : start].rpartition("\n")[2]
    return any(not _SENTENCE.search(line, word.end() + (len(word[0]) < 5)) for word in words.finditer(line))


@cache
def _check(module: str):
    return importlib.import_module(f"stdnum.{module}").is_valid


def national_ids(text: str, start: int, stop: int, countries: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """National ids in `text[start:stop]`, which holds a run of digits and what may belong to it on both sides."""
    if not _any(countries).search(text, start, stop):
        return
    for country in countries:
        for pattern, words, alone, check in _compiled(country):
            for match in overlapping(pattern, text, start, stop):
                number = match[0]
                if check and not _check(check)(number):
                    continue
                if (alone and alone.fullmatch(number)) or (
                    announced(words, text, match.start(), NEAR) or words.search(text[match.end() : match.end() + AFTER].partition("\n")[0])
                ):
                    yield match.span()


_CARD = re.compile(
    r"(?<![\w.-])(?<![0-9],)(?<![A-Z]{2}[0-9]{2} )(?:[0-9]{12,14}|[0-9]{4}([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?P<rest>\1[0-9]{1,3})?"
    r"|3[0-9]{3}([ -]?)[0-9]{6}\3[0-9]{4,5})(?![\w]|[-.,][0-9])"
)
# What issuers' numbers begin with, and how long they are.
_ISSUER = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?|(?:5[1-5]|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720|220[0-4])[0-9]+(?<=^[0-9]{16})"
    r"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}"
    r"|(?:6011|64[4-9]|65|62|35(?:2[89]|[3-8][0-9]))[0-9]+(?<=^[0-9]{16})|62[0-9]{15,17}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]+(?<=^[0-9]{16})"
)
# What says that a number is something else.
OTHER = re.compile(
    r"(?i)(?<!\w)(?:isbn|issn|ean|gtin|upc|imei|sku|doi|barcode|tracking|order|invoice|serial|shipment|parcel|ticket|part|usd|eur|gbp|isin)"
    r"(?:\s?(?:no|nr|number|code|id))?[\s.:#(]{0,4}\Z"
)


_CARD_WORDS = re.compile(
    r"(?i)(?<![<\w])(?:(?:credit|debit)?[ _-]?(?<!id )cards?|visa|master ?card|amex|american express|maestro|discover|diners|jcb|kreditkarte"
    r"|karte|carte|tarjeta|carta|cartão)(?![\w>])"
)


def cards(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Credit and debit card numbers in `text[start:stop]`: Luhn's check, and an issuer's prefix and length as they are today or a word."""
    from stdnum import luhn

    for match in overlapping(_CARD, text, start, stop):
        number = match[0]
        if not luhn.is_valid(_solid(number)) and match["rest"]:
            number = number[: -len(match["rest"])]
        digits = _solid(number)
        if not luhn.is_valid(digits) or OTHER.search(text, max(0, match.start() - 30), match.start()):
            continue
        issued = _ISSUER.fullmatch(digits) and (len(digits) != 14 or number != digits)  # 14 in a row are as often a time or an EAN
        if issued or announced(_CARD_WORDS, text, match.start(), NEAR):
            yield match.start(), match.start() + len(number)


def _solid(number: str) -> str:
    return number.replace(" ", "").replace("-", "")


_IBAN = re.compile(r"(?<![\w-])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}(?![A-Za-z0-9])")


def ibans(text: str, start: int) -> Iterator[tuple[int, int]]:
    """An IBAN that begins at `start`: the longest reading of it, cut at gaps, whose check digits and country's structure are right."""
    from stdnum import iban

    match = _IBAN.match(text, start)
    number = match[0] if match else ""
    while len(number) >= 15:
        if iban.is_valid(number):
            yield start, start + len(number)
            return
        gap = max(number.rfind(" "), number.rfind("-"))
        number = number[:gap] if gap > 0 else ""
