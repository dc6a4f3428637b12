"""What a piece of text without white space is made of: words, and the punctuation around them.

These are spaCy's rules for English, said shortly. A piece loses the punctuation at its ends (`"Well,` is `"`, `Well`, `,`), is cut inside at
hyphens, slashes and such between letters, and contractions come apart (`don't` is `do`, `n't`); abbreviations (`Dr.`, `e.g.`), emoticons and
addresses stay whole. `pieces` remembers, so that the rules run but once for most.

Where it differs from spaCy 3.8: letters are those of Unicode (spaCy lists scripts, without Georgian, Armenian or Malayalam, say); pieces of
over `LONG` characters are cut inside only; a few addresses.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

LONG = 1000  # characters: a longer piece without white space (base64, minified code, Chinese) is cut inside only

_MARKS = ",:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪" + "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧"
_CURRENCY = "$£€¥฿₽﷼₴" + "".join(map(chr, range(0x20A0, 0x20C0)))
_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB kb KB "
    "gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ"
)
_EMOTICONS = (
    r":) :)) :))) :( :(( :((( :-) :-)) :-))) :-( :-(( :-((( :D :-D :P :-P :p :-p :O :-O :o :-o :X :-X :x :-x :/ :-/ :| :-| :* :-* :> :-> :] :-] "
    r":} :-} :0 :-0 :1 :3 :-3 :'( :'-( :') :'-) :() :o) (: (-: (; (-; (= (o: (-8 ): )-: ;) ;-) ;D ;-D ;_; =( =) =/ =3 =D =[ =] =| ]= [= [: [-: "
    r"8) 8-) 8D 8-D <3 <33 <333 </3 <.< >.< >.> >:( >:o -_- -__- ._. 0.0 0.o 0_0 0_o o.0 o_0 o.o o.O O.o O.O o_o o_O O_o O_O V.V V_V v.v v_v "
    r"@_@ ^_^ ^__^ ^___^ XD XDD xD xDD (*_*) (-_-) (._.) (>_<) (^_^) ¯\(ツ)/¯ <space> C++ ' '' ’ — \n \t \")"
)
_WHOLE = (
    "a.m. Adm. Ak. Ala. and/or Apr. Ariz. Ark. Aug. Bros. Calif. co. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. e.g. E.g. E.G. Feb. Fla. Ga. Gen. "
    "Gov. i.e. I.e. I.E. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. ma'am Ma'am Mar. Mass. Md. Messrs. Mich. Minn. Miss. "
    "Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. o'clock O'clock Oct. Okla. Ore. p.m. Pa. Ph.D. Prof. Rep. Rev. "
    "S.C. Sen. Sep. Sept. St. Tenn. v.s. Va. vs. w/o Wash. Wis. doin' Doin' goin' Goin' havin' Havin' lovin' Lovin' nothin' Nothin' nuthin' "
    "Nuthin' ol' Ol' somethin' Somethin' 's 'S ‘s ‘S 'd 'll 're 'em 'nuff 'bout 'cause 'Cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz"
)
_PARTS = (
    "can-not Can-not gon-na Gon-na got-ta Got-ta let-'s Let-'s c'm-on C'm-on y'-all y-all how-'d-'y How-'d-'y not-'ve Not-'ve not-ve Not-ve"
)
_CONTRACTED = (  # and each without its apostrophe
    ("i", "'m 'ma"),
    ("i you he she it we they who what when where why how there that this these those", "'ll 'd 'll've 'd've"),
    ("i you we they who what when where why how there this these those could might must should would", "'ve"),
    ("you we they who what when where why how there this these those", "'re"),
    ("he she it who what when where why how there that this", "'s"),
    ("ca could do does did had may might must need ought sha should wo would", "n't n't've"),
    ("ai are is was were have has dare", "n't"),
)
_ONLY_WITH_APOSTROPHE = frozenset(
    {("i", "'ll"), ("it", "'s"), ("he", "'ll"), ("she", "'ll"), ("she", "'d"), ("we", "'re"), ("we", "'ll"), ("who", "'re")}
)
_UNIT_OR_POSSESSIVE = re.compile(r"[0-9]|['’][sS]$")


class Remembered(dict):
    """A function of short texts that remembers what it gave: its `__getitem__`. Emptied when full, and long texts are not kept, so that memory
    stays flat. A hit costs a quarter less than one of `lru_cache`, which moves each entry that it finds.
    """

    ENTRIES = 1 << 17
    LENGTH = 64  # characters

    def __init__(self, function: Callable[[str], Any]):
        self.function = function

    def __missing__(self, text: str) -> Any:
        found = self.function(text)
        if len(text) <= self.LENGTH:
            if len(self) >= self.ENTRIES:
                self.clear()
            self[text] = found
        return found


def cut(piece: str) -> tuple[str, ...]:
    """The words of a text without white space."""
    special, opening, closing, prefix, suffix, infix, address = _rules()
    if piece.isalpha():
        return special.get(piece, (piece,))
    stem, last = piece[:-1], piece[-1:]
    if stem.isalpha() and (last in ",;:!?)" or (last == "." and "a" <= stem[-1] <= "z")) and stem not in special and piece not in special:
        return (stem, last)  # most of those that are no word as they stand
    before, after = [], []
    while not piece.isalpha() and piece not in special and 0 < len(piece) < LONG:
        start, end = 0, 0
        if piece[0] in opening:
            start = 1
        elif (not piece[0].isalnum() or "$" in piece) and (found := prefix.match(piece)):
            start = found.end()
        if start:
            before.append(piece[:start])
            if (rest := piece[start:]) in special:
                piece = rest
                break
        if len(piece) > start:
            if piece[-1] in closing:
                end = 1
            elif not piece[-1].isalnum() or _UNIT_OR_POSSESSIVE.search(piece):
                tail = start if piece.endswith("..") else max(start, len(piece) - 5)
                end = len(found[0]) if (found := suffix.search(piece, tail)) else 0
        if end:
            after.append(piece[-end:])
            if (whole := piece[:-end]) in special:  # with the prefix: `:)` in `:).`
                piece = whole
                if start:
                    before.pop()
                break
        elif not start:
            break
        piece = piece[start : len(piece) - end]
    if piece in special:
        middle = special[piece]
    elif piece.isalpha() or ("." in piece and len(piece) < LONG and address.match(piece)):
        middle = (piece,)
    else:
        cuts = [edge for found in infix.finditer(piece) if found.start() for edge in found.span()]
        middle = tuple(part for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True) if (part := piece[a:b]))
    found = [*before, *middle, *reversed(after)]
    return tuple(_rejoined(found, special)) if 2 < len(found) < LONG else tuple(found)


pieces = Remembered(cut).__getitem__


def _rejoined(found: list[str], special: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Successive words that together are one with its own parts take those: `-`, `Dr`, `.` are `-`, `Dr.`."""
    done, i = [], 0
    while i < len(found):
        width = next((n for n in range(min(4, len(found) - i), 1, -1) if "".join(found[i : i + n]) in special), 0)
        done += special["".join(found[i : i + width])] if width else found[i : i + 1]
        i += width or 1
    return done


@cache
def _rules():
    """Words with their own parts; characters that come off in front, and behind; the patterns of what else does, in front, behind, and
    inside; of addresses."""
    lower = upper = symbols = ""
    for character in map(chr, range(0x20000)):
        kind = unicodedata.category(character)
        if character < "\U00010000" and (kind in ("Mn", "Mc") or character.isalpha()):  # with the vowel signs of Indic scripts
            lower += "" if character.isupper() else character
            upper += "" if character.islower() else character
        elif kind == "So":
            symbols += character
    opening, closing = frozenset(f"§%=—–…{_MARKS}{_CURRENCY}{symbols}"), frozenset(f"—–{_MARKS}{symbols}")
    # Sets of Python's patterns are tables only where all is below U+10000: what is above stands apart, behind a quick look.
    above = rf"(?=[^\0-\uffff])[{_ranges(''.join(c for c in symbols if c > '\uffff'))}]"
    symbols = "".join(c for c in symbols if c <= "\uffff")
    lower, upper, symbols, marks = *map(_ranges, (lower, upper, symbols)), re.escape(_MARKS)
    either, quotes, dollars = lower + upper, re.escape(_MARKS[_MARKS.index("'") :]), r"US\$|C\$|A\$"
    suffix = (
        rf"……|…|\.\.+|['’][sS]|(?<=[0-9])(?:\+|{dollars}|[{re.escape(_CURRENCY)}]|{_UNITS.replace(' ', '|')})|(?<=°[FfCcKk])\."
        rf"|(?<=[0-9{lower}%²\-+…|{marks}])\.|(?<=[{upper}][{upper}])\."
    )
    infix = (
        rf"{above}|(?=[.…,+\-*^–—~:<>=/{symbols}])(?:\.\.+|…|[{symbols}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{lower}{quotes}])\.(?=[{upper}{quotes}])"
        rf"|(?<=[{either}]),(?=[{either}])|(?<=[{either}0-9])(?:(?:---?|——|[-–—~])(?=[{either}])|[:<>=/](?=[{either}])))"
    )
    name = r"[A-Za-z0-9\u00a1-\uffff]"
    address = (
        rf"(?:[\w+\-.]{{2,}}://)?(?:[^\s@]+@)?(?:(?:\d{{1,3}}\.){{3}}\d{{1,3}}|(?:{name}(?:[A-Za-z0-9\u00a1-\uffff_-]{{0,62}}{name})?\.)+"
        rf"[{lower}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?$"
    )
    return _special(), opening, closing, *map(re.compile, (rf"\.\.+|\+(?![0-9])|{dollars}", f"(?:{suffix})$", infix, address))


def _special() -> dict[str, tuple[str, ...]]:
    parts = [(word,) for word in f"{_EMOTICONS} {_WHOLE}".split()] + [(f"{letter}.",) for letter in "abcdefghijklmnopqrstuvwxyzäöü"]
    parts += [tuple(word.split("-")) for word in _PARTS.split()]
    parts += [(str(hour), half) for hour in range(1, 13) for half in ("a.m.", "am", "p.m.", "pm")]
    for stem, end in ((stem, end) for stems, ends in _CONTRACTED for stem, end in product(stems.split(), ends.split())):
        ends = ("'m", "a") if end == "'ma" else re.findall(r"n't|'\w+", end)
        for word in (stem, stem.title()):
            parts.append((word, *ends))
            bare = tuple(part.replace("'", "") for part in ends)
            if (stem, end) not in _ONLY_WITH_APOSTROPHE:
                parts.append((word, *bare))
    parts += [tuple(part.replace("'", "’") for part in word) for word in parts]
    return {"".join(word): tuple(map(sys.intern, word)) for word in parts}


def _ranges(characters: str) -> str:
    """Characters in order as the inside of a pattern's brackets."""
    found, start = [], 0
    codes = [*map(ord, characters), 1 << 30]
    for i in range(1, len(codes)):
        if codes[i] != codes[i - 1] + 1:
            found.append(re.escape(chr(codes[start])) + (f"-{re.escape(chr(codes[i - 1]))}" if i - 1 > start else ""))
            start = i
    return "".join(found)
