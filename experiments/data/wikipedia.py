"""Wikipedia, in English: an encyclopedia is clean, so little is done. Other languages are another dump and another `Language`.

python -m experiments.data.wikipedia --path dumps/wikipedia --dry-run true
python -m experiments.data.wikipedia --path dumps/wikipedia --workers 16

The dump is `enwiki-*-pages-articles-multistream*.xml.bz2`.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.decontaminate import Decontaminate
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Wikipedia

recipe = Recipe(
    name="wikipedia",
    sources=(Wikipedia("dumps/wikipedia"),),
    steps=(
        Normalise(),
        Language(("en",)),
        GopherQuality(min_words=30, min_alphabetic_words=0.7),  # goes: stubs, and lists of numbers
        Exact(),
        MinHash(),  # articles that a program wrote by the thousand, of villages and beetles
        Uncontaminated(BENCHMARKS, Decontaminate((), cut=True)),  # the passage goes and the article stays
    ),
    tokenizer="bpe:32000",
    held_out=0.005,
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
