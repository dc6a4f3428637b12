"""Random personal data as people write it, and what it is written in: the material of `make_private.py`."""

import base64
import ipaddress
import random
import re
import string
import textwrap
from functools import cache
from importlib import import_module

import phonenumbers
from phonenumbers import PhoneNumberFormat, PhoneNumberType
from stdnum import iban as stdnum_iban
from stdnum import luhn

HEX, ALNUM = "0123456789abcdef", string.ascii_letters + string.digits


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    "anna ben chloé david emma félix grace henrik iris josé kim liam maría noor olga pablo quinn rosa søren tom ulla viktor wei yara zoë"
)
LAST = _words(
    "smith müller garcía rossi dubois jansen nowak o'brien kowalska silva tanaka patel kim hansen virtanen novák ivanova yilmaz li brown"
)
HOSTS = _words(
    "gmail.com yahoo.co.uk hotmail.fr web.de orange.fr outlook.com proton.me mail.ru qq.com uol.com.br example.com cs.stanford.edu ox.ac.uk "
    "uni-heidelberg.de nhs.uk bigpond.net.au acme-corp.io studio.photography museum.paris stadt.koeln müller-bau.de list.apache.org a1b2.info"
)


def chars(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def grouped(digits: str, sizes: tuple[int, ...], gap: str) -> str:
    """Digits in groups of these sizes, what is left over in a last one."""
    parts, at = [], 0
    for size in (*sizes, len(digits)):
        parts.append(digits[at : at + size])
        at += size
    return gap.join(part for part in parts if part)


# --- values


def email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    if rng.random() < 0.8:
        first, last = (word.encode("ascii", "ignore").decode() for word in (first, last))
    local = rng.choice(
        (
            f"{first}.{last}",
            f"{first[0]}.{last}",
            f"{first}_{last}",
            f"{first}{rng.randint(1, 1999)}",
            f"{last}-{first}",
            f"{first}+news",
            f"{first.upper()}.{last.title()}",
            f"info.{last}",
            f"{last}",
            f"x{rng.randint(100, 99999)}",
        )
    )
    return f"{local}@{rng.choice(HOSTS)}"


INTERNATIONAL = _words(
    "US GB DE FR ES IT NL IN AU BR JP CN KR SE NO DK FI PL CZ AT CH BE PT IE GR TR RU UA ZA NG KE EG IL AE SG HK NZ MX AR CL CO"
)
NATIONAL = _words("US GB DE FR ES IT NL IN AU BR JP")
LABELS = {
    "US": ("Phone: ", "call ", "tel. ", "cell ", "Fax: ", "(office phone) ", "text me at "),
    "GB": ("Tel: ", "phone ", "mob: ", "ring ", "Telephone "),
    "DE": ("Tel.: ", "Telefon ", "Handy: ", "Fax ", "Mobil "),
    "FR": ("Tél. : ", "Tél ", "téléphone ", "portable : ", "Fax : "),
    "ES": ("Tel. ", "Teléfono: ", "móvil ", "llama al "),
    "IT": ("Tel. ", "telefono ", "cellulare: ", "Fax "),
    "NL": ("Tel. ", "telefoon ", "mobiel: ", "bel "),
    "IN": ("Mob: ", "Phone ", "WhatsApp ", "call "),
    "AU": ("Phone: ", "Mobile ", "call ", "Ph: "),
    "BR": ("Tel.: ", "celular ", "WhatsApp: ", "Telefone "),
    "JP": ("TEL ", "電話: ", "Tel: ", "携帯 "),
}
NO_LABEL = ("You can get hold of me on ", "The front desk answers under ", "please leave a message - ", "Ask for Sam, ", "Zentrale ", "| ")


@cache
def _example(region: str, kind: int) -> str:
    example = phonenumbers.example_number_for_type(region, kind)
    return phonenumbers.national_significant_number(example)


def _phone_number(rng: random.Random, region: str) -> phonenumbers.PhoneNumber:
    """A valid number that keeps only the area code of the library's example."""
    kind = rng.choice((PhoneNumberType.FIXED_LINE, PhoneNumberType.MOBILE))
    example = _example(region, kind)
    while True:
        keep = rng.randint(2, 4)
        national = example[:keep] + chars(rng, string.digits, len(example) - keep)
        number = phonenumbers.parse(f"+{phonenumbers.country_code_for_region(region)}{national}", None)
        if phonenumbers.is_valid_number_for_region(number, region):
            return number


def phone(rng: random.Random) -> tuple[str, str]:
    """A number and what stands before it."""
    if rng.random() < 0.08:
        number = f"{rng.randint(201, 989)}", f"{rng.randint(200, 999)}", chars(rng, string.digits, 4)
        while not phonenumbers.is_valid_number(phonenumbers.parse("+1" + "".join(number), None)):
            number = f"{rng.randint(201, 989)}", f"{rng.randint(200, 999)}", chars(rng, string.digits, 4)
        form = rng.choice(
            ("({}) {}-{}", "({}){}-{}", "{}-{}-{}", "{}.{}.{}", "1-{}-{}-{}", "+1 ({}) {}-{}", "+1-{}-{}-{}", "+1.{}{}{}", "+1 {} {} {}")
        )
        return rng.choice(("", "Dr. Lee ", "reception: ", "contact me on ")), form.format(*number) + rng.choice(
            ("", "", f"x{rng.randint(1, 999)}", f" ext. {rng.randint(10, 9999)}")
        )
    if rng.random() < 0.5:
        region = rng.choice(INTERNATIONAL)
        number = _phone_number(rng, region)
        written = phonenumbers.format_number(number, PhoneNumberFormat.INTERNATIONAL)
        style = rng.randrange(6)
        if style == 0:
            written = phonenumbers.format_number(number, PhoneNumberFormat.E164)
        elif style == 1:
            written = phonenumbers.format_number(number, PhoneNumberFormat.RFC3966).removeprefix("tel:")
        elif style == 2:
            written = "00" + written[1:]
        elif style == 3:
            written = written.replace(" ", rng.choice((".", "-", "\u00a0")))
        elif style == 4 and region in ("GB", "DE", "AT", "SE", "NL"):
            code, rest = written.split(" ", 1)
            written = f"{code} (0){rng.choice(('', ' '))}{rest}"
        elif style == 5:
            code, rest = written.split(" ", 1)
            written = f"({code}) {rest}"
        return rng.choice((*NO_LABEL, "Tel. ", "phone:", "WhatsApp ", "Fax ", 'href="tel:', "contact: ")), written
    region = rng.choice(NATIONAL)
    written = phonenumbers.format_number(_phone_number(rng, region), PhoneNumberFormat.NATIONAL)
    labelled = rng.random() < 0.8
    style = rng.randrange(5)
    if style == 0 and labelled:
        written = "".join(filter(str.isdigit, written))
    elif style == 1 and region in ("US", "GB", "IN", "ES", "FR") and labelled:
        written = written.replace(" ", "-") if "(" not in written else written
    elif style == 2 and region in ("US", "FR", "IT"):
        written = written.replace("(", "").replace(") ", ".").replace("-", ".").replace(" ", ".")
    elif style == 3 and region in ("DE", "NL", "IT") and " " in written:
        written = written.replace(" ", rng.choice(("/", "-", " / ")), 1)
    elif style == 4 and region == "US":
        written = written.replace("(", "").replace(") ", "-")
    elif not labelled and region in ("ES", "IN", "IT") and written[0] != "0":
        labelled = True  # nobody could say that it is a phone number
    return rng.choice(LABELS[region] if labelled else NO_LABEL), written


def ip(rng: random.Random) -> str:
    while True:
        if rng.random() < 0.65:
            address = ipaddress.ip_address(rng.getrandbits(32))
        else:
            head = rng.choice((0x2001_0470, 0x2606_4700, 0x2A00_1450, 0x2404_6800, 0x2800_03F0, 0x2620_0FE0)) << 96
            tail = rng.choice((rng.getrandbits(96), rng.getrandbits(32) << 64 | rng.getrandbits(16), rng.getrandbits(64)))
            address = ipaddress.ip_address(head | tail)
        if address.is_global and not address.is_multicast:
            written = str(address)
            return rng.choice((written, written, address.exploded.upper() if address.version == 6 else written))


CARDS = [
    (p, 16)
    for p in ("4", "4", "4", "51", "52", "53", "54", "55", "2221", "2500", "2720", "6011", "65", "644", "3528", "3566", "6221", "2200")
] + [("34", 15), ("37", 15), ("300", 14), ("36", 14), ("38", 14), ("62", 19), ("4", 19)]


def credit_card(rng: random.Random) -> str:
    prefix, length = rng.choice(CARDS)
    body = prefix + chars(rng, string.digits, length - 1 - len(prefix))
    digits = body + luhn.calc_check_digit(body)
    gap = rng.choice((" ", "-", "", " "))
    return (
        grouped(digits, (4, 6) if length in (14, 15) else (4, 4, 4, 4), gap)
        if gap
        else digits
        if length != 14
        else grouped(digits, (4, 6), " ")
    )


BBAN = {"n": string.digits, "a": string.ascii_uppercase, "c": string.ascii_uppercase + string.digits}
IBAN_COUNTRIES = _words("DE FR GB IT NL CH AT PL PT SE DK FI IE LU CZ GR TR SA AE BR MT LV RO HU IL MC UA GE")


def iban(rng: random.Random) -> str:
    country = rng.choice(IBAN_COUNTRIES)
    structure = stdnum_iban._ibandb.info(country)[0][1]["bban"]
    while True:
        bban = "".join(chars(rng, BBAN[kind], int(size)) for size, kind in re.findall(r"(\d+)!?([nac])", structure))
        number = country + stdnum_iban.calc_check_digits(country + "00" + bban) + bban
        if stdnum_iban.is_valid(number):
            return rng.choice(
                (number, grouped(number, (4,) * 8, " "), grouped(number, (4,) * 8, " "), grouped(number, (4,) * 8, "-"), number.lower())
            )


def _valid(rng: random.Random, module: str, pattern: str) -> str:
    """A number that python-stdnum takes. In the pattern # is any digit, @ any letter, % a date yymmdd, & one as ddmmyy, ? what makes it right."""
    is_valid = import_module(f"stdnum.{module}").is_valid
    checks = string.digits + ("" if "??" in pattern else string.ascii_uppercase)
    while True:
        year, month, day = rng.randint(40, 99), rng.randint(1, 12), rng.randint(1, 28)
        base = pattern.replace("%", f"{year:02}{month:02}{day:02}").replace("&", f"{day:02}{month:02}{year:02}")
        base = re.sub("[#@]", lambda hole: rng.choice(string.digits if hole[0] == "#" else string.ascii_uppercase), base)
        tries = [base]
        for _ in range(pattern.count("?")):
            tries = [number.replace("?", check, 1) for number in tries for check in checks]
        if right := [number for number in tries if is_valid(number)]:
            return rng.choice(right)


# Module of python-stdnum, number, groups and what is between them, what stands before it.
IDS = (
    ("us.ssn", "#########", ((3, 2), "-"), ("SSN: ", "social security number ", "on my tax form: ", "")),
    ("us.ssn", "#########", None, ("SSN ", "Social Security no. ")),
    ("gb.nhs", "#########?", ((3, 3), " "), ("NHS number: ", "NHS no ")),
    ("de.idnr", "##########?", ((2, 3, 3), " "), ("Steuer-ID: ", "Steueridentifikationsnummer ", "IdNr. ")),
    ("fr.nir", "1840775######??", ((1, 2, 2, 2, 3, 3), " "), ("N° sécurité sociale : ", "NIR ", "")),
    ("fr.nir", "2910333######??", None, ("numéro INSEE ", "Sécu : ")),
    ("es.dni", "########?", None, ("DNI ", "con DNI núm. ", "N.I.F.: ", "don Pablo, ")),
    ("es.nie", "X#######?", ((1, 7), "-"), ("NIE: ", "extranjero con ", "")),
    ("nl.bsn", "########?", None, ("BSN: ", "burgerservicenummer ")),
    ("be.nn", "%###??", ((2, "."), (2, "."), (2, "-"), (3, ".")), ("Rijksregisternummer ", "N° registre national: ", "")),
    ("se.personnummer", "%-###?", None, ("Personnummer: ", "pnr ", "")),
    ("fi.hetu", "&-###?", None, ("henkilötunnus ", "HETU: ", "")),
    ("dk.cpr", "&####", ((6,), "-"), ("CPR-nr. ", "CPR: ", "")),
    ("no.fodselsnummer", "&###??", ((6,), " "), ("fødselsnummer ", "Fnr: ")),
    ("pl.pesel", "%####?", None, ("PESEL ", "nr PESEL: ")),
    ("br.cpf", "#########??", ((3, "."), (3, "."), (3, "-")), ("CPF: ", "inscrito no CPF sob o nº ", "")),
    ("ca.sin", "########?", ((3, 3), "-"), ("SIN: ", "Social Insurance Number ")),
    ("in_.aadhaar", "###########?", ((4, 4), " "), ("Aadhaar: ", "Aadhaar No. ", "UIDAI ")),
    ("in_.pan", "@@@P@####@", None, ("PAN: ", "Permanent Account Number ", "")),
    ("cn.ric", "11010519%###?", None, ("身份证号码:", "ID card ", "")),
    ("kr.rrn", "%1#####?", ((6,), "-"), ("주민등록번호 ", "RRN: ", "")),
    ("au.tfn", "########?", ((3, 3), " "), ("TFN: ", "Tax File Number ")),
    ("za.idnr", "%####08?", None, ("ID number: ", "SA ID ")),
    ("cl.rut", "17######?", ((2, "."), (3, "."), (3, "-")), ("RUT: ", "cédula ", "")),
    ("ch.ssn", "756#########?", ((3, "."), (4, "."), (4, ".")), ("AHV-Nr. ", "N° AVS ", "")),
    ("cz.rc", "%###?", ((6,), "/"), ("rodné číslo ", "r.č. ", "")),
    ("tr.tckimlik", "#########??", None, ("T.C. Kimlik No: ", "TCKN ")),
    ("it.codicefiscale", "@@@@@@85M10H501?", None, ("Codice fiscale: ", "C.F. ", "")),
    ("mx.curp", "@A@@%HDFRRN0?", None, ("CURP: ", "")),
)


def national_id(rng: random.Random) -> tuple[str, str]:
    """A number and what stands before it."""
    if rng.random() < 0.05:
        gap = rng.choice((" ", ""))
        letters = rng.choice("ABCEGHJKLMNPRSTWXYZ") + rng.choice("ABCEGHJKLMPRSTWXYZ")
        if letters not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"):
            return rng.choice(("National Insurance number ", "NINO: ", "")), gap.join(
                (letters, *(chars(rng, string.digits, 2) for _ in "123"), rng.choice("ABCD"))
            )
    module, pattern, written, before = rng.choice(IDS)
    number = _valid(rng, module, pattern)
    if written and isinstance(written[1], str):
        number = grouped(number, *written)
    elif written:
        for size, gap in written:
            at = max(number.rfind(sign) for sign in ".-") + 1 + size
            number = number[:at] + gap + number[at:]
    return rng.choice(before), number


def _segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def secret(rng: random.Random) -> tuple[str, str, str]:
    """A key, what stands before it and what after it."""
    base = ALNUM + "-_"
    quote = rng.choice("\"'")
    hexadecimal = chars(rng, HEX, rng.choice((32, 40, 64)))
    random_64 = base64.b64encode(rng.randbytes(rng.choice((24, 30, 48)))).decode()
    aws, token = "AKIA" + chars(rng, string.ascii_uppercase + "234567", 16), chars(rng, ALNUM, 36)
    jwt = ".".join(
        (
            _segment(b'{"alg":"HS256","typ":"JWT"}'),
            _segment(b'{"sub":"%d","admin":true}' % rng.getrandbits(40)),
            _segment(rng.randbytes(32)),
        )
    )
    kind = rng.choice(("RSA ", "", "EC ", "OPENSSH "))
    body = "\n".join(textwrap.wrap(base64.b64encode(rng.randbytes(rng.randint(200, 800))).decode(), 64))
    pem = f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"
    issued = rng.choice(
        (
            aws,
            "gh" + rng.choice("pousr") + "_" + token,
            "github_pat_" + chars(rng, ALNUM, 22) + "_" + chars(rng, ALNUM, 59),
            "glpat-" + chars(rng, ALNUM, 20),
            f"xox{rng.choice('bp')}-{rng.getrandbits(38)}-{rng.getrandbits(38)}-{chars(rng, ALNUM, 24)}",
            "AIza" + chars(rng, base, 34) + rng.choice(ALNUM),
            rng.choice("sr") + "k_" + rng.choice(("live", "test")) + "_" + chars(rng, ALNUM, 24),
            jwt,
            "sk-proj-" + chars(rng, ALNUM, 48),
            "npm_" + token,
            "SG." + chars(rng, ALNUM, 22) + "." + chars(rng, ALNUM, 43),
        )
    )
    around = rng.choice(
        (
            (f"client = Client({quote}", f"{quote})"),
            ("export API_TOKEN=", "\n"),
            ("    - ", "\n"),
            ("I pasted ", " into the chat, is that bad?"),
            ("Authorization: Bearer ", "\r\n"),
            (f"key = {quote}", quote),
            ("curl -u ", ": https://api.shop.test/v1/charges"),
            ('{"auth": "', '"}'),
        )
    )
    name = rng.choice(
        (
            "SECRET_KEY",
            "aws_secret_access_key",
            "api_key",
            "apiKey",
            "DB_PASSWORD",
            "client_secret",
            "access_token",
            "auth_token",
            "password",
        )
    )
    sign = rng.choice((f" = {quote}", f"={quote}", f": {quote}"))
    assigned = rng.choice(
        (
            (name + sign, hexadecimal, quote),
            (name + sign, random_64, quote),
            (f"{name}=", hexadecimal, "\n"),
            (f'  "{name}": "', random_64, '",'),
        )
    )
    word = chars(rng, ALNUM, rng.randint(8, 16))
    url = rng.choice(("postgres://admin:", "https://deploy:", "mongodb+srv://root:", "redis://default:", "amqp://svc:"))
    return rng.choice(
        (
            (around[0], issued, around[1]),
            (around[0], issued, around[1]),
            (around[0], issued, around[1]),
            assigned,
            assigned,
            ("", pem, "\n"),
            (url, word, f"@{rng.choice(('db', 'cache'))}.internal.net:5432/main"),
        )
    )
