"""Where a text ends, and what of it may be shown: tokens to text as they come, and strings that end it wherever tokens are cut."""

from collections.abc import Sequence
from typing import Literal

from lmx.data.tokenizers import Tokenizer

Reason = Literal["stop_id", "stop_string"]

REPLACEMENT = "\ufffd"
"""What tokenizers show for bytes that are no UTF-8, or not yet."""


class Stopper:
    """One text, token by token.

    What is released, piece after piece, is the decoding of all tokens, up to the first stop string in it. (The first to be complete; of two
    that are complete with the same character, the longer: so that it does not matter where tokens are cut.) Held back is what may yet begin a
    stop string, and bytes that may yet become a character.

    New tokens are decoded behind those of the last piece, and what those alone say is left out: a tokenizer may drop a space before its first
    token. One that takes back what it has decoded cannot be released piece by piece just as it decodes a whole: old vocabularies clean a space
    up before a full stop (`clean_up_tokenization_spaces`), and where one of several bytes in a row is no UTF-8, `tokenizers` shows none of them as
    a character. What was released stays then, and what comes after is decoded alone.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        """Raises ValueError for a stop string that is empty or none, or `stop` that is one string."""
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r} is one string; give a list of them")
        if strange := [one for one in stop if not isinstance(one, str)]:
            raise ValueError(f"stop={list(stop)!r} has {strange[0]!r}, which is no string; tokens that end a text are stop_ids")
        if "" in stop:
            raise ValueError(f"stop={list(stop)!r} has an empty string, which ends every text before it begins; leave it out")
        self.tokenizer, self.stop, self.stop_ids = tokenizer, tuple(stop), frozenset(stop_ids)
        self.stopped_by: int | str | None = None
        """The token or string that ended the text."""
        self._ids: list[int] = []
        self._start = 0  # where decoding begins, tokens before are done with
        self._read = 0  # tokens before have been decoded
        self._held = ""  # decoded, not released
        self._done = False

    def push(self, token: int) -> tuple[str, Reason | None]:
        """The text that may now be released, and why the text has ended, if it has. A stop id is no part of it.

        Raises ValueError after the end.
        """
        if self._done:
            raise ValueError(f"token {token} comes after the end of its text")
        if token in self.stop_ids:
            text = self.finish()
            self.stopped_by = token if self.stopped_by is None else self.stopped_by
            return text, "stop_id" if self.stopped_by == token else "stop_string"
        self._ids.append(token)
        text = self._released(self._decoded(whole=False))
        return text, "stop_string" if self._done else None

    def finish(self) -> str:
        """What was held back, where the text ends without a stop string. Nothing after the end."""
        if self._done:
            return ""
        text = self._released(self._decoded(whole=True))
        if not self._done:
            text, self._held, self._done = text + self._held, "", True
        return text

    def _decoded(self, *, whole: bool) -> str:
        """The text of tokens that were not decoded yet; none while it ends amid a character, unless it is the `whole`."""
        known = self.tokenizer.decode(self._ids[self._start : self._read])
        text = self.tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT) and not whole:
            return ""
        alone = self.tokenizer.decode(self._ids[self._read :])
        # Tokens that alone are no text (a space that is dropped, special ones) do not keep the space after them from being dropped.
        self._start, self._read = self._read if alone else self._start, len(self._ids)
        return text[len(known) :] if text.startswith(known) else alone

    def _released(self, new: str) -> str:
        """What may be released with more text decoded; the end, where it completes a stop string."""
        text = self._held + new
        for end in range(len(self._held) + 1, len(text) + 1):
            if found := [stop for stop in self.stop if text.endswith(stop, 0, end)]:
                self.stopped_by, self._done, self._held = max(found, key=len), True, ""
                return text[: end - len(self.stopped_by)]
        longest = max(map(len, self.stop), default=1)
        places = range(max(0, len(text) - longest + 1), len(text))
        keep = next((i for i in places if any(stop.startswith(text[i:]) for stop in self.stop)), len(text))
        self._held = text[keep:]
        return text[:keep]
