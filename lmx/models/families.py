"""Which functions compute a model: told by the type of its config, here and nowhere else."""

from types import ModuleType

from lmx.models import rwkv, transformer
from lmx.models.config import RWKV, Model


def functions(config: Model) -> ModuleType:
    """The module of a model's family. Each has the same functions, of the same form:

    - `specs(config)`, the parameter table, and `flops_per_token(config, length)`;
    - `forward(params, config, tokens, *, positions, segments, cache, dropout, edits, execution) -> Output`, and `empty_cache` to decode with;
    - the forward without a cache in parts, as a pipeline cuts it: `enter`, `share` (what its layers share), `run_part`, `leave`.
    """
    return rwkv if isinstance(config, RWKV) else transformer
