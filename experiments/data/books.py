"""Project Gutenberg's books, in English, a paragraph a line.

python -m experiments.data.books --path dumps/gutenberg --dry-run true
python -m experiments.data.books --path dumps/gutenberg --workers 16

The dump is a mirror's folders of `.txt` files. `PG19` and `BookCorpus` in place of `Gutenberg` read those releases.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.decontaminate import Decontaminate
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Gutenberg

recipe = Recipe(
    name="books",
    sources=(Gutenberg("dumps/gutenberg", unwrapped=True, name="books"),),
    steps=(
        Normalise(),
        Language(("en",)),
        GopherRepetition(),
        # Books are longer than pages, and plays have more marks (experiments/data/plays.py).
        GopherQuality(max_words=10_000_000, min_alphabetic_words=0.7),
        Exact(),
        MinHash(),  # the same book in another edition
        Uncontaminated(BENCHMARKS, Decontaminate((), cut=True, passages=100)),  # no book goes for a few quotations
    ),
    tokenizer="bpe:32000",
    held_out=0.01,
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
