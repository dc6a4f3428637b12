"""Finding listed words however they are written: `d4mn`, `d a m n`, `d.a.m.n`, `daaamn`, `dаmn` with a Cyrillic a, full-width, struck through.

The other half is what must not be found: a word within a longer one (Scunthorpe), across words (`he'll`, `push it`), a doubled letter that makes
another word (`god`, `good`), a number (`455`). So:

- A word is found as a whole only: what stands between white space, or a run of letters and signs in there, less the signs at its ends.
- Letters may be replaced by digits, signs and letters that look like them; with digits, two letters stay, or as many as there are digits.
- A letter may be drawn out: three times or more. Twice only where English never doubles it (`daamn`), else `rapped` were `raped`.
- Signs within what stands between white space are left out (`d*a-mn`), except an apostrophe, and except a stop before a capital letter, which
  ends a sentence.
- A phrase is found over any signs and white space between its words; one whose longest word is itself listed counts as that word.
- Three or more single letters after one another are a spelt-out word, behind the words a, i, u, r (`u r a ...`) too.

Letters that are left out or masked (`d**n`), and respelling by sound, are not found: list them. In scripts without spaces only whole runs are.
A string all in Russian or all in Greek letters is a word of that language, whatever it looks like.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

# What looks like a Latin letter and is not made one by NFKD: mostly Cyrillic, Greek, Coptic, Armenian, Cherokee, Lisu, IPA, small capitals.
ALIKE = {
    "a": "аɑαᴀꭺɐ∀ⱥꓮ", "b": "вьƅʙбβᏼƀɓꓐꮟ", "c": "сϲᴄⅽↄ¢ꮯƈꓚⲥ", "d": "ԁᴅժđɗⅾꭰꓒꓓꮷ", "e": "еєҽεᴇꭼ℮ɛёəꓰⴹ", "f": "ғƒꜰϝքꓝꞙ", "g": "ɡԍɢցꮆǥꓖꮐ",
    "h": "нһհʜꮋħꓧꮒⲏ", "i": "іıɩιɪꭵⅰꓲⲓꙇ", "j": "јϳᴊꭻʝꓙ", "k": "кκᴋꮶƙꓗⲕ", "l": "ʟⅼłꮮƚꓡ", "m": "мᴍⅿꮇꓟⲙ", "n": "пηոɴռńꓠⲛ", "o": "оοσօᴏøө०ⲟ๐ꓳ",
    "p": "рρᴘꮲþꓑⲣ", "q": "ԛզգ", "r": "гʀꭱꮁꓣꮢⲅ", "s": "ѕꜱꮪʂꓢꮥƽ", "t": "тτᴛꭲŧꓔⲧ", "u": "υսᴜцʋꓴ", "v": "ѵνᴠꮩⅴꓦ", "w": "ԝшωᴡꮃɯꓪꮤѡա",
    "x": "хχⅹ×ꓫⲭⵝ", "y": "уүγʏꮍꓬꭹⲩɣყỿ", "z": "ᴢꮓʐƶꓜ",
}  # fmt: skip
CAPITALS = str.maketrans("ΗΜΝΥΖϹՏ", "hmnyzcs")  # which do not look like their small letters


def _fold_table() -> dict[int, str]:
    table = {ord(sign): letter for letter, signs in ALIKE.items() for sign in signs}
    table |= dict.fromkeys(map(ord, "\u04cf\u04c0\u01c0\u2223"), "|")  # an i or an l
    for start in (0x1F130, 0x1F150, 0x1F170, 0x1F1E6):  # letters in boxes and of flags
        table |= {start + i: chr(ord("a") + i) for i in range(26)}
    for sign, letter in list(table.items()):  # NFKD makes other letters of some
        form = unicodedata.normalize("NFKD", chr(sign))
        if len(form) == 1 and not form.isascii():
            table.setdefault(ord(form), letter)
    return table


FOLD = _fold_table()
LEET = {"a": "4@", "b": "8", "e": "3€", "g": "96", "i": "1!|", "l": "1!|", "o": "0", "s": "5$", "t": "7+", "u": "v", "z": "2"}
ENDING = "!|+"  # those that also end a sentence or stand at a word's side
SIGNS = "@€!|$+"  # those of them that are neither letters nor digits
CANON = str.maketrans({sign: letter for letter, signs in LEET.items() if letter != "l" for sign in signs} | {"l": "i"})
"""Every sign to one of the letters that it may stand for, and those letters to the same one."""
UNDOUBLED = frozenset("ahijqukvwxy")
ODD = "*~^=#\\\u00b7\u2022"  # signs that do not stand between words

OTHERS = re.compile(r"[^\x00-\x7f]+")
DRAWN = re.compile(r"(.)\1+", re.DOTALL)
SENTENCE = re.compile(r"(?<=\w)[.!?:;,]+(?=[A-Z])")
NATIVE = re.compile("[\u0430-\u044f]+|[\u03b1-\u03c9]+")  # a word all in Russian, or Greek, letters is one of that language
LETTERS = re.compile(r"[^\W\d_]+")
EDGE = re.compile(rf"^[^\w{re.escape(SIGNS)}]+|[^\w{re.escape(SIGNS)}]+$|^_+|_+$")
OUTSIDE, OUTSIDE_ALL = re.compile(rf"[^\w{re.escape(SIGNS)}]+|_+"), re.compile(r"[\W_]+")
BETWEEN = re.compile(rf"[^\w{re.escape(SIGNS + ODD)}]+")
APOSTROPHE = re.compile("['\u2019\u02bc`]")
BEFORE = re.compile("[aiur]{0,3}")  # single letters that are words themselves
ENDS = ".,;:?()[]\"'*-"
FOUND, PART, NOTHING = "\n", "\t", " "
SPELT = re.compile(r"\S{3,}")
LONGEST = 200  # characters of a string between white space; in longer ones only runs of letters are looked at
KNOWN = 1_000_000  # strings between white space that are remembered


def fold(text: str, *, alike: bool = True) -> str:
    """In lower case, marks and invisible signs gone, digits made 0 to 9, and letters that look like Latin ones made those."""
    return text.lower() if text.isascii() else OTHERS.sub(lambda match: _folded(match[0], alike), text).lower()


@lru_cache(maxsize=100_000)
def _folded(text: str, alike: bool) -> str:
    text = unicodedata.normalize("NFKD", text.translate(CAPITALS) if alike else text)  # which makes other letters of some
    text = unicodedata.normalize("NFKD", (text.translate(CAPITALS) if alike else text).lower())
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return text.translate(FOLD) if alike else text


def fold_word(text: str) -> str:
    """The same of what stands between white space, unless it is all in another alphabet."""
    if text.isascii():
        return text.lower()
    plain = fold(text, alike=False)
    return plain if NATIVE.fullmatch("".join(LETTERS.findall(plain))) else fold(text)


def canonical(word: str) -> str:
    """What all ways of writing a folded word share (and, seldom, another word's)."""
    return DRAWN.sub(r"\1", word.translate(CANON))


class Finder(dict):
    """Finds words of a list. It is a dictionary of what strings between white space hold, because most come again and again: a sign each for a
    word found, for part of a phrase and for nothing; a single letter as it is; of punctuation, nothing.

    Raises ValueError for an entry without letters.
    """

    def __init__(self, words: tuple[str, ...]):
        super().__init__()
        self._forms: dict[str, list[tuple[str, re.Pattern]]] = {}
        self._phrases: dict[str, list[tuple[str, re.Pattern]]] = {}  # by their longest word
        for word in words:
            forms = dict.fromkeys((fold_word(word), fold(word)))
            parts = [[piece for part in re.split(r"[\s_-]+", form) if (piece := OUTSIDE_ALL.sub("", part))] for form in forms]
            if not LETTERS.search(word):
                raise ValueError(f"the word list has {word!r}, which has no letters")
            for split in parts:
                self._forms.setdefault(canonical("".join(split)), []).append((word, re.compile("".join(map(_pattern, split)))))
                if len(split) > 1:
                    apart = r"[\W_]+".join(map(_pattern, split))
                    pattern = re.compile(rf"(?<![^\W_]){apart}(?![^\W_])")
                    self._phrases.setdefault(canonical(max(split, key=len)), []).append((word, pattern))

    def find(self, text: str) -> Counter[str]:
        """The listed words in a text, as the list has them, and how often."""
        strings = text.split()
        signs = list(map(self.__getitem__, strings))
        line = "".join(signs)
        found = Counter()
        if FOUND in line:
            found.update(word for string, sign in zip(strings, signs, strict=True) if FOUND in sign for word in self._words(string))
        for run in SPELT.findall(line):
            found.update(self._spelt(run))
        if PART in line:
            parts = dict.fromkeys(string for string, sign in zip(strings, signs, strict=True) if sign == PART)
            phrases = dict.fromkeys(phrase for string in parts for key in self._keys(string) for phrase in self._phrases.get(key, ()))
            folded = fold(text)
            found.update({word: count for word, pattern in phrases if (count := len(pattern.findall(folded)))})
        return found

    def __missing__(self, string: str) -> str:
        if len(string) > LONGEST:
            return FOUND * len(self._words(string)) or NOTHING
        if len(self) >= KNOWN:
            self.clear()
        sign = self[string] = self._sign(string)
        return sign

    def _sign(self, string: str) -> str:
        if (inside := string.strip(ENDS)).isalpha() and inside.isascii():  # most are, and need no more
            form = canonical(inside.lower())
            if len(form) > 1 and form not in self._forms and form not in self._phrases:
                return NOTHING
        if words := self._words(string):
            return FOUND * len(words)
        part = EDGE.sub("", fold_word(string))
        alone = part.strip(ENDING) or part[:1]
        if len(set(alone)) <= 1:
            return alone
        return NOTHING if self._phrases.keys().isdisjoint(self._keys(string)) else PART

    def _keys(self, string: str) -> list[str]:
        return [canonical(piece) for piece in BETWEEN.split(EDGE.sub("", fold_word(string)))]

    def _words(self, string: str) -> list[str]:
        if len(string) > LONGEST:
            return [word for run in LETTERS.findall(fold_word(string)) for word in self._word(run)]
        return [word for sentence in SENTENCE.sub(" ", string).split() for word in self._in(EDGE.sub("", fold_word(sentence)))]

    def _in(self, part: str) -> list[str]:
        """The words within a folded string without white space: it is one, or what stands between its signs is, or its runs of letters are."""
        if part.isalpha():
            return self._word(part)
        if not APOSTROPHE.search(part) and (word := self._written(part)):
            return word
        found = []
        for piece in BETWEEN.split(part):
            found += self._written(piece) or [word for run in LETTERS.findall(piece) if run != piece for word in self._word(run)]
        return found

    def _written(self, part: str) -> list[str]:
        """Signs that may be letters are, or not at the ends, or none is."""
        some = OUTSIDE.sub("", part)
        forms = [some, OUTSIDE_ALL.sub("", part)]
        if (core := some.strip(ENDING)) != some and core:
            before, behind = some.split(core)[0][-1:], some.rsplit(core)[-1][:1]
            forms += [core, before + core, core + behind, before + core + behind]
        return next((word for form in forms if (word := self._word(form))), [])

    def _word(self, unit: str) -> list[str]:
        for word, pattern in self._forms.get(canonical(unit), ()) if len(unit) <= LONGEST else ():
            letters = sum(map(str.isalpha, unit))
            if pattern.fullmatch(unit) and (letters > 1 or sum(map(str.isdigit, unit)) <= letters):
                return [word]
        return []

    def _spelt(self, run: str) -> list[str]:
        run = run if NATIVE.fullmatch(run) else run.translate(FOLD)
        for skip in range(BEFORE.match(run).end() + 1):
            if len(run) - skip >= 3 and (word := self._word(run[skip:])):
                return word
        return []


@lru_cache(maxsize=16)
def finder(words: tuple[str, ...]) -> Finder:
    """One for each list in a process: what it remembers serves all documents."""
    return Finder(words)


def _pattern(word: str) -> str:
    """All ways of writing a folded word without signs between its letters."""
    parts = []
    for letter, run in groupby(word):
        count, one = len(list(run)), f"[{re.escape(letter + LEET.get(letter, ''))}]"
        more = f"{one}{{{count},}}" if count > 1 or letter in UNDOUBLED else f"{one}(?:{one}{{2,}})?"
        parts.append(more)
    return "".join(parts)
