"""Web pages of CommonCrawl, in English: FineWeb's chain (Penedo et al. 2024), with exact duplicates and benchmarks taken out.

python -m experiments.data.web --path dumps/commoncrawl --dry-run true
python -m experiments.data.web --path dumps/commoncrawl --workers 16

The dump is `.warc.gz` files. Their HTML takes most of the time; `Wet` in place of `Warc` reads the text that CommonCrawl extracts, which has
the menus in it too.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.c4 import C4Quality
from lmx.data.clean.exact import Exact
from lmx.data.clean.fineweb import FineWebQuality
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.privacy import Private
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Warc

recipe = Recipe(
    name="web",
    sources=(Warc("dumps/commoncrawl", name="web"),),
    steps=(
        Language(("en",)),
        GopherRepetition(),
        GopherQuality(),
        C4Quality(line_ends=("",)),  # FineWeb keeps lines whatever they end in: C4's rule costs a third of the text
        FineWebQuality(),
        Private(),
        Exact(),
        MinHash(),
        Uncontaminated(BENCHMARKS),
    ),
    tokenizer="bpe:32000",
    held_out=0.001,
    damaged="skip",  # in a crawl some records always are; the report lists them
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
