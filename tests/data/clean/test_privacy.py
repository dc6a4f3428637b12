"""Private: what each rule finds and leaves, what becomes of it."""

import pickle
import re
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import Document
from lmx.data.clean.keys import random_looking
from lmx.data.clean.privacy import TYPES, Private, Span
from lmx.data.clean.step import Change, Drop

FIND = Private(spelt=True)


def found(text, step=FIND):
    return [(text[start:stop], type) for start, stop, type in step.find(text)]


@pytest.mark.parametrize(
    ("text", "value", "type"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "jane.doe+x@mail.example.co.uk", "email"),
        ("<O'Brien@Example.COM>, hi", "O'Brien@Example.COM", "email"),
        ("jürgen@müller-bau.de", "jürgen@müller-bau.de", "email"),
        ("root@[93.184.216.34]", "root@[93.184.216.34]", "email"),
        ("?email=a1@b.org&x=1", "a1@b.org", "email"),
        ("mail jane dot doe at example dot com now", "jane dot doe at example dot com", "email"),
        ("jane [at] example [dot] org", "jane [at] example [dot] org", "email"),
        ("jane(at)example.org", "jane(at)example.org", "email"),
        ("call (415) 555-2671 x12", "(415) 555-2671 x12", "phone"),
        ("London: 020 7946 0958.", "020 7946 0958", "phone"),
        ("+44 (0)20 7946 0958", "+44 (0)20 7946 0958", "phone"),
        ("Handy 01711234567", "01711234567", "phone"),
        ("<a href='tel:+49-30-901820'>", "+49-30-901820", "phone"),
        ("from 93.184.216.34:8080", "93.184.216.34", "ip"),
        ("http://93.184.216.34/x", "93.184.216.34", "ip"),
        ("[2606:4700:4700::1111]:443", "2606:4700:4700::1111", "ip"),
        ("4111 1111 1111 1111", "4111 1111 1111 1111", "credit_card"),
        ("4111 1111 1111 1111 12 people", "4111 1111 1111 1111", "credit_card"),
        ("3782-822463-10005", "3782-822463-10005", "credit_card"),
        ("Maestro card 639059056056", "639059056056", "credit_card"),
        ("hetu 131052A308T", "131052A308T", "national_id"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC", "DE89 3704 0044 0532 0130 00", "iban"),
        ("gb29nwbk60161331926819", "gb29nwbk60161331926819", "iban"),
        ("SSN 536904399", "536904399", "national_id"),
        ("536-90-4399", "536-90-4399", "national_id"),
        ("131052-308T", "131052-308T", "national_id"),
        ("codice fiscale RCCMNL83S18D969H", "RCCMNL83S18D969H", "national_id"),
        ("111222333 (BSN)", "111222333", "national_id"),
        ("id AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE", "secret"),
        ("redis://x:s3cr3t!@db.test.com/0", "s3cr3t!", "secret"),
        ("api_key = 'a8f5f167f44f4964e6c998dee827110c'", "a8f5f167f44f4964e6c998dee827110c", "secret"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhk\nxx", "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhk", "secret"),
    ],
)
def test_found(text, value, type):
    assert found(text) == [(value, type)]


@pytest.mark.parametrize(
    "text",
    [
        "look at the dot on the map, or at host dot",
        "y = a@b.T + x@self.weight(3); icon@2x.png; @media; react@18.2.0",
        "git@github.com:lib/tool.git",
        "version 1.2.3.4 and 5.6.7.8; pip install x==1.2.3.4; v1.2.3.4; Chrome/21.2.3.4; OID 1.3.6.1.4.1; 12.34.56.789",
        "127.0.0.1, 10.0.0.7, ::1, fe80::1, 2001:db8::1; std::vector; a[2000::5]; 12:30:45; 00:1B:44:11:3A:B7",
        "ISBN 978-3-16-148410-0, 2020-10-10 12:30:33, 05/12/2010, 1939-1945, $1,234,567.89, 48.856614, 2.352222",
        "order 4155552671, ticket 20 34 14 87 49 62, 94103-1234",
        "4111 1111 1111 1112, EAN 4006381333931, 0.4111111111111111",
        "DE88 3704 0044 0532 0130 00",
        "000-12-3456, 666-12-3456, 123456782",
        "token = get_token_from_settings_2(config); password = os.environ['X']; api_key='YOUR_API_KEY_HERE'; key: 2020_10_11_12_13_14",
        "public_key = 'a8f5f167f44f4964e6c998dee827110c'; https://u:$PASSWORD@host.test/; commit a8f5f167f44f4964e6c998dee827110c",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_left(text):
    assert found(text) == []


def test_options():
    assert found("10.0.0.7 fe80::1:2 127.0.0.1", Private(private_ips=True)) == [("10.0.0.7", "ip"), ("fe80::1:2", "ip")]
    assert found("jane at example dot com", Private()) == []
    assert found("tel 0171 1234567", Private(regions=("US",))) == []
    assert found("tel 0171 1234567", Private(regions=["DE"])) == [("0171 1234567", "phone")]
    assert found("+49 171 1234567", Private(regions=())) == [("+49 171 1234567", "phone")]
    assert found("SSN 536-90-4399", Private(countries=("FI",), phone="keep")) == []
    assert found("a@b.de 8.8.8.8", Private(email="keep")) == [("8.8.8.8", "ip")]


def test_overlaps_go_to_the_earlier_type():
    # A password in a URL, its end and the host look like an address; a valid card number holds a phone number.
    assert found("ftp://me:abc4@mail.org/") == [("abc4", "secret")]
    names = Private(person="placeholder", people=capitals)
    assert found("Jane wrote Bob@Example.org", names) == [("Jane", "person"), ("Bob@Example.org", "email")]


def test_what_stands_beside_a_finding_is_looked_at_again():
    text = "+44 20 7946 0958 020 7946 0959, a@b.de 4111 1111 1111 1111 020 7946 0957"
    assert [value for value, _ in found(text)] == ["+44 20 7946 0958", "020 7946 0959", "a@b.de", "4111 1111 1111 1111", "020 7946 0957"]


def capitals(text):
    return [match.span() for match in re.finditer("[A-Z][a-z]+", text)]


def test_replaces():
    text = "Ask a@b.de or A@B.de, not c@d.fr; card 4111111111111111."
    assert Private()(Document("1", text, "s")) == Change(
        "Ask <EMAIL> or <EMAIL>, not <EMAIL>; card <CREDIT_CARD>.", {"email": 3, "credit_card": 1}
    )
    assert Private()(Document("1", "Nothing.", "s")) is None


def test_pseudonyms_are_consistent_and_keyed():
    step = Private(email="pseudonym", phone="pseudonym", key="k")
    document = Document("1", "a@b.de or A@B.de, not c@d.fr. +44 20 7946 0958, +442079460958", "s")
    one, same, other, phone, compact = re.findall("<([^>]*)>", step(document).text)
    assert one == same != other
    assert phone == compact
    assert re.fullmatch("EMAIL:[a-z]{10}", one)
    near = Private(email="pseudonym", ip="pseudonym", key="k")(Document("1", "a.b@c.de ab@c.de 93.18.4.216 93.1.84.216", "s")).text.split()
    assert len(set(near)) == 4
    assert step(document) == pickle.loads(pickle.dumps(step))(document)
    assert step(document) != Private(email="pseudonym", phone="pseudonym", key="other")(document)
    assert "key" not in repr(step)


def test_drops():
    step = Private(secret="drop", email="keep")
    assert step(Document("1", "a@b.de AKIAIOSFODNN7EXAMPLE", "s")) == Drop("secret", 1)
    assert step(Document("1", "a@b.de 93.184.216.34", "s")) == Change("a@b.de <IP>", {"ip": 1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"email": "mask"}, "email='mask' is no action; use one of placeholder, pseudonym, drop, keep"),
        ({"ip": "pseudonym"}, "ip='pseudonym' needs key"),
        ({"person": "drop"}, "people=None; set both or neither"),
        ({"people": capitals}, "person='keep'"),
        ({"countries": ("XX",)}, "countries holds 'XX'; national ids are known of AU, BE"),
        ({"regions": ("EN",)}, "regions holds 'EN'"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Private(**options)


def test_names_the_extra(monkeypatch):
    from lmx.data.clean import privacy

    privacy._phone_regions.cache_clear()
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(ValueError, match=r"phonenumbers is not installed; pip install 'lmx\[data\]'"):
        Private()
    Private(phone="keep", credit_card="keep", iban="keep", national_id="keep")
    privacy._phone_regions.cache_clear()


PIECES = st.sampled_from(
    [
        "a@b.de",
        "jane at x dot com",
        "+44 20 7946 0958",
        "(415) 555-2671",
        "020 7946 0958",
        "93.184.216.34",
        "2606:4700:4700::1111",
        "4111 1111 1111 1111",
        "DE89370400440532013000",
        "536-90-4399",
        "54362315-K",
        "AKIAIOSFODNN7EXAMPLE",
        "token=",
        "phone ",
        "SSN ",
        "a8f5f167f44f4964e6c998dee827110c",
        "://u:",
        "@",
        "-----BEGIN PRIVATE KEY-----",
        "\n",
        ". ",
        " ",
        "-",
        ".",
        "0",
        "7",
        "x",
        "é",
        "İ",
        "<EMAIL>",
        "<PHONE>",
        "<NATIONAL_ID>",
        "<SECRET>",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join))
def test_spans_and_replacement(text):
    spans = FIND.find(text)
    assert spans == FIND.find(text)
    assert all(isinstance(span, Span) and 0 <= span.start < span.stop <= len(text) and span.type in TYPES for span in spans)
    assert all(one.stop <= other.start for one, other in pairwise(spans))
    changed = FIND(Document("", text, ""))
    if not spans:
        assert changed is None
        return
    # What is outside the spans is as it was: the pieces between the placeholders.
    rest, at = [], 0
    for start, stop, _ in spans:
        rest.append(text[at:start])
        at = stop
    rest.append(text[at:])
    expected = rest[0] + "".join(f"<{span.type.upper()}>{piece}" for span, piece in zip(spans, rest[1:], strict=True))
    assert changed.text == expected
    assert sum(changed.counts.values()) == len(spans)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=8).map(" ".join))
def test_idempotent(text):
    once = FIND(Document("", text, ""))
    if once:
        assert FIND.find(once.text) == []


def test_random_looking_values():
    assert random_looking("a8f5f167f44f4964e6c998dee827110c")
    assert random_looking("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    assert not random_looking("keyboard_interrupt_handler_2")
    assert not random_looking("pkcs8_priv_key_info_st")
    assert not random_looking("0000000000000000")
    assert not random_looking("aaaaaaaaaaaaaaa1")


@pytest.mark.parametrize(
    "piece",
    [
        "1 ",
        "1. ",
        "(1) ",
        "1111111 ",
        "a@b.de ",
        "a@",
        "a.",
        "1.",
        "::1:",
        "AB12",
        "://a:",
        "key ",
        "key=a1B2c3",
        "((((",
        "+1 ",
        "1-2/",
        "-----BEGIN ",
        "a at b dot ",
        "eyJ0.eyJ0",
        "É@é.",
    ],
)
def test_time_is_linear_in_what_repeats(piece):
    FIND.find(piece * 10)
    start = time.process_time()
    FIND.find(piece * (60_000 // len(piece)))
    assert time.process_time() - start < 1.5
