import unicodedata

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.clean.normalise import Normalise, mend
from lmx.data.clean.step import Change
from lmx.data.documents import Document

# What datatrove 0.10.1 gives ftfy.
DATATROVE = {
    "fix_latin_ligatures": False,
    "fix_character_width": False,
    "uncurl_quotes": False,
    "fix_line_breaks": False,
    "normalization": None,
}
PARTS = [
    "naïve",
    "café",
    "—",
    "‘so’",
    "plain ",
    "<b>",
    "&amp;",
    "&",
    "&eacute;",
    "\n",
    "\t",
    "\x1b[31m",
    "\x00",
    "\x92",
    "\ud83d\ude00",
    "\ufeff",
    "½",
    "日本",
    "ﬁ",
]
PARTS += [part.encode().decode("cp1252", "ignore") for part in ("é", "—", "’", "ñu", "“x”")] + ["Ã ", "a Â b", "à\xa0 la", "\xa0"]


def normalised(text: str) -> Change | None:
    return Normalise()(Document(id="0", text=text, source="test"))


@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join) | st.text(max_size=40))
def test_mends_as_ftfy_does(text):
    expected = ftfy.fix_text(text, **DATATROVE)
    assert mend(text)[0] == expected
    assert (mend(text)[1] > 0) == (text != expected)


@given(
    st.lists(st.sampled_from([*PARTS, "\r\n", "\r", "\x0c", "\u2028", "  ", "e\u0301", "\n\n\n", "\u2003", "\u200b"]), max_size=30).map(
        "".join
    )
)
def test_nothing_is_left_to_do_and_the_words_stay(text):
    change = normalised(text)
    after = text if change is None else change.text
    assert unicodedata.is_normalized("NFC", after)
    assert after.strip("\n") == after
    assert not any(c in after for c in "\r\x0c\x00\u2028\u200b\ufeff\u2003")
    assert " \n" not in after
    assert "\n\n\n" not in after
    after.encode()
    if change is not None:
        assert change.text != text


def test_counts_what_changed():
    change = normalised("\ufeffIt\u00e2\u20ac\u2122s &amp; so\r\nCafe\u0301\u200b\x0bone\u00a0two  \n\n\n\nend \x01\n")
    assert change.text == "It’s & so\nCafé\none two\n\nend"
    assert change.counts == {"mended": 2, "line_break": 2, "control": 1, "space": 1, "trailing": 2, "empty_lines": 1, "composed": 1}
    assert normalised("def f():\n\treturn '&amp;' < 2\n\n  “ﬁ” ①Ａ\U0001f469\u200d\U0001f52c") is None
    assert Normalise("NFKC")(Document(id="0", text="ﬁ", source="")) == Change("fi", {"composed": 1})
    with pytest.raises(ValueError, match="'NFD'"):
        Normalise("NFD")
