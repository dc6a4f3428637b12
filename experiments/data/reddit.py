"""Reddit's submissions and comments, in English, that at least three people liked.

python -m experiments.data.reddit --path dumps/reddit --dry-run true
python -m experiments.data.reddit --path dumps/reddit --workers 16

The dump is PushShift's `RS_*.zst` and `RC_*.zst`. For the pages that submissions link to, as WebText has them, see `lmx.data.sources.links`.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherQuality, GopherRepetition
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.clean.privacy import Private
from lmx.data.clean.toxicity import ToxicWords
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import Reddit

recipe = Recipe(
    name="reddit",
    sources=(Reddit("dumps/reddit", min_score=3),),
    steps=(
        Normalise(),
        Language(("en",)),
        GopherRepetition(),
        GopherQuality(min_words=20),  # comments are short
        # The list is of some mild words. Give yours (lists=), and see in the report who loses: such lists drop texts by and about minorities.
        ToxicWords(rate=0.03),
        Private(),
        Exact(),
        MinHash(),  # bots
        Uncontaminated(BENCHMARKS),
    ),
    tokenizer="bpe:32000",
    held_out=0.001,
    damaged="skip",
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
