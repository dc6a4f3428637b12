"""Keys and tokens in text and code: the formats that issuers publish, private key blocks, passwords in URLs, and assignments of what is
too random to be a word.

All but passwords and key blocks are unbroken runs of 16 characters or more, which prose hardly has: only those are looked at.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

_EDGE = r"(?<![A-Za-z0-9_])"
_END = r"(?![A-Za-z0-9])"
_MARGIN = 24  # characters before a run in which a key may begin: `https://hooks.slack.com/`

ISSUED = {
    "aws": rf"{_EDGE}(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{{16}}{_END}",
    "github": rf"{_EDGE}gh[pousr]_[A-Za-z0-9]{{36,251}}{_END}",
    "github_fine": rf"{_EDGE}github_pat_[A-Za-z0-9]{{22}}_[A-Za-z0-9]{{59}}{_END}",
    "gitlab": rf"{_EDGE}glpat-[A-Za-z0-9_-]{{20,}}",
    "slack": rf"{_EDGE}(?:xox[abprs]|xapp)-[A-Za-z0-9-]{{10,}}",
    "slack_hook": r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9/_]{20,}",
    "google": rf"{_EDGE}(?:AIza[A-Za-z0-9_-]{{35}}|GOCSPX-[A-Za-z0-9_-]{{28}}){_END}",
    "google_oauth": rf"{_EDGE}ya29\.[A-Za-z0-9_-]{{20,}}",
    "stripe": rf"{_EDGE}(?:[rs]k_(?:live|test)_[A-Za-z0-9]{{16,}}|whsec_[A-Za-z0-9+/=]{{24,}})",  # pk_ keys are public
    "jwt": rf"{_EDGE}eyJ[A-Za-z0-9_-]{{10,}}\.eyJ[A-Za-z0-9_-]{{10,}}\.[A-Za-z0-9_-]{{10,}}",
    "openai": rf"{_EDGE}(?<!-)sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{{32,}}",  # Anthropic's too
    "hugging_face": rf"{_EDGE}hf_[A-Za-z]{{30,40}}{_END}",
    "npm": rf"{_EDGE}npm_[A-Za-z0-9]{{36}}{_END}",
    "pypi": rf"{_EDGE}pypi-AgE[A-Za-z0-9_-]{{50,}}",
    "sendgrid": rf"{_EDGE}SG\.[A-Za-z0-9_-]{{22}}\.[A-Za-z0-9_-]{{43}}{_END}",
}
_ISSUED = re.compile("|".join(ISSUED.values()))
_BEGINS = re.compile(
    r"A[KSBC][IC]A|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|xapp-|https://hooks|AIza|GOCSPX-|ya29\.|[rs]k_(?:live|test)_|whsec_|eyJ|sk-|hf_"
    r"|npm_|pypi-|SG\."
)

# Of a block that was cut off, all that still looks like one.
_BLOCK = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]{0,20000}-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|(?:(?:\\n|\s)+[A-Za-z0-9+/=]{16,})*)"
)
_PASSWORD = re.compile(r"://[^\s:/@\"'<>]{1,64}:([^\s/@\"'<>]{3,64})@[\w.-]")
_TEMPLATE = re.compile(r"[$%{<*[]|(?i:(?:pass(?:word|wd)?|secret|x+|\.+)\Z)")  # a hole to fill, not a password

_NAMED = re.compile(r"(?i)(?<!<)(?:key|token|secret|passw|pwd|credential|auth|bearer)")
_VALUE = re.compile(
    r"[\w.-]{0,40}[\"'\]]{0,2}[ \t]{0,4}(?P<sign>[:=]>?|:=|[ \t])[ \t]{0,4}(?:Bearer |Basic )?(?P<quote>[\"'`]?)"
    r"(?P<value>[A-Za-z0-9+/_-]{16,512}={0,2})(?![=(])"
)
_PUBLIC = re.compile(r"(?i)(?:public|integrity|checksum|digest|commit)[\w-]{0,10}\Z")  # `public_key` is no secret
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_HEX = re.compile("[0-9a-f]{32,}|[0-9A-F]{32,}")
_DIGIT, _LETTER = re.compile("[0-9]"), re.compile("[A-Za-z]")

_RUN = bytes(ord("1") if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "+/_=-") else ord("0") for byte in range(256))


def random_looking(value: str, bits: float = 3.0) -> bool:
    """Whether a value is too random for a name, a path or a date: at least `bits` of Shannon entropy a character, and either 32 hexadecimal
    digits or words and numbers shorter than 3.4 characters on average (`keyboard_handler_2` has three of 5.3; base64 comes to 2)."""
    digits = len(_DIGIT.findall(value))
    if not digits or not _LETTER.search(value) or (digits == 1 and value in (value.lower(), value.upper())):  # `pkcs8_key_info`
        return False
    if not _HEX.fullmatch(value) and sum(map(len, pieces := _PIECE.findall(value))) >= 3.4 * len(pieces):
        return False
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) >= bits


def secrets(text: str) -> Iterator[tuple[int, int]]:
    """Where keys and tokens stand. May overlap."""
    at = text.find("://")
    while at >= 0:
        if (match := _PASSWORD.match(text, at)) and not _TEMPLATE.match(match[1]):
            yield match.span(1)
        at = text.find("://", at + 3)
    at = text.find("-----BEGIN ")
    while at >= 0:
        if match := _BLOCK.match(text, at):
            yield match.span()
        at = text.find("-----BEGIN ", at + 1)
    for start, stop in runs(text):
        begin = max(0, start - _MARGIN)
        for hit in _BEGINS.finditer(text, begin, stop):
            if match := _ISSUED.match(text, hit.start()):
                yield match.span()
        if _DIGIT.search(text, start, stop):
            yield from _assigned(text, max(0, start - 64), stop)


def runs(text: str) -> Iterator[tuple[int, int]]:
    """Unbroken runs of 16 or more letters, digits and signs of base64. (A search for a fixed string of bytes is several times a regex's speed.)"""
    shape = text.encode("latin-1", "replace").translate(_RUN)
    start = shape.find(b"1111111111111111")
    while start >= 0:
        stop = shape.find(b"0", start)
        stop = len(shape) if stop < 0 else stop
        yield start, stop
        start = shape.find(b"1111111111111111", stop)


def _assigned(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for name in _NAMED.finditer(text, start, stop):
        match = _VALUE.match(text, name.end())
        if not match or _PUBLIC.search(text[max(0, name.start() - 20) : name.start()]):
            continue
        # With neither a quote nor a sign of assignment it is prose: then only what is random beyond doubt.
        if random_looking(match["value"], 3.0 if match["quote"] or match["sign"].strip() else 3.8):
            yield match.span("value")
