"""Code: trees, archives and tables of files, their languages and licences, and the rules that leave files out."""

import dataclasses
import functools
import gzip
import io
import itertools
import lzma
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_cases import ndjson, tar
from source_checks import damage, documents, omitted, read, same_in_units_of, survives, wrecks

from lmx.data import Document
from lmx.data.sources import CodeRules, CodeTable, CodeTree, Omitted
from lmx.data.sources.code_rules import alphanumeric
from lmx.data.sources.languages import language
from lmx.data.sources.licenses import UNKNOWN, declared, licenses, spelt

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

MIT = """MIT License

Copyright (c) 2024 A

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal ...
The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.
"""
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
PYTHON = "def toy(x):\n    return x + 1\n"
TREE = {
    "LICENSE": MIT.encode(),
    "README.md": b"# Toys\n\nA toy.\n",
    "a/b.py": PYTHON.encode(),
    "a/c.go": b"// SPDX-License-Identifier: BSD-3-Clause OR apache-2.0\npackage toy\n",
    "a/run": b"#!/usr/bin/env python3\nprint('toy')\n",
    "lib/COPYING.txt": APACHE.encode(),
    "lib/d/e.h": "int é;\n".encode("utf-8-sig"),
    "node_modules/x.js": b"var x = 1;\n",
    "x.bin": b"\0\1",
    "z.min.js": b"var x=1;\n",
}


def tree_documents(prefix, folder, source, order):
    found = {
        "LICENSE": Omitted(f"{folder}/LICENSE", "unknown_language"),
        "README.md": ("Markdown", ["MIT"], "# Toys\n\nA toy.\n"),
        "a/b.py": ("Python", ["MIT"], PYTHON),
        "a/c.go": ("Go", ["BSD-3-Clause", "Apache-2.0"], TREE["a/c.go"].decode()),
        "a/run": ("Python", ["MIT"], "#!/usr/bin/env python3\nprint('toy')\n"),
        "lib/COPYING.txt": ("Text", ["Apache-2.0"], APACHE),
        "lib/d/e.h": ("C", ["Apache-2.0"], "int é;\n"),
        "node_modules/x.js": Omitted(f"{folder}/node_modules/x.js", "vendored"),
        "x.bin": Omitted(f"{folder}/x.bin", "binary"),
        "z.min.js": Omitted(f"{folder}/z.min.js", "minified"),
    }

    def item(path):
        if isinstance(found[path], Omitted):
            return found[path]
        language, license, text = found[path]
        return Document(prefix + path, text, source(path), {"path": path, "language": language, "licenses": license})

    return [item(path) for path in order]


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_tree(tmp_path):
    write(tmp_path, {**TREE, ".git/config": b"x", "toys/.git": b"gitdir: x"})
    order = sorted(TREE, key=lambda path: (path.count("/") > 0, path.rpartition("/")))
    assert same_in_units_of(CodeTree(str(tmp_path)), (1, 30, 100)) == tree_documents("", tmp_path, lambda path: str(tmp_path / path), order)


def test_links_and_unreadable_files(tmp_path):
    write(tmp_path, {"a.py": PYTHON.encode()})
    (tmp_path / "b.py").symlink_to("a.py")
    (tmp_path / "c.py").symlink_to("nowhere")
    assert omitted(read(CodeTree(str(tmp_path)))) == [("b.py", "link"), ("c.py", "link")]
    with pytest.raises(FileNotFoundError, match=r"code='.*none' does not exist; give a file"):
        CodeTree(str(tmp_path / "none")).units()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"code='.*empty' is a folder without a file to read \(it holds nothing\); expected code"):
        CodeTree(str(tmp_path / "empty")).units()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.xz", "tar.bz2"])
def test_archives(tmp_path, suffix):
    order = sorted(TREE, reverse=True)  # the licence comes last
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix[4:]}")
    path = tmp_path / f"toy.{suffix}"
    path.write_bytes(tar({f"./{name}": TREE[name] for name in order}, mode=mode))
    expected = tree_documents(f"toy.{suffix}/", path, lambda _: str(path), order)
    assert same_in_units_of(CodeTree(str(path)), (1,)) == expected
    assert read(CodeTree(str(tmp_path / f"*.{suffix}"))) == expected


def test_damaged_archives(tmp_path):
    data = tar({f"{n}.py": b"x = 1\n" * 300 for n in range(5)})
    blocks = 2048 + 512  # of a member and its header

    def found(bad, name="a.tar"):
        (tmp_path / name).write_bytes(bad)
        items = survives(CodeTree(str(tmp_path / name)), (1,))
        return [d.id for d in documents(items)], [reason.startswith("cannot be read") for _, reason in damage(items)]

    names = [f"a.tar/{n}.py" for n in range(5)]
    assert found(data) == (names, [])
    assert found(data[: 2 * blocks]) == (names[:2], [True])  # cut off between members
    assert found(data[: 2 * blocks + 100]) == (names[:2], [True])
    assert found(data[: 2 * blocks + 700]) == (names[:2], [True])
    assert found(data[: 3 * blocks] + b"\xff" * 512 + data[3 * blocks + 512 :]) == (names[:3], [True])
    assert found(b"") == ([], [True])
    assert found(lzma.compress(data)[:-40], "a.tar.xz")[1] == [True]


ROWS = [
    {
        "id": "f1",
        "repo_name": "a/toy",
        "ref": "refs/heads/main",
        "path": "a.py",
        "content": PYTHON,
        "binary": False,
        "license": "apache-2.0",
    },
    {"id": "f2", "sample_repo_name": "a/toy", "sample_path": "b.c", "content": "int x;\n", "binary": "false", "copies": "2"},
    {"id": "f3", "content": None, "binary": True},
    {"id": "f4", "path": "c.py", "content": None, "binary": False},
    {"id": "f5", "content": PYTHON},
    {"id": "f6", "path": "a_pb2.py", "content": PYTHON},
    {"id": "f7", "path": "d.py", "content": "x = '\ud800'\n"},
]


LINES = ndjson(*ROWS, escaped=True)


def test_json_lines(tmp_path):
    path = tmp_path / "contents-000.jsonl.gz"
    path.write_bytes(gzip.compress(LINES + b"[1]\n\n{nothing\n"))
    starts = [0, *itertools.accumulate(len(line) + 1 for line in LINES.splitlines())]

    def where(number):
        return f"{path}, byte {starts[number]}"

    assert same_in_units_of(CodeTable(str(tmp_path)), (1,)) == [
        Document(
            f"{path.name}@0",
            PYTHON,
            str(path),
            {"path": "a.py", "language": "Python", "licenses": ["Apache-2.0"], "repo": "a/toy", "hash": "f1", "ref": "refs/heads/main"},
        ),
        Document(
            f"{path.name}@{starts[1]}",
            "int x;\n",
            str(path),
            {"path": "b.c", "language": "C", "licenses": [], "repo": "a/toy", "hash": "f2"},
        ),
        Omitted(where(2), "binary"),
        Omitted(where(3), "has NoneType in its field 'content', expected text", damaged=True),
        Omitted(where(4), "no_path"),
        Omitted(where(5), "generated"),
        Omitted(where(6), "holds half a surrogate pair; repair or leave out that text", damaged=True),
        Omitted(where(7), "is list '[1]', expected an object", damaged=True),
        Omitted(
            f"{path}, byte {starts[7] + 5}",
            "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): '{nothing'",
            damaged=True,
        ),
    ]
    path.rename(tmp_path / "x.gz")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert len(same_in_units_of(CodeTable(str(tmp_path / "a.jsonl")), (1, 99, 500))) == 7


@functools.cache
def stack(count=10, group=2):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    import pyarrow

    rows = [
        {
            "hexsha": f"h{n}",
            "ext": "py",
            "lang": "Python",
            "max_stars_repo_path": f"src/a{n}",
            "max_stars_repo_name": "a/toy",
            "max_stars_repo_licenses": ["MIT", "apache-2.0"],
            "max_stars_count": n,
            "content": PYTHON * (n + 1),
        }
        for n in range(count)
    ]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file.getvalue()


def test_parquet(tmp_path):
    path = tmp_path / "data-00000-of-00001.parquet"
    path.write_bytes(stack())
    found = same_in_units_of(CodeTable(str(tmp_path)), (1, 1000, 2000))
    assert found == [
        Document(
            f"{path.name}:{n}",
            PYTHON * (n + 1),
            str(path),
            {"path": f"src/a{n}", "language": "Python", "licenses": ["MIT", "Apache-2.0"], "repo": "a/toy", "hash": f"h{n}"},
        )
        for n in range(10)
    ]
    assert [unit.start for unit in CodeTable(str(tmp_path)).units(1)] == [0, 1, 2, 3, 4]


def test_damaged_parquet(tmp_path):
    data = stack()
    for bad in (data[:-5], b"", b"PAR1" * 9, data[: len(data) // 2]):
        (tmp_path / "a.parquet").write_bytes(bad)
        assert [where for where, _ in damage(survives(CodeTable(str(tmp_path)), (1,)))] == ["a.parquet"]
    bad = bytearray(data)
    start = data.index(PYTHON.encode() * 2) if PYTHON.encode() * 2 in data else len(data) // 4
    bad[start - 60 : start + 60] = b"\xff" * 120
    (tmp_path / "a.parquet").write_bytes(bytes(bad))
    found = survives(CodeTable(str(tmp_path)), (1, 1000))
    assert len(documents(found)) >= 6 or damage(found)


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("a.py", PYTHON, ""),
        ("a.py", " \n", "empty"),
        ("a.qqq", PYTHON, "unknown_language"),
        ("src/vendor/a.go", "x", "vendored"),
        ("third_party/a.py", PYTHON, "vendored"),
        ("vendored.py", PYTHON, ""),
        ("js/jquery-3.1.1.js", "x", "vendored"),
        ("package-lock.json", "{}", "generated"),
        ("a.py", "# This file is auto-generated.\n" + PYTHON, "generated"),
        ("a.go", "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage a\n", "generated"),
        ("a.py", "x = 1\n" * 20 + "# autogenerated\n", ""),
        ("a.js", "x=1;" * 50, "minified"),
        ("a.py", "x = 1;" * 30, "mean_line_length"),
        ("a.py", "x = 1\n" * 99 + "y" * 1001, "max_line_length"),
        ("a.py", "x = 1\n" * 99 + "y" * 1000, ""),
        ("a.md", "word " * 500, ""),
        ("a.py", "()[]{}+-*/ x\n", "alphanumeric_share"),
        ("a.py", "()))xx", ""),
        ("a.py", "x = 1\n" * 200_000, "too_large"),
        ("a.py", "x\0", "binary"),
    ],
)
def test_rules(path, text, reason):
    assert CodeRules().judge(path, text, [])[3] == reason
    assert CodeRules().judge(path, text.encode(), [])[3] == reason


def test_chosen_languages_and_licenses():
    rules = CodeRules(languages=("Python",), licenses=("MIT", "Apache-2.0"))
    reasons = [rules.judge(*given)[3] for given in [("a.py", PYTHON, ["MIT"]), ("a.c", "x;", ["MIT"]), ("a.py", PYTHON, ["GPL-3.0"])]]
    assert reasons == ["", "language", "license"]
    assert rules.judge("a.py", PYTHON, [])[3] == "license"
    assert rules.judge("a.py", PYTHON, ["MIT", "GPL-2.0"])[3] == "license"
    assert rules.judge("a.py", "# SPDX-License-Identifier: MIT\n" + PYTHON, ["GPL-3.0"])[2:] == (["MIT"], "")
    assert CodeRules().judge("a.py", b"x = '\xe9'\n", [])[3] == "encoding"


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_alphanumeric_share(text):
    assert alphanumeric(text) == pytest.approx(sum(c.isalnum() for c in text) / len(text))


def test_languages():
    known = {"a/b.PY": "Python", "Makefile": "Makefile", "x/CMakeLists.txt": "CMake", "a.h": "C", "a.hpp": "C++", "a.tsx": "TypeScript"}
    assert {path: language(path) for path in known} == known
    assert language("run", "#!/bin/bash -e\n") == "Shell"
    assert language("run", "#! /usr/bin/env -S python3 -u\n") == "Python"
    assert (language("run"), language("run", "#!/bin/unknown\n"), language(".hidden"), language("a.", "x")) == ("", "", "", "")


def test_licenses():
    assert (licenses(MIT), licenses(APACHE), licenses("All rights reserved.")) == (["MIT"], ["Apache-2.0"], [UNKNOWN])
    assert declared("/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */") == [
        "GPL-2.0-only",
        "Linux-syscall-note",
        "MIT",
    ]
    assert declared("<!-- SPDX-License-Identifier: mit -->\n") == ["MIT"]
    assert spelt(["mit", "bsd-3-clause", "X", ""]) == ["MIT", "BSD-3-Clause", "X"]


def test_licenses_of_installed_packages():
    """Packages say their licence in their metadata, and ship its text."""
    checked, wrong = 0, []
    for folder in Path(pytest.__file__).parents[1].glob("*.dist-info"):
        said = re.search(r"^License-Expression: (MIT|Apache-2\.0|BSD-[23]-Clause|MPL-2\.0|ISC)$", (folder / "METADATA").read_text(), re.M)
        files = [path for path in folder.glob("licenses/*") if re.fullmatch(r"LICENSE(?:\.txt|\.md)?", path.name)]
        if said and len(files) == 1:
            checked += 1
            found = licenses(files[0].read_text(errors="replace"))
            if said.group(1) not in found:
                wrong.append((folder.name, said.group(1), found))
    assert len(wrong) <= checked // 20, wrong


TAR = tar({name: TREE[name] for name in ("LICENSE", "a/b.py", "lib/d/e.h")})


@FUZZ
@given(st.one_of(wrecks(TAR[:3600] + bytes(1024)), wrecks(gzip.compress(TAR))))
def test_any_bytes_as_archive(tmp_path, data):
    (tmp_path / "a.tar.gz").write_bytes(data)
    survives(CodeTree(str(tmp_path / "a.tar.gz")), ())


@FUZZ
@given(st.one_of(wrecks(LINES), wrecks(gzip.compress(LINES))))
def test_any_bytes_as_json_lines(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    survives(CodeTable(str(tmp_path)), (50,))


@FUZZ
@given(st.data())
def test_any_bytes_as_parquet(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data.draw(wrecks(stack(4))))
    survives(CodeTable(str(tmp_path)), (1,))


def test_values_compare():
    assert CodeTree("a") == CodeTree("a")
    assert dataclasses.replace(CodeTable("a"), path="b").rules == CodeRules()
