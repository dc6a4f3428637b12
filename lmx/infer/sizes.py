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
      least_rows: of the smallest program that only decodes.
    """

    rows: int
    chunk: int
    prompts: int
    least_rows: int = 1

    @property
    def decodes(self) -> tuple[int, ...]:
        """Rows of a step that only decodes: powers of two, and all."""
        most = max(self.rows, self.least_rows)
        return (*(2**i for i in range(most.bit_length()) if self.least_rows <= 2**i < most), most)

    @property
    def prefills(self) -> tuple[int, ...]:
        """Tokens of prompts: powers of two from some sixteenth, and as many as there can be."""
        least = max(16, self.chunk // 16)
        return (*(2**i for i in range(self.chunk.bit_length()) if least <= 2**i < self.chunk), self.chunk)

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """Pairs of rows that decode and tokens of prompts."""
        together = (0, self.decodes[-1])
        return (*((rows, 0) for rows in self.decodes), *((rows, tokens) for tokens in self.prefills for rows in together))

    def least(self, rows: int, tokens: int) -> tuple[int, int]:
        """The smallest that holds so many."""
        return min((pair for pair in self.all if pair[0] >= rows and pair[1] >= tokens and bool(pair[1]) == bool(tokens)), key=sum)
