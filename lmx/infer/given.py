"""What stands in place of tokens' embeddings: an adapter's soft prompt, and what a model sees in images."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from jax import Array

from lmx.core.tree import Tree
from lmx.infer.texts import NONE, Opening
from lmx.models.transformer import Embedded


class Given:
    """Vectors of openings, on the host: a step takes those of its tokens.

    Args:
      width: of a vector.
      keep: so many openings' images are not looked at again.
      look: `[1, channels, height, width]` to `[1, places, width]`.
    """

    def __init__(self, width: int, keep: int, look: Callable[[np.ndarray], Array]):
        self._width, self._keep, self._look = width, keep, look
        self._soft = np.zeros((0, width), np.float32)
        self._seen: OrderedDict[bytes, np.ndarray] = OrderedDict()  # by the openings' keys, the oldest first

    def load(self, params: Tree) -> None:
        """Other parameters, of which it has nothing yet."""
        self._seen.clear()
        self._soft = np.asarray(params.get("virtual", {}).get("embeddings", self._soft[:0]), np.float32)

    def blank(self, length: int) -> Embedded:
        """So many tokens that are all their own."""
        return Embedded(np.zeros((1, length, self._width), np.float32), np.zeros((1, length), bool))

    def put(self, there: Embedded, to: np.ndarray, opening: Opening, places: np.ndarray) -> None:
        """What stands in some places of what is read goes to others."""
        which = opening.vectors[places]
        real = which != NONE
        there.where[0, to] = real
        there.vectors[0, to[real]] = self._vectors(opening)[which[real]]

    def _vectors(self, opening: Opening) -> np.ndarray:
        if opening.images is None:
            return self._soft
        if opening.key not in self._seen:
            seen = [np.asarray(self._look(image[None]), np.float32)[0] for image in opening.images]
            self._seen[opening.key] = np.concatenate([self._soft, *seen])
            if len(self._seen) > self._keep:
                self._seen.popitem(last=False)
        return self._seen[opening.key]
