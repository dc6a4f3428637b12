"""Stack Exchange data dumps: a site's `Posts.xml`, or the `.7z` it comes in, as question and answer threads.

Answers lie anywhere behind their question, for years of posts. So rows are first put together by ranges of question numbers, in memory while
they fit, else in a temporary folder (as large as the file unpacked; the variable TMPDIR says where), and then read range by range.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from lmx.data.documents import Document
from lmx.data.sources.compressed import damage, opened, package
from lmx.data.sources.markup import plain
from lmx.data.sources.paths import BLOCK, found, grouped, relative, root, unreadable
from lmx.data.sources.records import iso
from lmx.data.sources.source import UNIT, Omitted, Unit

QUESTIONS = 1 << 14  # question numbers in a range: some 25 MB of Stack Overflow's posts
MEMORY = 1 << 26  # bytes of rows that wait in memory
SEVENZIP = b"7z\xbc\xaf\x27\x1c"
ROW = re.compile(rb"\s*<row\b.*/>\s*", re.S)
FRAME = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml\b.*\?>|</?posts>|\s)*")
NUMBERS = {name: re.compile(rb'\s%s="(\d{1,18})"' % name.encode()) for name in ("Id", "PostTypeId", "ParentId")}
NAME = re.compile(r"(?:.*[-_.])?posts\.xml(?:\.gz|\.bz2|\.xz|\.zst)?|[^-]+(?:-posts)?\.7z")


@dataclass(frozen=True)
class StackExchange:
    """A thread a document, from a file, a glob, or the Posts.xml (.gz and the like too) and .7z files below a folder; `file:question` is its id.

    `Q: title`, the question, and each answer behind `A: `, the accepted one first, then by score. Code is kept, in Markdown's marks; metadata
    have each post's licence and author. In the order of question numbers. A file is read whole: an answer may be anywhere.

    Omitted: `post_type` (tag wikis and the like), `low_score`, `few_answers` (a whole thread), `no_question` (its answers), `empty`.
    """

    path: str
    question_score: int | None = None
    """Threads whose question has less are left out."""
    answer_score: int | None = None
    """Answers that have less are left out; the accepted one too."""
    answers: int = 0
    """Threads with fewer, of those that are kept, are left out."""
    longest: int = 16 << 20
    """Bytes of a row, at most."""
    name: str = "stackexchange"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        files = found(self.path, lambda path: bool(NAME.fullmatch(path.name.lower())), "Posts.xml or .7z", name=self.name)
        return grouped(files, self.path, size)

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        base = root(self.path)
        for path in unit.paths:  # not `each`: a temporary folder that is full is no damage
            with tempfile.TemporaryDirectory() as folder:
                posts = Posts(path, self.longest, Path(folder))
                posts.read(self.name)
                yield from posts.omitted
                id, site = relative(Path(path), base), _site(path)
                for question, rows in posts.threads():
                    yield from self._thread(question, rows, f"{id}:{question}", path, site)

    def _thread(self, number: int, rows: list[bytes], id: str, path: str, site: str) -> Iterator[Document | Omitted]:
        question, answers = None, []
        where = f"{path}, post {number}"
        for row in rows:
            try:
                post = Post.parse(row)
            except ValueError as error:
                yield Omitted(where, f"cannot be read ({error})", damaged=True)
                continue
            if post.parent is not None:
                answers.append(post)
            elif question is not None:
                yield Omitted(where, "is there twice", damaged=True)
            else:
                question = post
        if question is None:
            yield from (Omitted(f"{path}, post {answer.id}", "no_question") for answer in answers)
            return
        if self.question_score is not None and question.score < self.question_score:
            yield Omitted(where, "low_score")
            return
        kept = []
        for answer in sorted(answers, key=lambda a: (a.id != question.accepted, -a.score, a.id)):
            if self.answer_score is not None and answer.score < self.answer_score:
                yield Omitted(f"{path}, post {answer.id}", "low_score")
            elif not answer.text:
                yield Omitted(f"{path}, post {answer.id}", "empty")
            else:
                kept.append(answer)
        if len(kept) < self.answers:
            yield Omitted(where, "few_answers")
            return
        if not question.text and not question.title:
            yield Omitted(where, "empty")
            return
        metadata = {
            **({"site": site, "url": f"https://{site}/questions/{number}"} if site else {}),
            "title": question.title,
            "tags": question.tags,
            **question.credits(),
            "answers": [{"id": answer.id, "accepted": answer.id == question.accepted, **answer.credits()} for answer in kept],
        }
        texts = ["Q: " + "\n\n".join(filter(None, (question.title, question.text))), *("A: " + answer.text for answer in kept)]
        yield Document(id, "\n\n".join(texts), path, metadata, question.created)


@dataclass(frozen=True)
class Post:
    id: int
    parent: int | None
    accepted: int | None
    score: int
    title: str
    text: str
    tags: list[str]
    created: str
    license: str
    author: str

    @staticmethod
    def parse(row: bytes) -> "Post":
        """Raises ValueError, in one line."""
        try:
            found = ElementTree.fromstring(row).attrib
        except ElementTree.ParseError as error:
            raise ValueError(str(error)) from error
        created, accepted = found.get("CreationDate", ""), found.get("AcceptedAnswerId")
        return Post(
            int(found["Id"]),
            int(found["ParentId"]) if found["PostTypeId"] == "2" else None,
            int(accepted) if accepted else None,
            int(found.get("Score") or 0),
            " ".join(found.get("Title", "").split()),
            plain(found.get("Body", "")),
            re.findall(r"[^<>|]+", found.get("Tags", "")),  # <a><b> in older dumps, |a|b| in newer ones
            iso(created + "Z"),
            found.get("ContentLicense", ""),
            found.get("OwnerUserId") or found.get("OwnerDisplayName", ""),
        )

    def credits(self) -> dict:
        return {"score": self.score} | {key: value for key, value in (("license", self.license), ("author", self.author)) if value}


@dataclass
class Posts:
    """The rows of one file by their questions."""

    path: str
    longest: int
    folder: Path
    omitted: list[Omitted] = field(default_factory=list)
    failure: OSError | None = None
    """Of the temporary folder: not the dump's."""
    _waiting: dict[int, list[bytes]] = field(default_factory=dict)
    _held: int = 0
    _line: bytes = b""
    _number: int = 1
    _too_long: bool = False
    _ended: bool = False

    def read(self, name: str) -> None:
        """Takes the whole file in. Raises ValueError for a package that is missing, OSError where the temporary folder is full."""
        problem = None
        try:
            with open(self.path, "rb") as file:
                packed = file.read(len(SEVENZIP)) == SEVENZIP
            if packed:
                problem = _unpack(self.path, self.feed, name)
            else:
                with opened(self.path, name) as file:
                    while data := file.read(BLOCK):
                        self.feed(data)
        except (*damage(), OSError) as error:
            problem = unreadable(self.path, error)
        if self.failure:
            raise self.failure
        self._take(self._line)
        if not problem and not self._ended:
            problem = Omitted(self.path, "ends without </posts>: it is cut off", damaged=True)
        self.omitted += [problem] if problem else []

    def feed(self, data: bytes) -> None:
        first, *lines = data.split(b"\n")
        self._line += first
        for line in lines:
            self._take(self._line)
            self._number += 1
            self._line, self._too_long = line, False
        if len(self._line) > self.longest and not self._too_long:
            self._omit(f"is longer than {self.longest} bytes")
            self._too_long = True
        self._line = b"" if self._too_long else self._line

    def threads(self) -> Iterator[tuple[int, list[bytes]]]:
        """Question numbers in their order, each with its rows in the file's."""
        stored = {int(path.name) for path in self.folder.iterdir()}
        for key in sorted(stored | set(self._waiting)):
            rows: dict[int, list[bytes]] = {}
            if key in stored:
                with (self.folder / str(key)).open("rb") as file:
                    for row in file:
                        rows.setdefault(_question(row), []).append(row)
            for row in self._waiting.pop(key, ()):
                rows.setdefault(_question(row), []).append(row)
            for question in sorted(rows):
                yield question, rows[question]

    def _take(self, line: bytes) -> None:
        if len(line) > self.longest:
            self._omit(f"is longer than {self.longest} bytes")
        elif ROW.fullmatch(line):
            number, kind = (NUMBERS[name].search(line) for name in ("Id", "PostTypeId"))
            question = _question(line)
            if not number or not kind or question is None:
                self._omit("has no Id, no PostTypeId or no ParentId")
            elif kind.group(1) not in (b"1", b"2"):
                self.omitted.append(Omitted(f"{self.path}, post {number.group(1).decode()}", "post_type"))
            else:
                self._waiting.setdefault(question // QUESTIONS, []).append(line)
                self._held += len(line)
                if self._held > MEMORY:
                    self._store()
        elif FRAME.fullmatch(line):
            self._ended = self._ended or b"</posts>" in line
        else:
            self._omit("is no row")

    def _omit(self, problem: str) -> None:
        self.omitted.append(Omitted(f"{self.path}, line {self._number}", problem, damaged=True))

    def _store(self) -> None:
        try:
            for key, rows in self._waiting.items():
                with (self.folder / str(key)).open("ab") as file:
                    file.write(b"".join(row + b"\n" for row in rows))
        except OSError as error:
            self.failure = error
            raise
        self._waiting, self._held = {}, 0


def _question(row: bytes) -> int | None:
    """The number of a row's question: its own, or an answer's ParentId. (Quotes are escaped in attributes: no text looks like these.)"""
    kind = NUMBERS["PostTypeId"].search(row)
    number = NUMBERS["ParentId" if kind and kind.group(1) == b"2" else "Id"].search(row)
    return int(number.group(1)) if number else None


def _unpack(path: str, feed: Callable[[bytes], None], name: str) -> Omitted | None:
    """Gives `Posts.xml` of a .7z archive to `feed`, piece by piece. What is wrong with the archive, or nothing."""
    py7zr = package("py7zr", f"{name}: {path}")

    class Fed(py7zr.Py7zIO):
        length = 0

        def write(self, s: bytes | bytearray) -> int:
            feed(bytes(s))
            self.length += len(s)
            return len(s)

        def read(self, size: int | None = None) -> bytes:
            return b""

        def seek(self, offset: int, whence: int = 0) -> int:
            return offset

        def flush(self) -> None: ...

        def size(self) -> int:
            return self.length

    class Factory(py7zr.WriterFactory):
        def create(self, filename: str) -> Fed:
            return Fed()

    try:
        with py7zr.SevenZipFile(path) as archive:
            wanted = [member for member in archive.getnames() if member.lower().rpartition("/")[2] == "posts.xml"]
            if len(wanted) != 1:
                return Omitted(path, f"holds {len(wanted)} files Posts.xml, expected one", damaged=True)
            archive.extract(targets=wanted, factory=Factory())
    except Exception as error:  # what py7zr raises for a damaged archive has no common base
        return unreadable(path, error)
    return None


def _site(path: str) -> str:
    """`cooking.stackexchange.com` from the name of its archive, or of the folder that it is unpacked in; empty where neither looks like one."""
    file = Path(path)
    for name in (re.sub(r"(?:-Posts)?\.7z$", "", file.name, flags=re.I), re.sub(r"-Posts\.xml.*$", "", file.name), file.parent.name):
        if re.fullmatch(r"[\w-]+(?:\.[\w-]+)*\.(?:com|net|org)", name):
            return name
    return ""
