"""Stack Exchange dumps: posts put together to threads, wherever in the file they lie."""

import contextlib
import functools
import gzip
import io
from html import escape

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_checks import damage, documents, omitted, read, same_in_units_of, survives, wrecks

from lmx.data import Document
from lmx.data.sources import Omitted, StackExchange, stackexchange
from lmx.data.sources.markup import plain

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row(**attributes):
    text = " ".join(f'{key}="{escape(str(value)).replace(chr(10), "&#xA;")}"' for key, value in attributes.items())
    return f"  <row {text} />\n"


def question(number, title="How to toy?", body="<p>I have a toy.</p>\n", score=12, **other):
    fields = {"CreationDate": "2012-02-14T20:23:40.127", "Score": score, "Body": body, "OwnerUserId": 5, "Title": title}
    return row(Id=number, PostTypeId=1, **{**fields, "Tags": "<toys><fun>", "ContentLicense": "CC BY-SA 3.0", **other})


def answer(number, parent, body="<p>So.</p>", score=3, **other):
    return row(Id=number, PostTypeId=2, ParentId=parent, Score=score, Body=body, **{"ContentLicense": "CC BY-SA 4.0", **other})


def posts(*rows):
    return '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "".join(rows) + "</posts>"


ROWS = [
    question(1, AcceptedAnswerId=7),
    answer(2, 1, "<p>Third &amp; last.</p>", 1),
    answer(3, 4, "<p>Blue?</p>", OwnerDisplayName="user9"),
    question(4, "Which <b> colour?", "<p>a\nb</p><pre><code>if (a &lt; b)\n    x = 1;\n</code></pre>", Tags="|toys|"),
    row(Id=5, PostTypeId=5, Body="About toys."),
    answer(6, 99),
    answer(7, 1, "<p>Accepted.</p>", 0),
    answer(8, 1, "<p>Second.</p>", 9),
]


def expected(path, site):
    def thread(number, text, **metadata):
        known = {"site": site, "url": f"https://{site}/questions/{number}"} if site else {}
        return Document(f"{path.name}:{number}", text, str(path), {**known, **metadata}, "2012-02-14T20:23:40.127000Z")

    def given(number, accepted, score, **author):
        return {"id": number, "accepted": accepted, "score": score, "license": "CC BY-SA 4.0", **author}

    return [
        Omitted(f"{path}, post 5", "post_type"),
        thread(
            1,
            "Q: How to toy?\n\nI have a toy.\n\nA: Accepted.\n\nA: Second.\n\nA: Third & last.",
            title="How to toy?",
            tags=["toys", "fun"],
            score=12,
            license="CC BY-SA 3.0",
            author="5",
            answers=[given(7, True, 0), given(8, False, 9), given(2, False, 1)],
        ),
        thread(
            4,
            "Q: Which <b> colour?\n\na b\n\n```\nif (a < b)\n    x = 1;\n```\n\nA: Blue?",
            title="Which <b> colour?",
            tags=["toys"],
            score=12,
            license="CC BY-SA 3.0",
            author="5",
            answers=[given(3, False, 3, author="user9")],
        ),
        Omitted(f"{path}, post 6", "no_question"),
    ]


@functools.cache
def packed(text, name="Posts.xml"):
    py7zr = pytest.importorskip("py7zr", reason="the data extra is not installed")
    file = io.BytesIO()
    with py7zr.SevenZipFile(file, "w", filters=[{"id": py7zr.FILTER_BZIP2}]) as archive:
        archive.writestr("<users>\n</users>", "Users.xml")
        archive.writestr(text, name)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "pack", "site"),
    [
        ("Posts.xml", str.encode, ""),
        ("toy.stackexchange.com-Posts.xml.gz", lambda text: gzip.compress(text.encode()), "toy.stackexchange.com"),
        ("toys.example.com.7z", packed, "toys.example.com"),
        ("stackoverflow.com-Posts.7z", packed, "stackoverflow.com"),
    ],
)
def test_threads(tmp_path, name, pack, site):
    path = tmp_path / name
    path.write_bytes(pack(posts(*ROWS)))
    (tmp_path / "stackoverflow.com-Users.7z").write_bytes(b"")
    assert same_in_units_of(StackExchange(str(tmp_path)), (1, 100)) == expected(path, site)


def test_folder_names_the_site(tmp_path):
    (tmp_path / "toy.stackexchange.com").mkdir()
    (tmp_path / "toy.stackexchange.com/Posts.xml").write_text(posts(*ROWS).replace("\n", "\r\n"))
    (one, _) = documents(read(StackExchange(str(tmp_path))))
    assert (one.id, one.metadata["site"]) == ("toy.stackexchange.com/Posts.xml:1", "toy.stackexchange.com")


def test_far_apart_and_on_disk(tmp_path, monkeypatch):
    """In ranges of a few questions, written out every few rows, the same."""
    questions = [question(n, f"Toy {n}?") for n in range(1, 200, 2)]
    answers = [answer(n + 1, n, f"<p>Of {n}.</p>") for n in range(1, 200, 2)]
    (tmp_path / "Posts.xml").write_text(posts(*questions, *reversed(answers)))
    whole = read(StackExchange(str(tmp_path)))
    assert [d.text for d in whole] == [f"Q: Toy {n}?\n\nI have a toy.\n\nA: Of {n}." for n in range(1, 200, 2)]
    monkeypatch.setattr(stackexchange, "QUESTIONS", 7)
    monkeypatch.setattr(stackexchange, "MEMORY", 1000)
    assert read(StackExchange(str(tmp_path))) == whole


def test_rules(tmp_path):
    (tmp_path / "Posts.xml").write_text(posts(*ROWS, question(20, score=-1), question(21), answer(22, 21, ""), question(23, "", "<br>")))

    def left_out(**options):
        return [
            (where.removeprefix("Posts.xml, post "), reason) for where, reason in omitted(read(StackExchange(str(tmp_path), **options)))
        ]

    always = [("5", "post_type"), ("6", "no_question")]
    assert left_out() == [always[0], ("22", "empty"), ("23", "empty"), always[1]]
    assert left_out(question_score=0, answer_score=1, answers=1) == [
        always[0],
        ("7", "low_score"),
        ("20", "low_score"),
        ("22", "empty"),
        ("21", "few_answers"),
        ("23", "few_answers"),
        always[1],
    ]


def found(tmp_path, data, name="Posts.xml", **options):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    items = survives(StackExchange(str(tmp_path / name), **options), (1,))
    return [int(d.id.rpartition(":")[2]) for d in documents(items)], damage(items)


def test_damaged(tmp_path):
    rows = [question(n) for n in range(5)]
    whole, end = posts(*rows), ("Posts.xml", "ends without </posts>: it is cut off")
    assert found(tmp_path, whole) == ([0, 1, 2, 3, 4], [])
    assert found(tmp_path, whole[:-3]) == ([0, 1, 2, 3, 4], [("Posts.xml, line 8", "is no row"), end])
    assert found(tmp_path, whole[: whole.index('Id="3"') + 50]) == ([0, 1, 2], [("Posts.xml, line 6", "is no row"), end])
    assert found(tmp_path, b"") == ([], [end])
    assert found(tmp_path, posts(rows[0], rows[1].replace(" Id=", " Ix="), rows[2], rows[2])) == (
        [0, 2],
        [("Posts.xml, line 4", "has no Id, no PostTypeId or no ParentId"), ("Posts.xml, post 2", "is there twice")],
    )
    assert found(tmp_path, posts(rows[0], rows[1].replace('Score="12"', 'Score="x"'), rows[2].replace("lt;", "l;"))) == (
        [0],
        [
            ("Posts.xml, post 1", "cannot be read (invalid literal for int() with base 10: 'x')"),
            ("Posts.xml, post 2", "cannot be read (undefined entity: line 1, column 2)"),
        ],
    )
    assert found(tmp_path, posts(rows[0], question(1, body="x" * 999), rows[2]), longest=500) == (
        [0, 2],
        [("Posts.xml, line 4", "is longer than 500 bytes")],
    )
    data = gzip.compress(whole.encode())
    kept, problems = found(tmp_path, data[: len(data) // 2], "a-posts.xml.gz")
    assert [where for where, _ in problems][-1] == "a-posts.xml.gz"
    assert kept == [0, 1, 2, 3, 4][: len(kept)]


def test_damaged_archives(tmp_path):
    data = packed(posts(*[question(n) for n in range(5)]))
    for bad in (data[:-20], data[:40] + bytes(40) + data[80:], data[:20], b"7z\xbc\xaf\x27\x1c" + b"\xff" * 99):
        _, problems = found(tmp_path, bad, "toy.com.7z")
        assert any("cannot be read" in reason for _, reason in problems)
    assert found(tmp_path, packed("", "Votes.xml"), "toy.com.7z") == ([], [("toy.com.7z", "holds 0 files Posts.xml, expected one")])
    with pytest.raises(FileNotFoundError, match=r"stackexchange='.*none' does not exist; give a file"):
        StackExchange(str(tmp_path / "none")).units()


def test_a_full_disk_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "Posts.xml").write_text(posts(*ROWS))
    monkeypatch.setattr(stackexchange, "MEMORY", 10)
    monkeypatch.setattr(stackexchange.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="gone"):
        read(StackExchange(str(tmp_path)))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One\n two.</p>\n\n<p>Three <b>four</b>&nbsp;&lt;five&gt;.</p>", "One two.\n\nThree four\xa0<five>."),
        ("<ul>\n<li>a <code>f(&amp;x)</code></li>\n<li><p>b</p><p>c</p></li></ul>d<br>e", "- a `f(&x)`\n- b\n\nc\n\nd\ne"),
        ("<p>x:</p><pre class='l'><code>  a\r\n\r\n\tb &gt; <i>c</i>\n</code></pre><p>y</p>", "x:\n\n```\n  a\n\n\tb > c\n```\n\ny"),
        ("<pre>a ``` b</pre>", "````\na ``` b\n````"),
        ('<a href="x>y" title=\'a>"b\'>label</a><img src="z"><!-- a <p> b -->!', "label!"),
        ("<blockquote><p>q</p></blockquote><h2>h</h2>t", "q\n\nh\n\nt"),
        ("a < b <3 c", "a < b <3 c"),
        ("", ""),
    ],
)
def test_markup(html, text):
    assert plain(html) == text


@FUZZ
@given(wrecks(posts(*ROWS).encode()))
def test_any_bytes_as_posts(tmp_path, data):
    (tmp_path / "Posts.xml").write_bytes(data)
    survives(StackExchange(str(tmp_path)), ())


@FUZZ
@given(st.data())
def test_any_bytes_as_archive(tmp_path, data):
    (tmp_path / "toy.com.7z").write_bytes(data.draw(wrecks(packed(posts(*ROWS)))))
    survives(StackExchange(str(tmp_path)), ())
