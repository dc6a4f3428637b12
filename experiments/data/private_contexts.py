"""What personal data is written in, and what only looks like it: the rest of the material of `make_private.py`."""

import base64
import random
import string
import uuid
from datetime import datetime, timedelta

from experiments.data.private_values import ALNUM, HEX, chars

# A value goes where {} is.
CONTEXTS = {
    "email": (
        "Contact: {}",
        "From: Anna Weiss <{}>\nTo: list",
        '<a href="mailto:{}">write to us</a>',
        "please mail {}.",
        "({})",
        'author_email="{}",',
        '{{"user": "{}", "active": true}}',
        "* Maintainer -- {}",
        "you can reach her at {}, or by post",
        "Email:{}",
        "42;{};active",
        "E-Mail: {}\nWeb: www.beispiel.de",
        "[{}](mailto:x)",
        "git commit --author='A <{}>'",
        "Mein neues Postfach: {}!",
        "invited {} and two others",
        "cc: {}; bob",
        "?email={}&lang=fr",
        "\t{}\n",
        "'{}'",
        "Reply-To: <{}>,",
        "{}?subject=Hello",
        "user:{}|role:admin",
        "http://list.test/{}/archive",
        "E-mail : {}",
    ),
    "phone": (
        "{}",
        "Opening hours 9-17. {}.",
        "Best regards,\nMaria Silva\nSales\n{}\n",
        "<td>{}</td>",
        "Questions? {} (Mo-Fr)",
        "12 High Street, 2nd floor\n{}",
        "* {}, ask for Jo",
        "{} or come by in person",
        "Booking: {} / www.hotel.test",
        "Our new office: {}\nWe moved in 2021.",
        '"phone": "{}",',
        "{}\nNumber 12, 3rd row",
        "[{}]",
        "{}; from 18.00",
    ),
    "ip": (
        '{} - - [10/Oct/2023:13:55:36 +0000] "GET /index.html HTTP/1.1" 200 2326',
        "ssh root@{}",
        "Failed password for invalid user admin from {} port 52344 ssh2",
        "ping {}",
        'host = "{}"',
        "the address {} is blocked.",
        "nameserver {}\n",
        '{{"client_ip": "{}"}}',
        "({})",
        "Received: from mx.test ([{}]) by mail",
        "--- {} ping statistics ---",
        "edit by {}, reverted",
        "allow from {};",
        "{}\n",
        "A record: {}, TTL 300",
    ),
    "credit_card": (
        "card {} exp 09/27",
        "Please charge my Visa {} for the room",
        "{}, CVV 123",
        "PAN={}&amount=12.00",
        "<number>{}</number>",
        '{{"card": "{}", "exp": "12/26"}}',
        "he read out {} over the phone",
        "Kreditkarte: {}\n",
        "1;{};Visa",
        "numéro de carte {} valable jusqu'au 01/28",
    ),
    "iban": (
        "IBAN: {}",
        "IBAN {}\nBIC COBADEFFXXX",
        "please transfer 300 EUR to {}.",
        "account no. {}, thank you",
        "Konto: {}",
        "Virement sur le compte {} avant le 3 mai",
        '{{"iban": "{}"}}',
        "{};120.50;EUR",
        "({})",
        "<IBAN>{}</IBAN>",
    ),
    "national_id": (
        "{}",
        "Name: Kim, {}.",
        "{}\nAddress: 12 Main St",
        "* {}, born in spring",
        "({})",
        "<td>{}</td>",
        '"{}"',
        "the form says {} and nothing else",
    ),
    "secret": ("{}",),
}

SENTENCES = (
    "The meeting moved to Thursday.",
    "Nothing else changed since then.",
    "It rained for most of the week.",
    "See the attached table for details.",
    "Wir melden uns nächste Woche.",
    "La réunion est reportée.",
    "def main(argv):\n    return run(argv)",
    "She had read all of it twice.",
    "Todo: ask the others first.",
    "Los resultados llegan mañana.",
    "The harbour was closed in winter.",
    "| a | b |\n|---|---|",
    "As always, thanks for your patience.",
)


def _isbn(rng: random.Random) -> str:
    body = "978" + rng.choice("0134") + chars(rng, string.digits, 8)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return rng.choice(
        (f"ISBN {body[:3]}-{body[3]}-{body[4:8]}-{body[8:]}-{check}", f"ISBN: {body}{check}", f"(ISBN {body[3]}-{body[4:7]}-{body[7:]}-X)")
    )


def _ean(rng: random.Random) -> str:
    body = rng.choice("4057") + chars(rng, string.digits, 11)
    return f"EAN {body}{-sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10}"


def _date(rng: random.Random) -> str:
    when = datetime(1950, 1, 1) + timedelta(seconds=rng.randrange(2_400_000_000))
    forms = (
        "%Y-%m-%d",
        "%d.%m.%Y",
        "%m/%d/%Y",
        "%Y-%m-%dT%H:%M:%SZ",
        "%d-%m-%Y %H:%M",
        "%Y%m%d%H%M%S",
        "%Y/%m/%d %H:%M:%S.%f",
        "%d %m %Y",
        "%Y.%m.%d-%H.%M",
    )
    return rng.choice(("on {}", "updated {}", "{} to be confirmed", "born {}")).format(when.strftime(rng.choice(forms)))


def _version(rng: random.Random) -> str:
    number = ".".join(str(rng.randint(0, 30)) for _ in range(4))
    forms = (
        "version {}",
        "v{}",
        "Chrome/{} Safari/537.36",
        "release {} fixes it",
        "pip install tool=={}",
        "tool-{}.tar.gz",
        "see section {}",
        "lib.so.{}",
        "firmware {}",
        "OID 1.3.6.1.4.{}",
        '"version": "{}"',
        "§ {}",
        "foo@1.{}",
        "versions 1.2.0.4 and {}",
    )
    return rng.choice(forms).format(number)


def _price(rng: random.Random) -> str:
    n = rng.randint(1, 999)
    return rng.choice(
        (
            f"${n},{rng.randint(100, 999)}.{rng.randint(10, 99)}",
            f"{n}.{rng.randint(100, 999)},{rng.randint(10, 99)} €",
            f"USD {n} {rng.randint(100, 999)} {rng.randint(100, 999)}",
            f"{n} 000 000 people",
            f"£{rng.randint(10**6, 10**9)}",
            f"¥{n},000,000",
        )
    )


def _hash(rng: random.Random) -> str:
    digest = chars(rng, HEX, rng.choice((7, 32, 40, 64)))
    return rng.choice(
        (
            f"commit {digest}",
            f"sha256:{digest}",
            f"{digest}  file.iso",
            f"at {digest} in the log",
            f'etag: "{digest}"',
            f"blob/{digest}/README.md",
            f"md5={digest}",
        )
    )


def _code(rng: random.Random) -> str:
    name = rng.choice(("token", "api_key", "password", "secret"))
    return rng.choice(
        (
            f'{name} = os.environ["{name.upper()}"]',
            f"{name} = get_{name}_from_settings(config)",
            f"{name}: str | None = None",
            f'{name}="YOUR_{name.upper()}_HERE"',
            f'{name} = "xxxxxxxxxxxxxxxxxxxxxxxx"',
            f"assert {name} != previous_{name}_value",
            f"self.{name} = kwargs.pop('{name}')",
            '<img src="icon@2x.png">',
            "@media (min-width: 400px)",
            "@app.route('/users/<int:id>')",
            "npm install react@18.2.0",
            "y = a@b.T + x@self.weight(3)",
            "thanks @maria and @tom_92!",
            "git@github.com:lib/tool.git",
            "std::vector<int>::iterator",
            "x[2000::5]",
            "https://user:$PASSWORD@host.test/",
            'integrity="sha512-' + base64.b64encode(rng.randbytes(64)).decode() + '"',
            'public_key = "' + base64.b64encode(rng.randbytes(32)).decode() + '"',
            "key: keyboard_interrupt_handler_2",
            "primary_key=customer_address_id",
            "tokenize the sentence_2_of_the_corpus",
            "author: university_of_california_2",
            "token_type_ids = 0000000000000000",
            '"key": "content/images/2020/header-photo-large"',
            f"mac 00:1B:44:{rng.randint(10, 99)}:3A:B7",
            "Tue 12:30:45:10",
        )
    )


def _local(rng: random.Random) -> str:
    return rng.choice(
        (
            "127.0.0.1:8080",
            f"192.168.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
            f"10.0.{rng.randint(0, 255)}.7/24",
            "::1",
            "fe80::1ff:fe23:4567:890a",
            "0.0.0.0",
            "255.255.255.0",
            "2001:db8::8a2e:370:7334",
            "169.254.10.1",
            f"256.{rng.randint(300, 999)}.1.1",
        )
    )


def _number(rng: random.Random) -> str:
    digits = lambda n: rng.choice("123456789") + chars(rng, string.digits, n - 1)  # noqa: E731
    return rng.choice(
        (
            f"order no. {digits(10)}",
            f"Order #{digits(8)}-{digits(4)}",
            f"invoice {digits(12)}",
            f"tracking 1Z{chars(rng, ALNUM.upper(), 16)}",
            f"tracking number {digits(16)}",
            f"ticket {digits(7)}",
            f"INV-2023-{digits(6)}",
            f"{rng.uniform(-90, 90):.6f}, {rng.uniform(-180, 180):.6f}",
            f"{rng.uniform(0, 1):.16f}",
            f"{rng.uniform(0, 9):.12e}",
            f"US patent {digits(1)},{digits(3)},{digits(3)} B2",
            f"arXiv:{rng.randint(1001, 2412)}.{digits(5)}",
            f"doi:10.{digits(4)}/s{digits(5)}-0{digits(2)}-{digits(5)}-{digits(1)}",
            f"{uuid.UUID(int=rng.getrandbits(128), version=4)}",
            f"pp. {digits(3)}-{digits(3)}, vol. {digits(2)}",
            f"1{digits(9)} seconds since the epoch",
            f"timestamp 1{digits(12)}",
            f"id 1{digits(18)}",
            f"({digits(4)}-{digits(4)})",
            f"{digits(3)} {digits(3)} inhabitants in 1990",
            f"{digits(2)} {digits(2)} {digits(2)} {digits(2)} {digits(2)} {digits(2)}",
            f"won 6-4 7-5 6-{rng.randint(0, 4)}",
            f"San Francisco, CA 94103-{digits(4)}",
            f"part {digits(3)}-{digits(4)}-{digits(2)}",
            f"grid 0x{chars(rng, HEX, 12)}",
            f"from 1939-1945 and 1950-{rng.randint(1951, 1999)}",
            f"000-{digits(2)}-{digits(4)}",
            f"666-{digits(2)}-{digits(4)}",
            f"lot {digits(6)}-{digits(3)}",
            f"population {digits(3)}.{digits(3)}.{digits(3)}",
            f"{digits(1)} {digits(4)} {digits(5)} {digits(3)}",
            f"serial {digits(9)}",
            f"{chars(rng, string.ascii_uppercase, 2)}{digits(6)}",
            f"model {chars(rng, string.ascii_uppercase, 3)}-{digits(4)}",
            f"account GB00 {digits(4)} {digits(4)} {digits(4)} {digits(4)}",
            f"ACCT {digits(11)}",
            f"{digits(15)} bytes",
            f"#{digits(10)}",
            f"1. {digits(4)}\n2. {digits(4)}\n3. {digits(4)}",
        )
    )


_DRAWS = (_isbn, _ean, _date, _version, _price, _hash, _code, _local, _number, _number, _number)


def negative(rng: random.Random) -> str:
    """A few words with something in it that is no personal data."""
    return rng.choice(_DRAWS)(rng)
