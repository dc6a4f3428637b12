"""lmx's deduplication beside datatrove's and datasketch's: decisions on real text with planted duplicates.

    pip install 'datatrove[processing]==0.10.1' datasketch==2.0.0     (into an environment of their own, with lmx's)
    python tests/data/check_duplicates.py FILE.jsonl FIELD

FILE holds documents of real text, 1,000 or more. Printed are the pairs of documents that each tool, under three seeds, puts into one cluster,
by their exact Jaccard similarity, beside what the S-curve expects; then in how many pairs tools, and seeds of one tool, disagree. Exact and
paragraph deduplication are compared document by document. Not a test: it needs packages that lmx does not.
"""

import json
import re
import sys
import tempfile
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np

from lmx.data.clean.exact import Exact
from lmx.data.clean.groups import components
from lmx.data.clean.minhash import MinHash, s_curve
from lmx.data.clean.step import Drop, Ragged
from lmx.data.documents import Document

BANDS, ROWS, NGRAM, SEEDS = 14, 8, 5, (1, 2, 3)
Pairs = set[tuple[int, int]]


def planted(texts: list[str], count: int, seed: int = 0) -> list[str]:
    """Texts, and copies of `count` of them with a share of 0 to 12% of their words changed."""
    draw = np.random.default_rng(seed)
    copies = []
    for source in draw.choice(len(texts), count, replace=False):
        words, share = texts[source].split(" "), draw.uniform(0, 0.12)
        copies.append(" ".join(f"other{draw.integers(10**6)}" if draw.random() < share else word for word in words))
    order = draw.permutation(len(texts) + count)
    return [(texts + copies)[i] for i in order]


def words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]|_", " ", text.casefold()).split()


def similarities(texts: list[str]) -> dict[tuple[int, int], float]:
    """The exact Jaccard similarity of every two documents that share an n-gram."""
    grams, holders = [], defaultdict(list)
    for number, text in enumerate(texts):
        found = words(text)
        grams.append({tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)})
        for gram in grams[-1]:
            holders[gram].append(number)
    pairs = {pair for numbers in holders.values() for pair in combinations(numbers, 2)}
    return {(a, b): len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a, b in pairs}


def together(heads: list[int]) -> Pairs:
    """The pairs of documents that are in one cluster."""
    clusters = defaultdict(list)
    for number, head in enumerate(heads):
        clusters[head].append(number)
    return {pair for members in clusters.values() for pair in combinations(members, 2)}


def joined(count: int, edges: list[tuple[int, int]]) -> Pairs:
    ends = np.array(edges, np.int64).reshape(-1, 2)
    return together(components(count, ends[:, 0], ends[:, 1]).tolist())


def resolved(step, texts: list[str]) -> Ragged:
    parts = [step.extract(Document(str(i), text, "here")) for i, text in enumerate(texts)]
    return step.resolve(Ragged(np.concatenate(parts), np.append(0, np.cumsum(list(map(len, parts))))))


def by_lmx(texts: list[str], seed: int) -> Pairs:
    found = resolved(MinHash(ngram=NGRAM, bands=BANDS, rows=ROWS, seed=seed), texts)
    return together([int(found[i][0]) if len(found[i]) else i for i in range(len(texts))])


def by_datatrove(texts: list[str], seed: int) -> Pairs:
    import struct

    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature

    settings = MinhashConfig(seed=seed, n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        signatures, buckets = f"{folder}/signatures", f"{folder}/buckets"
        MinhashDedupSignature(signatures, settings).run((Theirs(text=text, id=str(i)) for i, text in enumerate(texts)), 0, 1)
        for rank in range(BANDS):
            MinhashDedupBuckets(signatures, buckets, config=settings).run(None, rank, BANDS)
        edges = [
            (pair[1], pair[3]) for path in sorted(Path(buckets).glob("*.dups")) for pair in struct.iter_unpack("<4I", path.read_bytes())
        ]
    return joined(len(texts), edges)


def by_datasketch(texts: list[str], seed: int) -> Pairs:
    from datasketch import MinHash as Theirs
    from datasketch import MinHashLSH

    index, edges = MinHashLSH(params=(BANDS, ROWS), num_perm=BANDS * ROWS), []
    for number, text in enumerate(texts):
        if found := words(text):
            signature = Theirs(BANDS * ROWS, seed=seed)
            signature.update_batch([" ".join(found[i : i + NGRAM]).encode() for i in range(max(1, len(found) - NGRAM + 1))])
            edges += [(other, number) for other in index.query(signature)]
            index.insert(number, signature)
    return joined(len(texts), edges)


def exact_by_datatrove(texts: list[str]) -> set[int]:
    """The documents that datatrove drops, of texts folded as lmx folds them."""
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups

    def content(document: Theirs) -> str:
        return document.text

    settings = ExactDedupConfig(content)

    def documents():
        return (Theirs(text=" ".join(words(text)), id=str(i)) for i, text in enumerate(texts))

    with tempfile.TemporaryDirectory() as folder:
        ExactDedupSignature(f"{folder}/s", settings).run(documents(), 0, 1)
        ExactFindDedups(f"{folder}/s", f"{folder}/d", settings).run(None, 0, 1)
        kept = {int(document.id) for document in ExactDedupFilter(f"{folder}/d", settings).run(documents(), 0, 1)}
    return set(range(len(texts))) - kept


def main(path: str, field: str) -> None:
    with open(path, encoding="utf-8") as file:
        texts = list(dict.fromkeys(json.loads(line)[field] for line in file))[:4000]
    texts = planted(texts, len(texts) // 5)
    exact = similarities(texts)
    print(f"{len(texts)} documents, {len(exact)} pairs that share a {NGRAM}-gram")
    found = {
        f"{name} {seed}": tool(texts, seed)
        for name, tool in (("lmx", by_lmx), ("datatrove", by_datatrove), ("datasketch", by_datasketch))
        for seed in SEEDS
    }
    bins = [min(int(10 * value), 9) for value in exact.values()]
    curve = [s_curve(value, BANDS, ROWS) for value in exact.values()]
    print("similarity  ", *(f"{i / 10:>6.1f}" for i in range(10)))
    print("pairs       ", *(f"{n:6}" for n in np.bincount(bins, minlength=10)))
    print("the S-curve ", *(f"{n:6.0f}" for n in np.bincount(bins, curve, minlength=10)))
    for name, pairs in found.items():
        count = np.bincount([min(int(10 * exact.get(pair, 0)), 9) for pair in pairs], minlength=10)
        missed = sum(value >= 0.95 and pair not in pairs for pair, value in exact.items())
        print(f"{name:12}", *(f"{n:6}" for n in count), f"  of 0.95 and more {missed} missed")
    print("pairs that only one of two has:")
    for a, b in combinations(found, 2):
        if a.split()[0] == b.split()[0] or a.split()[1] == b.split()[1] == "1":
            apart = [round(exact.get(pair, 0.0), 2) for pair in found[a] ^ found[b]]
            between = f", of similarity {min(apart)} to {max(apart)}" if apart else ""
            print(f"  {a} and {b}: {len(apart)}{between}")
    doubled = texts + texts[::7]
    step, mine = Exact(), set()
    answers = resolved(step, doubled)
    for number, text in enumerate(doubled):
        if isinstance(step.apply(Document(str(number), text, "here"), answers[number]), Drop):
            mine.add(number)
    theirs = exact_by_datatrove(doubled)
    print(f"exact: lmx drops {len(mine)}, datatrove {len(theirs)}, only one of them {len(mine ^ theirs)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
