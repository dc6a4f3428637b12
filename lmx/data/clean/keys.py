"""Keys and tokens in text and code: the formats that issuers publish, private key blocks, passwords in URLs, and assignments of what is
too random to be a word.

Each format has a literal that stands in every one of its keys. Searching for literals costs next to nothing; a regex is only tried where
one was found.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

_EDGE = r"(?<![A-Za-z0-9_])"
_END = r"(?![A-Za-z0-9])"

# (literals, the key around one of them, how many characters before the literal it may begin)
FORMATS: tuple[tuple[tuple[str, ...], re.Pattern, int], ...] = tuple(
    (literals, re.compile(pattern), before)
    for literals, pattern, before in (
        (("AKIA", "ASIA", "ABIA", "ACCA"), rf"{_EDGE}A[KSBC][IC]A[A-Z2-7]{{16}}{_END}", 0),  # AWS access key ids
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), rf"{_EDGE}gh[pousr]_[A-Za-z0-9]{{36,251}}{_END}", 0),
        (("github_pat_",), rf"{_EDGE}github_pat_[A-Za-z0-9]{{22}}_[A-Za-z0-9]{{59}}{_END}", 0),
        (("glpat-",), rf"{_EDGE}glpat-[A-Za-z0-9_-]{{20,}}", 0),
        (("xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-", "xapp-"), rf"{_EDGE}(?:xox[abprs]|xapp)-[A-Za-z0-9-]{{10,}}", 0),
        (("hooks.slack.com/",), r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/_]{20,}", 8),
        (("AIza",), rf"{_EDGE}AIza[A-Za-z0-9_-]{{35}}{_END}", 0),  # Google: API keys, OAuth tokens and secrets
        (("ya29.",), rf"{_EDGE}ya29\.[A-Za-z0-9_-]{{20,}}", 0),
        (("GOCSPX-",), rf"{_EDGE}GOCSPX-[A-Za-z0-9_-]{{28}}{_END}", 0),
        (("k_live_", "k_test_"), rf"{_EDGE}[rs]k_(?:live|test)_[A-Za-z0-9]{{16,}}", 1),  # Stripe; its pk_ keys are public
        (("whsec_",), rf"{_EDGE}whsec_[A-Za-z0-9+/=]{{24,}}", 0),
        (("eyJ",), rf"{_EDGE}eyJ[A-Za-z0-9_-]{{10,}}\.eyJ[A-Za-z0-9_-]{{10,}}\.[A-Za-z0-9_-]{{10,}}", 0),  # JSON web tokens
        (("sk-",), rf"{_EDGE}(?<!-)sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{{32,}}", 0),  # OpenAI, Anthropic
        (("hf_",), rf"{_EDGE}hf_[A-Za-z]{{30,40}}{_END}", 0),
        (("npm_",), rf"{_EDGE}npm_[A-Za-z0-9]{{36}}{_END}", 0),
        (("pypi-AgE",), rf"{_EDGE}pypi-AgE[A-Za-z0-9_-]{{50,}}", 0),
        (("SG.",), rf"{_EDGE}SG\.[A-Za-z0-9_-]{{22}}\.[A-Za-z0-9_-]{{43}}{_END}", 0),  # SendGrid
        (
            ("-----BEGIN ",),
            # To its end; of a block that was cut off, all that still looks like one.
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:[^-]{0,20000}-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|(?:(?:\\n|\s)+[A-Za-z0-9+/=]{16,})*)",
            0,
        ),
    )
)

_PASSWORD = re.compile(r"://[^\s:/@\"'<>]{1,64}:([^\s/@\"'<>]{3,64})@[\w.-]")
_FILLED_IN = re.compile(r"[$%{<*[]|(?i:pass(?:word)?\b|secret\b|x{3,}|\.{3})")  # a template's hole, not a password

# What a variable that holds a secret is called.
WORDS = ("key", "token", "secret", "passw", "pwd", "credential", "auth", "bearer")
_VALUE = re.compile(r"[\w.-]{0,40}[\"'\]]{0,2}[ \t]{0,4}(?:[:=]>?|:=|[ \t])[ \t]{0,4}(?:Bearer |Basic )?(?P<quote>[\"'`]?)(?P<value>[A-Za-z0-9+/_=.~-]{16,512})")
_PUBLIC = re.compile(r"(?:public|integrity|checksum|digest|commit)[\w-]{0,10}$")  # `public_key` is no secret
_WORDLIKE = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}")


def random_looking(value: str, bits: float = 3.0) -> bool:
    """Whether a value is too random for a name, a path or a sentence: at least `bits` of Shannon entropy a character, digits and letters
    mixed, and less than half of it in runs of letters as words have them."""
    digits = sum(map(value.count, "0123456789"))
    if not digits or digits == len(value):
        return False
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    if entropy < bits:
        return False
    words = sum(len(word) for word in _WORDLIKE.findall(value) if len(word) > 3)
    return words < len(value) / 2


def secrets(text: str) -> Iterator[tuple[int, int]]:
    """Where keys and tokens stand. May overlap."""
    for literals, pattern, before in FORMATS:
        for literal in literals:
            at = text.find(literal)
            while at >= 0:
                if match := pattern.match(text, max(0, at - before)):
                    yield match.span()
                at = text.find(literal, at + len(literal))
    at = text.find("://")
    while at >= 0:
        if (match := _PASSWORD.match(text, at)) and not _FILLED_IN.match(match[1]):
            yield match.span(1)
        at = text.find("://", at + 3)
    yield from _assignments(text)


def _assignments(text: str) -> Iterator[tuple[int, int]]:
    lower = text.replace("\u0130", "I").lower()  # the one letter whose lower case is longer
    for word in WORDS:
        at = lower.find(word)
        while at >= 0:
            match = _VALUE.match(text, at + len(word))
            if match and not _PUBLIC.search(lower, max(0, at - 20), at) and text[at - 1 : at] != "<":
                value = match["value"].rstrip(".")
                # Without quotes or a sign of assignment it is prose or a path: then only what is random beyond doubt.
                plain = not match["quote"] and not any(sign in match[0][: match.start("value") - match.start()] for sign in "=:")
                if random_looking(value, 3.8 if plain else 3.0):
                    yield match.start("value"), match.start("value") + len(value)
            at = lower.find(word, at + len(word))
