"""Code under permissive licences, from checkouts or archives of them: The Stack's chain (Kocetkov et al. 2022).

python -m experiments.data.code --path dumps/code --dry-run true
python -m experiments.data.code --path dumps/code --workers 16

The dump is a folder of repositories. `CodeTable` in place of `CodeTree` reads The Stack's Parquet and BigQuery's JSON lines.
"""

from experiments.data.evaluations import BENCHMARKS
from lmx.data.benchmarks import Uncontaminated
from lmx.data.clean.exact import Exact
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.privacy import Private
from lmx.data.curate import Recipe
from lmx.data.curate.door import main
from lmx.data.sources import CodeRules, CodeTree

PERMISSIVE = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "CC0-1.0", "BSL-1.0")

recipe = Recipe(
    name="code",
    sources=(CodeTree("dumps/code", CodeRules(licenses=PERMISSIVE)),),
    steps=(
        # Keys and passwords only: numbers in code are seldom telephones, and authors' names and addresses are part of licences.
        Private(email="keep", phone="keep", ip="keep", credit_card="keep", iban="keep", national_id="keep"),
        Exact(lowercase=False, punctuation=False),  # signs and case tell programs apart
        MinHash(lowercase=False, punctuation=False),
        Uncontaminated(BENCHMARKS),
    ),
    tokenizer="bpe:32000",
    held_out=0.001,
)

if __name__ == "__main__":
    main(recipe, description=__doc__)
