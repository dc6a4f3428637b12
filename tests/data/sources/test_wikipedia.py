"""Wikipedia dumps: pages cut out of any form of them, and wikitext as its reader sees it."""

import bz2
import gzip
import itertools
from html import escape

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_checks import damage, documents, omitted, read, same_in_units_of, survives, wrecks

from lmx.data import Document
from lmx.data.sources import Omitted, Wikipedia
from lmx.data.sources.wikitext import plain

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""


def page(number, text, title="", ns=0, model="wikitext", redirect="", attributes=""):
    return f"""  <page>
    <title>{escape(title or f"Toy {number}", quote=False)}</title>
    <ns>{ns}</ns>
    <id>{number}</id>{redirect}
    <revision>
      <id>{number + 1000}</id>
      <timestamp>2016-04-22T10:19:33Z</timestamp>
      <contributor><username>A</username><id>9</id></contributor>
      <model>{model}</model>
      <format>text/x-wiki</format>
      <text xml:space="preserve"{attributes}>{escape(text, quote=False)}</text>
    </revision>
  </page>
"""


PAGES = [
    page(
        12,
        "A '''toy''' is a [[thing|plaything]].{{cite|x}}<ref>y</ref>\n[[Datei:Toy.png|thumb|A toy]]\n[[Kategorie:Toys]]",
        "Größe & <Toy>",
    ),
    page(13, "#REDIRECT [[Toy]]"),
    page(14, "to", redirect='\n    <redirect title="Toy" />'),
    page(15, "Talk of <page> and </page>.", ns=1),
    page(16, "a = 1", model="Scribunto"),
    page(17, "", attributes=' deleted="deleted"'),
    page(18, "{{infobox}}"),
    page(19, "Toys <page> are </page> old."),
]
TAIL = "</mediawiki>\n"


def expected(path):
    def document(number, title, url, text):
        metadata = {"title": title, "url": f"https://de.wikipedia.org/wiki/{url}", "page_id": number}
        metadata |= {"revision_id": str(number + 1000), "language": "de"}
        return Document(f"{path.name}:{number}", text, str(path), metadata, "2016-04-22T10:19:33Z")

    reasons = {13: "redirect", 14: "redirect", 15: "namespace", 16: "model", 17: "deleted", 18: "empty"}
    return [
        document(12, "Größe & <Toy>", "Gr%C3%B6%C3%9Fe_&_%3CToy%3E", "A toy is a plaything."),
        *[Omitted(f"{path}, page {number}", reason) for number, reason in reasons.items()],
        document(19, "Toy 19", "Toy_19", "Toys are old."),
    ]


def multistream(parts, pack=bz2.compress):
    return b"".join(pack(part.encode()) for part in parts)


FORMS = {
    "wiki-20240101-pages-articles.xml": "".join([HEAD, *PAGES, TAIL]).encode(),
    "wiki-20240101-pages-articles.xml.bz2": multistream(["".join([HEAD, *PAGES, TAIL])]),
    "wiki-20240101-pages-articles-multistream1.xml-p1p41242.bz2": multistream(
        [HEAD, "".join(PAGES[:3]), "".join(PAGES[3:7]), PAGES[7], TAIL]
    ),
    "dump.xml.gz": gzip.compress("".join([HEAD, *PAGES, TAIL]).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    assert same_in_units_of(Wikipedia(str(tmp_path)), (97, 200, 1000)) == expected(path)
    assert read(Wikipedia(str(path))) == expected(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(50, 900))
def test_streams_that_cut_pages(tmp_path, cuts, size):
    """pbzip2 starts a stream wherever it has read its 900 kB."""
    whole = FORMS["wiki-20240101-pages-articles.xml"]
    edges = sorted({0, *[cut for cut in cuts if cut < len(whole)], len(whole)})
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(whole[a:b]) for a, b in itertools.pairwise(edges)))
    assert read(Wikipedia(str(path)), size) == expected(path)


def test_namespaces_and_history(tmp_path):
    revision = "<revision><id>1</id><timestamp>2001-01-01T00:00:00Z</timestamp><text>Old.</text></revision><revision>"
    history = page(20, "New.").replace("<revision>", revision, 1)
    (tmp_path / "a.xml").write_text(HEAD + history + page(21, "Talk.", ns=1) + TAIL)
    assert [d.text for d in documents(read(Wikipedia(str(tmp_path))))] == ["New."]
    assert [d.text for d in documents(read(Wikipedia(str(tmp_path), namespaces=(0, 1))))] == ["New.", "Talk."]


def found(tmp_path, data, name="a.xml", **options):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    items = survives(Wikipedia(str(tmp_path / name), **options), (60, 500))
    return [d.metadata["page_id"] for d in documents(items)], damage(items)


TEN = [page(number, f"Toy number {number}.") for number in range(10)]
CUT_OFF = ("a.xml", "ends without </mediawiki>: it is cut off")


def test_damaged_xml(tmp_path):
    bad = TEN[4].replace("<revision>", "<revision")
    assert found(tmp_path, HEAD + "".join([*TEN[:4], bad, *TEN[5:], TAIL])) == (
        [0, 1, 2, 3, 5, 6, 7, 8, 9],
        [("a.xml, page 4", "is not XML (not well-formed (invalid token): line 6, column 6)")],
    )
    bad = TEN[4].replace("</page>", "")
    assert found(tmp_path, HEAD + "".join([*TEN[:4], bad, *TEN[5:], TAIL])) == (
        [0, 1, 2, 3, 5, 6, 7, 8, 9],
        [("a.xml, page 4", "has no </page>")],
    )
    whole = HEAD + "".join(TEN) + TAIL
    assert found(tmp_path, whole[: whole.index("Toy number 7")]) == ([0, 1, 2, 3, 4, 5, 6], [("a.xml, page 7", "has no </page>"), CUT_OFF])
    assert found(tmp_path, HEAD + "".join(TEN)) == (list(range(10)), [CUT_OFF])
    assert found(tmp_path, "") == ([], [CUT_OFF])
    assert found(tmp_path, whole.encode("utf-16")) == ([], [CUT_OFF])
    long = page(4, "Toy number 4." * 100)
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert found(tmp_path, HEAD + "".join([*TEN[:4], long, *TEN[5:], TAIL]), longest=700) == (
        kept,
        [("a.xml, page 4", "does not end within 700 bytes")],
    )
    bad = TEN[4].replace("<id>", "<idea>").replace("</id>", "</idea>")
    assert found(tmp_path, HEAD + "".join([*TEN[:4], bad, *TEN[5:], TAIL])) == (
        kept,
        [("a.xml, page ?", "has no title, no id, no namespace or no revision")],
    )


def test_a_damaged_stream_costs_its_pages(tmp_path):
    streams = [bz2.compress(part.encode()) for part in [HEAD, *["".join(TEN[n : n + 2]) for n in range(0, 10, 2)], TAIL]]
    start = len(streams[0]) + len(streams[1])
    for bad in (streams[2][:-30], streams[2][:40] + b"\0" * 60 + streams[2][100:], b"\xff" * 200):
        pages, problems = found(tmp_path, b"".join([*streams[:2], bad, *streams[3:]]), "a.xml.bz2")
        assert pages == [0, 1, 4, 5, 6, 7, 8, 9]
        assert [where for where, _ in problems] == [f"a.xml.bz2, from byte {start}"]
    pages, problems = found(tmp_path, b"".join(streams[:4]), "a.xml.bz2")
    assert (pages, problems) == ([0, 1, 2, 3, 4, 5], [("a.xml.bz2", CUT_OFF[1])])
    pages, problems = found(tmp_path, b"".join(streams[:4])[:-60], "a.xml.bz2")
    assert (pages, problems) == ([0, 1, 2, 3], [(f"a.xml.bz2, from byte {sum(map(len, streams[:3]))}", "cannot be read (it is cut off)")])
    single = bz2.compress((HEAD + "".join(TEN) + TAIL).encode())
    assert found(tmp_path, single[: len(single) // 2], "a.xml.bz2") == ([], [("a.xml.bz2, from byte 0", "cannot be read (it is cut off)")])


WHOLE = "".join([HEAD, *TEN[:3], *PAGES[:3], TAIL]).encode()


@FUZZ
@given(wrecks(WHOLE), st.integers(50, 900))
def test_any_bytes_as_xml(tmp_path, data, size):
    (tmp_path / "a.xml").write_bytes(data)
    survives(Wikipedia(str(tmp_path)), (size,))


@FUZZ
@given(wrecks(multistream([HEAD, TEN[0] + TEN[1], TEN[2], TEN[3], TAIL])), st.integers(50, 900))
def test_any_bytes_as_streams(tmp_path, data, size):
    (tmp_path / "a.xml.bz2").write_bytes(data)
    survives(Wikipedia(str(tmp_path)), (size,))


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("A [[toy]] and [[toy|toys]] and [[:Category:Toys]] and [[Toy#Use|]]s.", "A toy and toys and Category:Toys and s."),
        ("[[File:A.png|thumb|A [[toy]]]]\n[[Image: b.png]]\n[[category:Toys|*]]\nText.\n[[fr:Jouet]]", "Text."),
        ("See [http://toy.example the toys], [http://toy.example] or http://toy.example.", "See the toys, or http://toy.example."),
        ("{{infobox|a={{b|c}}\n|d=[[e]]}}\nText{{cn}} goes {{lang|fr|on}} here.", "Text goes here."),
        ("One.<ref name=\"a/b\">x {{cite}}</ref> Two.<ref name=a /> Three.<!-- no\n --> Four.<ref>[[y]]\n</ref>", "One. Two. Three. Four."),
        ("Before.\n{| class=x\n| a || {{b}}\n|-\n{|\n| inner\n|}\n| c\n|}\nAfter.", "Before.\n\nAfter."),
        ("Before.\n{|\n| not closed", "Before."),
        ("Lead.\n\n== Use ==\n=== Old ''use'' ===\nLong.\n== Notes ==\n{{reflist}}\n== See also ==\n* [[Doll]]\n*# Ball",
         "Lead.\n\nUse\n\nOld use\n\nLong.\n\nSee also\n\nDoll\nBall"),
        ("'''Bold''', ''italic'', '''''both''''' and it's.", "Bold, italic, both and it's."),
        ("The journal ''Nature'''s '''pages'''.", "The journal Nature's pages."),
        ("&nbsp;a&amp;b &lt;c&gt; &#228;", "a&b <c> ä"),
        ("__NOTOC__Toys (; ) are ( ) old.", "Toys are old."),
        ("x<br>y<div class=a>z</div>w <small>s</small> <gallery>\nA.png|a\n</gallery>", "x\ny\nz\nw s"),
        ("Code <nowiki>[[a]] {{b}}</nowiki> and <math>\\frac{{a}}{b}</math>:\n<syntaxhighlight>\nif (x)\n    y  = '';\n</syntaxhighlight>\nend",
         "Code [[a]] {{b}} and \\frac{{a}}{b}:\n\nif (x)\n    y  = '';\n\nend"),
        ("{{{argument|x}}} {{unclosed [[a|b", "{{unclosed [[a|b"),
        ("", ""),
    ],
)  # fmt: skip
def test_wikitext(wikitext, text):
    assert plain(wikitext) == text


TOKENS = [
    "{{",
    "}}",
    "[[",
    "]]",
    "{|",
    "|}",
    "|",
    "''",
    "'''",
    "==",
    "\n",
    "<ref>",
    "</ref>",
    "<ref",
    "/>",
    "<pre>",
    "</pre>",
    "a",
    " ",
    "\0",
    "&",
    "*",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=60).map("".join))
def test_any_wikitext(wikitext):
    assert "\0" not in plain(wikitext)


def test_what_is_no_dump(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wikipedia='.*' is a folder without a file to read \(it holds nothing\); expected .xml"):
        Wikipedia(str(tmp_path)).units()
    (tmp_path / "a.xml").write_text("<html>\n</html>")
    assert damage(read(Wikipedia(str(tmp_path)))) == [CUT_OFF]
    assert not omitted([])
