"""Stack Exchange, in English: questions that somebody liked and somebody answered, each with its answers.

python -m experiments.data.stackexchange --path dumps/stackexchange --dry-run true
python -m experiments.data.stackexchange --path dumps/stackexchange --workers 16

The dump is a site's `.7z` each, or `Posts.xml`.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.exact import Exact
from lmx.data.clean.languages import Language
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.normalise import Normalise
from lmx.data.clean.privacy import Private
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import StackExchange

recipe = Recipe(
    name="stackexchange",
    sources=(StackExchange("dumps/stackexchange", question_score=1, answer_score=0, answers=1),),
    steps=(
        Normalise(),
        Language(("en",), threshold=0.5),  # code makes it less sure
        Private(ip="keep"),  # in questions on networks addresses are the matter
        Exact(),
        MinHash(),
        Uncontaminated(BENCHMARKS),
    ),
    tokenizer="bpe:32000",
    held_out=0.005,
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
