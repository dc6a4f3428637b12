"""Which licence a text is: its SPDX name, by its title or by the sentences that no other licence has."""

import re
from collections.abc import Iterable

UNKNOWN = "LicenseRef-unknown"
"""There is a licence, and it is none that is known here."""

FILE = re.compile(
    r"(?:mit-|apache-)?(?:un)?licen[cs]es?(?:[-_.].*)?|copying(?:[-_.].*)?|(?:gpl|lgpl|mit|apache|bsd).{0,8}\.(?:txt|md)", re.I
)
"""The names of files that hold one."""

HEADER = re.compile(r"SPDX-License-Identifier:\s*([^\r\n*]+)")
HEAD = 400  # characters in which a licence's title stands
TITLES = {
    "AGPL-3.0": r"gnu affero general public license version 3",
    "LGPL-3.0": r"gnu lesser general public license version 3",
    "LGPL-2.1": r"gnu lesser general public license version 2\.1",
    "LGPL-2.0": r"gnu library general public license version 2",
    "GPL-3.0": r"gnu general public license version 3",
    "GPL-2.0": r"gnu general public license version 2",
    "Apache-2.0": r"apache license version 2\.0|licensed under the apache license 2\.0",
    "MPL-2.0": r"mozilla public license,? version 2\.0",
    "MPL-1.1": r"mozilla public license version 1\.1",
    "EPL-2.0": r"eclipse public license v 2\.0",
    "EPL-1.0": r"eclipse public license v 1\.0",
    "CC0-1.0": r"cc0 1\.0 universal|creative commons legal code cc0",
    "CC-BY-SA-4.0": r"attribution sharealike 4\.0 international",
    "CC-BY-4.0": r"attribution 4\.0 international",
    "BSL-1.0": r"boost software license version 1\.0",
    "Artistic-2.0": r"artistic license 2\.0",
    "Unlicense": r"this is free and unencumbered software released into the public domain",
    "WTFPL": r"verbatim or modified copies of this license document and changing it is allowed as long as the name is changed",
}
MIT = "permission is hereby granted free of charge to any person obtaining a copy of this software"
ISC = re.compile("permission to use copy modify and (?:or )?distribute this software for any purpose with or without fee is hereby granted")
BSD = "redistribution and use in source and binary forms"
NOTICE = re.compile(
    "the above copyright notice and this permission notice (?:including the next paragraph )?(?:shall be included|appear) in all copies"
)
PSF = "python software foundation license version 2"
ZLIB = "altered source versions must be plainly marked as such and must not be misrepresented"
NAMES = {
    name.lower(): name
    for name in (*TITLES, "MIT", "MIT-0", "ISC", "0BSD", "BSD-2-Clause", "BSD-3-Clause", "BSD-4-Clause", "Zlib", "PSF-2.0", "Artistic-1.0")
}


def licenses(text: str) -> list[str]:
    """The licences that a licence file holds; UNKNOWN where it is none that is known. (Whether a GPL is `-only` or `-or-later` is said by the
    files under it, not by its text.)"""
    words = " ".join(re.findall(r"[a-z0-9.]+", text[:200_000].lower().replace("“", "").replace("”", "")))
    words = re.sub(r"\.(?= |$)", "", words)
    for name, title in TITLES.items():
        if re.search(title, words[:HEAD]):
            return [name]
    found = []
    notice = NOTICE.search(words)
    if PSF in words:
        return ["PSF-2.0"]
    if MIT in words:
        found.append("MIT" if notice else "MIT-0")
    if ISC.search(words):
        found.append("ISC" if notice else "0BSD")
    if BSD in words:
        clauses = 4 if "all advertising materials mentioning" in words else 3 if "endorse or promote products" in words else 2
        found.append(f"BSD-{clauses}-Clause")
    if ZLIB in words:
        found.append("Zlib")
    return found or [UNKNOWN]


def declared(text: str) -> list[str]:
    """The licences that a source file's own `SPDX-License-Identifier` names, in its first 2,000 characters; none where it has none."""
    match = HEADER.search(text[:2000])
    return spelt(re.split(r"\s+(?:AND|OR|WITH)\s+", re.sub(r"-->|[()\"';]", "", match.group(1)).strip())) if match else []


def spelt(names: Iterable[str]) -> list[str]:
    """Names as SPDX spells them: GitHub's exports have them in lower case."""
    return [NAMES.get(name.strip().lower(), name.strip()) for name in names if name and name.strip()]
