import re
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.clean.pieces import Remembered
from lmx.data.clean.text import count_sentences, lines, ngrams, paragraphs, sentences, words

SPACY = [  # as spacy.blank("en") 3.8.18 cuts them
    ('"Well," said Dr. O\'Neil-Smith, "it\'s 5pm."', '" Well , " said Dr. O\'Neil - Smith , " it \'s 5 pm . "'),
    ("don't cannot Can’t I'm we'd've they're Ill I'll", "do n't can not Ca n’t I 'm we 'd 've they 're Ill I 'll"),
    ("e.g. the U.S. (U.K.) and i.e.; etc.", "e.g. the U.S. ( U.K. ) and i.e. ; etc ."),
    ("https://example.com/a-b?c=d, a@b.org; www.x.co.uk.", "https://example.com/a-b?c=d , a@b.org ; www.x.co.uk ."),
    ("and/or yes/no well-known 3-4 10km/h 5% $10 US$5", "and/or yes / no well - known 3 - 4 10 km/h 5 % $ 10 US$ 5"),
    ("hm... wait--what!? :) (see:) #tag ###", "hm ... wait -- what ! ? :) ( see :) # tag # # #"),
    ("end.Start a,b 1,000 x=y <b>", "end . Start a , b 1,000 x = y < b >"),
    ("the dog's boys' rock'n'roll 'tis 'em", "the dog 's boys ' rock'n'roll ' tis 'em"),
]


@pytest.mark.parametrize(("text", "expected"), SPACY)
def test_words_are_spacys(text, expected):
    assert words(text) == expected.split()


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from([*"aB1.,'’!?-:)(/&\"… \n", "n't", "Dr.", "www.a.org", "...", "  "]), max_size=25).map("".join)
)
def test_words_and_sentences_lose_nothing_but_white_space(text):
    assert "".join(words(text)) == "".join(text.split())
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(found)
    assert [sentence.strip() for sentence in found] == found
    if "\n" not in text:
        assert count_sentences(text) == max(1, len(found))


def test_sentences():
    text = 'Dr. Who came.  He said: "Go!" (Now.) It cost 3.5 km...\n- Why? No'
    assert sentences(text) == ["Dr. Who came.", 'He said: "Go!" (', "Now.)", "It cost 3.5 km...\n- Why?", "No"]
    assert count_sentences("") == 1
    assert sentences(" \n") == []


def test_lines_paragraphs_and_ngrams():
    assert lines("a\n\n \nb \n") == ["a", "b "]
    assert paragraphs("\na\nb\n\n\nc\n") == ["a\nb", "c"]
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a"], 2)) == []
    assert Counter(ngrams("abab", 2)).most_common(1) == [(("a", "b"), 2)]


@pytest.mark.parametrize(
    "piece", ["!" * 999, "a." * 499, "." * 990, "a@" * 499, "a-" * 20_000, "x" * 300_000, "http://" * 140, "'" * 20_000, "9" * 999 + "."]
)
def test_odd_pieces_take_no_time(piece):
    start = time.process_time()
    assert "".join(words(piece)) == piece
    count_sentences(piece)
    assert time.process_time() - start < 1


def test_long_pieces_are_cut_inside():
    assert words("ab-" * 500 + "c") == re.findall("ab|-|c", "ab-" * 500 + "c")


def test_what_is_remembered_is_bounded():
    calls = []
    remembered = Remembered(lambda text: calls.append(text) or len(text))
    remembered.ENTRIES = 10
    assert [remembered["abc"], remembered["abc"], remembered["x" * 65], remembered["x" * 65]] == [3, 3, 65, 65]
    assert calls == ["abc", "x" * 65, "x" * 65]
    for i in range(100):
        assert remembered[str(i)] == len(str(i))
        assert len(remembered) <= 10
