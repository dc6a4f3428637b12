"""The plays of the first experiment, cleaned: raw text, a report, shards, and training in one command.

python -m experiments.data.plays --dry-run true
python -m experiments.data.plays --workers 2
python -m experiments.shakespeare --data.train recipe:experiments.data.plays --data.tokenizer corpus

With Gopher's thresholds as they are the dry run drops 16 of the 34 plays: speech has so many marks that under 80% of what is counted as words
have a letter. So that threshold is lower here, and all plays stay.
"""

from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Jsonl

recipe = Recipe(
    name="plays",
    sources=(Jsonl("experiments/data/shakespeare/train.jsonl.xz", name="plays"),),
    steps=(Normalise(), Language(("en",)), GopherRepetition(), GopherQuality(min_alphabetic_words=0.7), Exact(), MinHash()),
    tokenizer="bpe:1024",
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
