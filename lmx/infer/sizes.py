"""What programs are compiled for: a number of rows that decode and of tokens of prompts, of which there are few."""

from dataclasses import dataclass

FEWEST = 16
"""Rows of the smallest step on a GPU, whose tensor cores multiply so many at once; of one alone XLA writes the products down before it adds them."""


@dataclass(frozen=True)
class Sizes:
    """What programs are compiled for.

    Attributes:
      rows: sequences that run at a time.
      chunk: tokens of prompts in one step.
      prompts: prompts that share a step.
      wide: of hardware that multiplies `FEWEST` rows in the time of one: few programs do.
    """

    rows: int
    chunk: int
    prompts: int
    wide: bool = False

    @property
    def decodes(self) -> tuple[int, ...]:
        """Rows of a step that only decodes: powers of two, and all."""
        least = FEWEST if self.wide else 1
        most = max(self.rows, least)
        return (*(2**i for i in range(most.bit_length()) if least <= 2**i < most), most)

    @property
    def prefills(self) -> tuple[int, ...]:
        """Tokens of prompts: the chunk, its half, and so on (or an eighth); a short prompt is not to cost what a long one does."""
        parts = (self.chunk // (8 if self.wide else 2) ** i for i in range(5))
        return tuple(sorted({self.chunk, *(part for part in parts if part >= 16)}))

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """Pairs of rows that decode and tokens of prompts."""
        together = (0, self.decodes[-1])
        return (*((rows, 0) for rows in self.decodes), *((rows, tokens) for tokens in self.prefills for rows in together))

    def least(self, rows: int, tokens: int) -> tuple[int, int]:
        """The smallest that holds so many."""
        return min((pair for pair in self.all if pair[0] >= rows and pair[1] >= tokens and bool(pair[1]) == bool(tokens)), key=sum)
