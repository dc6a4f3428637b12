"""Reddit's rules, by reason, and the links that OpenWebText would have taken."""

import random

import pytest
from source_cases import ndjson, zstd

from lmx.data import Document
from lmx.data.sources import Omitted, Reddit, links
from lmx.data.sources.reddit import is_bad_url


def post(id, **fields):
    return {"id": id, "title": f"Title {id}", "selftext": "Text.", "score": 5, "subreddit": "toys", "created_utc": 0, **fields}


POSTS = [
    post("a"),
    post("b", score=2),
    post("c", score=None),
    post("d", subreddit="Tools"),
    post("e", over_18=True),
    post("f", selftext="[deleted]"),
    post("g", selftext="[removed]", author="[deleted]"),
    post("h", selftext=""),
    post("i", selftext=None),
    {"id": "j", "body": "", "score": 9, "subreddit": "toys"},
    {"id": "k", "body": "Yes.", "score": 3, "subreddit": "TOYS", "created_utc": "1.5"},
]


@pytest.mark.parametrize(
    ("rules", "kept", "reasons"),
    [
        ({}, "abcdk", {"e": "over_18", "f": "deleted", "g": "removed", "h": "link", "i": "link", "j": "empty"}),
        ({"min_score": 3, "over_18": True}, "adek", {"b": "low_score", "c": "no_score"}),
        ({"subreddits": ("toys",), "links": True}, "abchik", {"d": "subreddit", "e": "over_18"}),
    ],
)
def test_rules(tmp_path, rules, kept, reasons):
    path = tmp_path / "RS_2015-01.zst"
    path.write_bytes(zstd(ndjson(*POSTS)))
    source = Reddit(str(path), **rules)
    (unit,) = source.units()
    found = list(source.read(unit))
    assert len(found) == len(POSTS)
    assert "".join(item.id[-1] for item in found if isinstance(item, Document)) == kept
    said = {post["id"]: item.reason for post, item in zip(POSTS, found, strict=True) if isinstance(item, Omitted)}
    assert said.items() >= reasons.items()
    assert not any(item.damaged for item in found if isinstance(item, Omitted))


def test_texts_and_times(tmp_path):
    (tmp_path / "RS_1").write_bytes(ndjson(POSTS[0], post("z", selftext=""), POSTS[-1]))
    source = Reddit(str(tmp_path), links=True)
    first, title, comment = source.read(*source.units())
    assert (first.id, first.text, first.created) == ("t3_a", "Title a\n\nText.", "1970-01-01T00:00:00Z")
    assert (title.id, title.text) == ("t3_z", "Title z")
    assert (comment.id, comment.text, comment.created) == ("t1_k", "Yes.", "1970-01-01T00:00:01.500000Z")


@pytest.mark.parametrize(
    ("url", "bad"),
    [
        ("http://toy.example/a", False),
        ("https://www.toy.example:8080/a.html?b=c.png#d.jpg", False),
        ("http://notimgur.com/a", False),
        ("http://imgur.com/a", True),
        ("https://i.Imgur.com/a", True),
        ("http://user@en.wikipedia.org/wiki/Toy", True),
        ("http://toy.example/a.JPG?x=1", True),
        ("http://toy.example/a.pdf#page=2", True),
        ("ftp://toy.example/a", True),
        ("/r/toys", True),
        ("", True),
    ],
)
def test_bad_urls(url, bad):
    assert is_bad_url(url) == bad


def test_links_against_the_rule_written_out(tmp_path):
    draw = random.Random(0)
    records = [
        {
            "id": str(i),
            "url": draw.choice(["http://toy.example/", "http://i.imgur.com/", "https://b.example/?a=1&amp;b="]) + str(draw.randrange(60)),
            "score": draw.choice([0, 2, 3, 4, None]),
            "over_18": draw.choice([False, False, True]),
            "is_self": draw.random() < 0.1,
        }
        for i in range(600)
    ]
    (tmp_path / "RS_2011-01").write_bytes(ndjson(*records[:300]))
    (tmp_path / "RS_2011-02.zst").write_bytes(zstd(ndjson(*records[300:])))
    found = list(links(str(tmp_path)))
    good = [r["url"] for r in records if (r["score"] or 0) > 2 and not r["over_18"] and not r["is_self"] and "imgur" not in r["url"]]
    assert [item for item in found if isinstance(item, str)] == [url.replace("&amp;", "&") for url in dict.fromkeys(good)]
    assert len(found) == len(records)
    reasons = {item.reason for item in found if isinstance(item, Omitted)}
    assert reasons == {"low_score", "no_score", "over_18", "self", "bad_url", "duplicate"}


def test_links_name_what_is_none(tmp_path):
    (tmp_path / "RS_1").write_bytes(b'[]\n{"url": 3}\n{"url": "http://a.example", "score": "x"}\n{"url"\n')
    found = list(links(str(tmp_path)))
    assert len(found) == 4
    assert all(isinstance(item, Omitted) and item.damaged for item in found)
