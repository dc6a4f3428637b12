"""Prose of five kinds in one corpus, with duplicates and benchmarks taken out over all of it.

python -m experiments.data.pretraining --dry-run true
python -m experiments.data.pretraining --workers 16

Of duplicates the first stays, so the cleanest source comes first: a page of the web that copies Wikipedia goes, and not the article. The steps
are those that suit all; sources that need their own (code) are recipes of their own, mixed in when training (`lmx.data.Blend`).
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.clean.privacy import Private
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Gutenberg, Reddit, StackExchange, Warc, Wikipedia

recipe = Recipe(
    name="pretraining",
    sources=(
        Wikipedia("dumps/wikipedia"),
        Gutenberg("dumps/gutenberg", unwrapped=True, name="books"),
        StackExchange("dumps/stackexchange", question_score=1, answer_score=0, answers=1),
        Reddit("dumps/reddit", min_score=3),
        Warc("dumps/commoncrawl", name="web"),
    ),
    steps=(
        Normalise(),
        Language(("en",)),
        GopherRepetition(),
        GopherQuality(min_words=30, max_words=10_000_000, min_alphabetic_words=0.7),
        Private(),
        Exact(),
        MinHash(),
        Uncontaminated(BENCHMARKS),
    ),
    tokenizer="bpe:32000",
    held_out=0.001,
    damaged="skip",
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
