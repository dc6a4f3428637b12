"""Gutenberg's markers, encodings, dates and paragraphs as they have been written over the years; BookCorpus's three releases."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_cases import BODY, book
from source_checks import read

from lmx.data.sources import BookCorpus, Gutenberg, Texts, documents
from lmx.data.sources.gutenberg import decoded, released, stripped, unwrap

SMALL_PRINT = """Project Gutenberg's Etext of Toy Tales, by Ann Ymous

August, 1994  [Etext #154]

**The Project Gutenberg Etext of Toy Tales**
*****This file should be named toys10.txt or toys10.zip******

***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
Why is this "Small Print!" statement here?  You know: lawyers.

{end}
"""


@pytest.mark.parametrize(
    "start",
    [
        "*** START OF THE PROJECT GUTENBERG EBOOK TOY TALES ***",
        "*** START OF THIS PROJECT GUTENBERG EBOOK TOY TALES ***",
        "***START OF THE PROJECT GUTENBERG EBOOK TOY TALES***",
        "*** START OF THE PROJECT GUTENBERG EBOOK, TOY TALES, OR\nWHAT THE LAMP SAW,\nIN TWO PARTS ***",
        "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK TOY TALES ***",
        "*** Start of the Project Gutenberg E-text Toy Tales",
        SMALL_PRINT.format(end="*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*"),
        SMALL_PRINT.format(end="*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.10.02.02*END*"),
    ],
)
@pytest.mark.parametrize(
    "end",
    [
        "*** END OF THE PROJECT GUTENBERG EBOOK TOY TALES ***\n\nUpdated editions will replace the previous one.\n",
        "***END OF THIS PROJECT GUTENBERG EBOOK TOY TALES***\n******* This file should be named 1.txt *******\n",
        "End of the Project Gutenberg EBook of Toy Tales\n\n\n*** END OF THIS PROJECT GUTENBERG EBOOK TOY TALES ***\n",
        "End of Project Gutenberg's Toy Tales, by Ann Ymous\n",
        "***End of the Project Gutenberg Etext of Toy Tales***\n\nSMALL PRINT\n",
        "The End of The Tale\n\nEnd of this Project Gutenberg Etext\n",
    ],
)
@pytest.mark.parametrize(
    "credits",
    [
        "",
        "Produced by Some One\n\n",
        "E-text prepared by Some One and the\nOthers (http://toy.example)\n\n\n\n",
        "This etext was prepared by Some One.\n\n",
        "[Transcribed from the 1901 edition by Some One]\n\n",
    ],
)
def test_markers(start, end, credits):
    kept = BODY.strip("\n") + ("\n\n\nThe End of The Tale\n" if end.startswith("The End") else "\n")
    body, fields, whole = stripped(f"Title: Toy Tales\n\n{start}\n\n\n{credits}{BODY}\n\n{end}")
    assert body == kept
    assert whole
    assert fields["title"] == "Toy Tales"
    assert ("credits" in fields) == bool(credits)
    assert fields.get("ebook") == (154 if "Etext #154" in start else None)


def test_without_markers_nothing_goes():
    text = "\n\nA text on Project Gutenberg.\n\nTitle: none\n"
    assert stripped(text) == (text, {}, True)


def test_a_book_that_speaks_of_gutenberg_is_kept_whole():
    body = "*** On the start of the Project Gutenberg ebook ***\n\nEnd of project: Gutenberg died.\n"
    text = f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n{body}\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
    assert stripped(text)[0] == body


@pytest.mark.parametrize(
    ("said", "date"),
    [
        ("June 12, 2008 [EBook #1342]", "2008-06-12"),
        ("August, 1994  [Etext #154]", "1994"),
        ("Aug 1997", "1997"),
        ("Sept. 3, 2001", "2001-09-03"),
        ("2007-05-12", "2007-05-12"),
        ("February 30, 2001", "2001"),
        ("", ""),
        ("soon", ""),
    ],
)
def test_dates(said, date):
    assert released(said) == date


@pytest.mark.parametrize(
    ("header", "name", "encoding"),
    [
        ("", "1-0.txt", "utf-8"),
        ("", "1-0.txt", "utf-8-sig"),
        ("", "1-8.txt", "iso8859-1"),
        ("Character set encoding: ISO-8859-1", "1.txt", "iso8859-1"),
        ("Character set encoding: ISO Latin-1", "1.txt", "iso8859-1"),
        ("Character set encoding: ISO-8859-15", "1-8.txt", "iso8859-15"),
        ("Character set encoding: Windows Code-Page 1252", "1-8.txt", "cp1252"),
    ],
)
def test_encodings(header, name, encoding):
    text = f"{header}\n\nÉté à Zürich"
    assert decoded(text.replace("\n", "\r\n").encode(encoding), name) == text


@pytest.mark.parametrize("name", ["1.txt", "1-0.txt"])
def test_unknown_encoding_is_said(name):
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xe9 at offset 2"):
        decoded("été".encode()[:2] + "é".encode("latin-1"), name)


def test_unwrapping_keeps_what_was_broken_on_purpose():
    prose = (
        "It was raining when the two of them came to the door of the inn, and\nnobody had thought of a lamp--\nthe well-\nknown lamp of the house"
        " that hung there in the days of the old man\nwho had it built.\n"
    )
    prose = prose.replace("lamp--\nthe well-\nknown", "lamp for them, so that they stood in the dark--\nthe well-known")
    verse = "The rain it falls\nOn roofs and walls\n\n    indented lines stay as they were, however long they may be or get\n    to be.\n"
    text = f"CHAPTER I\nThe Inn\n\n{prose}\n{verse}\n{prose}"
    joined = prose.replace("\n", " ").strip().replace("-- ", "--") + "\n"
    assert unwrap(text) == f"CHAPTER I\nThe Inn\n\n{joined}\n{verse}\n{joined}"


@given(st.text(st.sampled_from("ab -\n"), max_size=300))
def test_unwrapping_changes_only_line_ends(text):
    assert re.sub(r"\s", "", unwrap(text)) == re.sub(r"\s", "", text)
    assert unwrap(text).count("\n\n") >= text.count("\n\n")


@given(st.lists(st.text(st.sampled_from("abcdefghij"), min_size=1, max_size=9), min_size=60, max_size=200), st.integers(50, 75))
def test_unwrapping_undoes_textwrap(words, width):
    import textwrap

    assert unwrap("\n".join(textwrap.wrap(" ".join(words), width))) == " ".join(words)


def test_unwrapped_source_and_one_file(tmp_path):
    (tmp_path / "5-8.txt").write_bytes(book(5, "ISO-8859-1"))
    (tmp_path / "5-0.txt").write_bytes(book(5, "UTF-8"))
    (only,) = read(Gutenberg(str(tmp_path / "5-8.txt"), unwrapped=True))  # asked for by name, so it is read
    assert only.text == BODY.replace("and\nnobody", "and nobody")


def test_bookcorpus_counts_lines_over_any_cut(tmp_path):
    lines = [f"sentence {i} " + "x" * (i % 37) for i in range(3000)]
    (tmp_path / "all.txt").write_text("\n".join(lines))
    for per in (1, 7, 512, 5000):
        expected = ["\n".join(lines[i : i + per]) for i in range(0, len(lines), per)]
        for size in (1, 999, 20_000, 1 << 30):
            source = BookCorpus(str(tmp_path), lines_per_document=per)
            if size > 1 or per >= 7:
                assert [document.text for document in read(source, size)] == expected
    assert len(BookCorpus(str(tmp_path), lines_per_document=7).units(1000)) > 20
    with pytest.raises(ValueError, match="lines_per_document=0, expected at least 1"):
        BookCorpus(str(tmp_path), lines_per_document=0).units()


def test_texts_are_what_documents_gives(tmp_path):
    for name in ("a.txt", "b/c.md", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} \r\n é")
    assert [d.text for d in read(Texts(str(tmp_path)), 5)] == [d.text for d in documents(str(tmp_path))]
