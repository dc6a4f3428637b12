"""Words, sentences, lines, paragraphs and n-grams: what filters, deduplication and decontamination count.

Words are those of spaCy's rules for English (the tokenizer that datatrove counts by, and that serves languages with spaces well): see
`pieces`. Languages written without spaces are not cut into words.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from lmx.data.clean.pieces import Remembered, pieces

TERMINAL = (  # Unicode's property Sentence_Terminal
    "!.?։؝؞؟۔܀܁܂߹࠷࠹࠽࠾।॥၊။።፧፨᙮᜵᜶។៕៖៙៚᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᭽᭾᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼⹓⹔。꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗"
    "！．？｡𐩖𐩗𐽕𐽖𐽗𐽘𐽙𐾆𐾇𐾈𐾉𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑥄𑥆𑩂𑩃𑪛𑪜𑱁𑱂𑻷𑻸𑽃𑽄𖩮𖩯𖫵𖬷𖬸𖭄𖺘𛲟𝪈"
)
PUNCTUATION = frozenset(  # marks that make no word, and control characters; datatrove's
    "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
    + TERMINAL
    + "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
)


def words(text: str) -> list[str]:
    """The words of a text, and its punctuation marks, in order."""
    return list(chain.from_iterable(map(pieces, text.split())))


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space at their ends stripped.

    One ends with a mark that is a word by itself (the full stop of `Dr.` is not) and the punctuation that follows it in the same line. An
    abbreviation that `words` does not know ends one too.
    """
    starts, ended, last = [0], False, 0
    for piece in re.finditer(r"\S+", text):
        shape, place = _shape(piece[0]), piece.start()
        if ended and text[last:place] not in ("", " "):
            starts.append(place)
            ended = False
        last = piece.end()
        if ended or "." in shape:
            for word, kind in zip(pieces(piece[0]), shape, strict=True):
                if ended and kind == "w":
                    starts.append(place)
                    ended = False
                ended |= kind == "."
                place += len(word)
    return [part for start, stop in zip(starts, [*starts[1:], len(text)], strict=True) if (part := text[start:stop].strip())]


def count_sentences(line: str) -> int:
    """How many `sentences` a line has; 1 at least."""
    if _GAP.search(line):
        return max(1, len(sentences(line)))
    return 1 + len(_NEXT.findall("".join(map(_shape, line.split()))))


def lines(text: str) -> list[str]:
    """Its lines that are not white space, as they are."""
    return [line for line in text.split("\n") if not (line == "" or line.isspace())]


def paragraphs(text: str) -> list[str]:
    """Its parts between empty lines."""
    return _BLANK.split(text.strip())


def ngrams(items: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    """Every run of n successive items, as tuples."""
    return zip(*(islice(items, i, None) for i in range(n)), strict=False)


_ENDS = frozenset(TERMINAL)
_BLANK = re.compile(r"\n{2,}")
_GAP = re.compile(r"\s\s|[^\S ]")
_NEXT = re.compile(r"\.[.p]*(?=w)")


def _shape_of(piece: str) -> str:
    """A letter for each word of a piece: `.` one that ends a sentence, `p` other punctuation, `w` the rest."""
    return "".join("." if word in _ENDS else "p" if all(unicodedata.category(c)[0] == "P" for c in word) else "w" for word in pieces(piece))


_shape = Remembered(_shape_of).__getitem__
