"""Words of a list, however they are written; and what only looks like one."""

import random
import re
import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data.clean.disguise import ALIKE, LEET, finder, fold

# Harmless words stand in for offensive ones; some are parts of others, some differ from another word by a doubled letter.
WORDS = ("banana", "parrot", "kiwi", "god", "hell", "raped", "ass", "tit", "cum", "plum tree", "goldfish")
NEAR = [*WORDS, "good", "he'll", "a", "parrots", "tilt", "class", "Banana", "plum", "tree"]
TEXT = "it was said that some of them had been there before"
FINDER = finder(WORDS)
SINGLE = [word for word in WORDS if " " not in word]
MARKS = "\u0301\u0336\u0332\u20d2"
INVISIBLE = "\u200b\u200d\u2060\u00ad\ufeff"


@st.composite
def disguised(draw):
    """A word of the list, written in one or several ways, in a sentence."""
    word = draw(st.sampled_from(SINGLE))
    letters, swaps, digits = [], 0, 0
    for letter in word:
        how = draw(st.sampled_from(["plain"] * 4 + ["upper", "leet", "alike", "wide", "bold", "mark", "invisible", "drawn"]))
        if how == "leet" and letter in LEET:
            sign = draw(st.sampled_from(LEET[letter]))
            if len(word) - swaps > 2 or not (digits or sign.isdigit()):
                letter, swaps, digits = sign, swaps + 1, digits + sign.isdigit()
        elif how == "alike":
            letter = draw(st.sampled_from(ALIKE[letter]))
        elif how == "wide":
            letter = chr(ord(letter) + 0xFEE0)
        elif how == "bold":
            letter = chr(0x1D41A + ord(letter) - ord("a"))
        elif how == "drawn":
            letter *= draw(st.integers(3, 6))
        elif how in ("mark", "invisible"):
            letter += draw(st.sampled_from(MARKS if how == "mark" else INVISIBLE))
        letters.append(letter.upper() if how == "upper" else letter)
    apart = draw(st.sampled_from(["", "", "", ".", "-", "*", "_", " ", "  ", " - ", ". ", "~", "/", "\u00b7"]))
    if apart.strip() and " " not in apart and draw(st.booleans()):  # here and there only
        written = "".join(a + draw(st.sampled_from(["", apart])) for a in letters[:-1]) + letters[-1]
    else:
        written = apart.join(letters)
    front, behind = draw(st.sampled_from([("", ""), ("(", ")"), ('"', '".'), ("", "!!!"), ("", ","), ("*", "*"), ("\u201c", "\u201d")]))
    middle = draw(st.integers(0, 10))
    words = TEXT.split()
    return word, written, " ".join([*words[:middle], front + written + behind, *words[middle:]])


def is_ambiguous(written):
    """All letters Cyrillic or all Greek: a word of that language. Or a capital behind a stop, which begins a sentence."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", written).lower())
    letters = [c for c in plain if c.isalpha()]
    native = all("\u0430" <= c <= "\u044f" for c in letters) or all("\u03b1" <= c <= "\u03c9" for c in letters)
    return native or re.search(r"\w[.!?:;,]+[A-Z]", written) is not None


@settings(max_examples=700, deadline=None)
@given(disguised())
def test_every_disguise_is_found_once(case):
    word, written, text = case
    if not is_ambiguous(written):
        assert FINDER.find(text) == {word: 1}, ascii(written)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SINGLE),
    st.text(string.ascii_lowercase, min_size=0, max_size=3),
    st.text(string.ascii_lowercase, min_size=0, max_size=3),
)
def test_not_within_a_longer_word(word, before, behind):
    longer = before + word + behind
    if longer not in SINGLE and not re.search(r"(.)\1\1|([ahijqukvwxy])\2", longer):  # which may be another, drawn out
        assert not FINDER.find(f"the {longer} of it")
        assert not FINDER.find(longer.capitalize())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(NEAR), max_size=12),
    st.sampled_from([" ", ", ", "; ", "\n"]),
)
def test_plain_text_is_searched_for_whole_words(words, apart):
    text = apart.join(words)
    expected = Counter()
    for word in WORDS:
        pattern = word.replace(" ", r"[\s,;]+")
        expected[word] = len(re.findall(rf"(?<!\w){pattern}(?!\w)", text.lower()))
    assert FINDER.find(text) == +expected


@pytest.mark.parametrize(
    "text",
    [
        "he'll push it to Scunthorpe", "the class will assess it, as such", "as s", "a good title", "they rapped", "she tilts at documents",
        "455 and 1455", "the A55 road", "pass it", "go dark", "hel lo", "H e l l o there", "it was there. He ll", "was.He told", "cumulus", "T I M E",
        "\u0441\u043e\u0441\u043a", "1 2 3 4", "- - -", "I, too", "U. S. A.", "", "   ", "plum. Trees", "banan a split",
    ],
)  # fmt: skip
def test_innocent(text):
    assert not finder((*WORDS, "cock", "banan asplit")).find(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("p4rr0t", "parrot"), ("a$$", "ass"), ("@ss", "ass"), ("k!w!!!", "kiwi"), ("u r a p a r r o t", "parrot"), ("parrot's", "parrot"),
        ("parrot/finch", "parrot"), ("oh-par*rot", "parrot"), ("\U0001f176\U0001f17e\U0001f173", "god"), ("g\u03bfd", "god"), ("kiiwi", "kiwi"),
        ("p. a. r. r. o. t.", "parrot"), ("b4n4n4", "banana"), ("plum-tree", "plum tree"), ("plumtree", "plum tree"), ("plum \n tree", "plum tree"),
        ("PLUM_TREE", "plum tree"), ("p1um 7ree", "plum tree"), ("\u0440arrot", "parrot"), ("\u210a\u2134\u2146", "god"),
    ],
)  # fmt: skip
def test_found(text, word):
    assert FINDER.find(text) == {word: 1}


def test_listed_words_of_other_alphabets_and_their_disguises():
    russian = "\u0433\u0440\u0443\u0448\u0430"
    found = finder((russian, "\u68a8"))
    for text in (russian, russian.upper(), russian.replace("\u0440", "p").replace("\u0430", "a"), " ".join(russian)):
        assert found.find(f"of {text}, or") == {russian: 1}
    assert found.find("\u68a8 !") == {"\u68a8": 1}
    with pytest.raises(ValueError, match=r"'\+\+', which has no letters"):
        finder(("++",))


def test_memory_of_strings_is_bounded(monkeypatch):
    from lmx.data.clean import disguise

    monkeypatch.setattr(disguise, "KNOWN", 50)
    found, draw = disguise.Finder(WORDS), random.Random(0)
    for _ in range(300):
        text = " ".join(draw.choice(["kiwi", "plum"]) + "," * draw.randint(0, 60) for _ in range(4))
        assert found.find(text)["kiwi"] == text.count("kiwi")
        assert len(found) <= 50


@pytest.mark.parametrize(
    "long", ["k" + "-" * 200_000 + "i", "k" + "1" * 200_000 + "!", "." * 200_000, "\u0430" * 200_000, "a.B" * 70_000, "A " * 100_000]
)
def test_long_strings_take_no_long_time(long):
    assert FINDER.find(f"{long} kiwi,{long}") == {"kiwi": 1}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text(st.sampled_from("kiwiKI!1|+$@ .,-_*'\u0456\u200b\ud800\n"), max_size=60))
def test_any_text_is_read(text):
    found = FINDER.find(text)
    assert found.total() <= len(text)
    assert FINDER.find(text) == found  # the second time from what is remembered


def test_fold_keeps_plain_text():
    assert fold("Plain TEXT, 100%") == "plain text, 100%"
    assert fold("na\u00efve \uff21\u200b\u0430") == "naive aa"
