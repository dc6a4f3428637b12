"""The tokenizer of a Hugging Face checkpoint: its vocabulary, its special tokens and its chat templates, as its files say."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lmx.data import chat
from lmx.data.chat import Message
from lmx.interop import plain_vocabularies
from lmx.interop.plain_vocabularies import WORDPIECE_CLASSES
from lmx.interop.tokenizer_files import ROLES, ROLES_OF_CLASS, USUAL, Added, Files, read_files
from lmx.interop.vocabularies import FAIRSEQ, KINDS, Json, Kind, Pieces, Vocabulary

PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
CONFIG_FILE = "tokenizer_config.json"

# What cleaning up does to decoded text, in order.
CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A checkpoint's tokenizer, which `load_tokenizer` makes. It has no state: what would change it gives another one.

    Other than the tokenizers of `lmx.data`, whose beginnings and ends are the data's business, `encode` puts around a text what the
    checkpoint was trained with, unless `special` is False.
    """

    vocabulary: Vocabulary
    roles: Mapping[str, str]
    """`bos`, `eos`, `unk`, `sep`, `pad`, `cls`, `mask` to the token, those there are."""
    templates: Mapping[str, str]
    """Chat templates by name; the one without a name is `default`."""
    stop_ids: tuple[int, ...]
    """Where generation stops: what generation_config.json says, else config.json, else the end of text."""
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None

    @property
    def vocab(self) -> int:
        """Ids are below this."""
        return self.vocabulary.size

    def _role(self, role: str) -> int | None:
        return self.vocabulary.id(self.roles[role]) if role in self.roles else None

    bos_id = property(lambda self: self._role("bos"), doc="Id of the beginning of text, or None; likewise the others.")
    eos_id = property(lambda self: self._role("eos"))
    unk_id = property(lambda self: self._role("unk"))
    sep_id = property(lambda self: self._role("sep"))
    pad_id = property(lambda self: self._role("pad"))
    cls_id = property(lambda self: self._role("cls"))
    mask_id = property(lambda self: self._role("mask"))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, with what the checkpoint puts around one text if `special`. Special tokens written in the text become those tokens."""
        return self.vocabulary.encode(text, special)

    def encode_pair(self, first: str, second: str, *, special: bool = True) -> tuple[list[int], list[int]]:
        """Ids of two texts and their `token_type_ids` (0 and 1; all 0 in checkpoints that do not tell the two apart)."""
        return self.vocabulary.encode_pair(first, second, special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, special tokens left out or shown. Raises ValueError for an id outside the vocabulary."""
        ids = [int(id) for id in ids]
        for id in ids:
            self._check(id)
        text = self.vocabulary.decode(ids, skip_special)
        if self.config.get("clean_up_tokenization_spaces") and self.vocabulary.spaced:
            for old, new in CLEANED:
                text = text.replace(old, new)
        return text

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it (`"<s>"`, `"\\u2581the"`); None when it has none."""
        return self.vocabulary.id(token)

    def token(self, id: int) -> str | None:
        """How the vocabulary writes an id; None for a hole in the ids. Raises ValueError outside the vocabulary."""
        self._check(int(id))
        return self.vocabulary.token(int(id))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        now: datetime | None = None,
        **more: Any,
    ) -> str:
        """A conversation as the checkpoint's chat template writes it.

        Args:
          messages: `{"role": ..., "content": ...}` and what else the template reads.
          add_generation_prompt: end where the assistant is to speak.
          tools: JSON schemas of functions that the model may call; a template named `tool_use` is then preferred.
          template: name of one of the checkpoint's templates, or a template.
          now: the time that templates may print; the clock by default.
          more: variables of the template.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        how = {"add_generation_prompt": add_generation_prompt, "tools": tools, "now": now}
        return chat.render(self._template(template, tools), messages, **how, **self._variables(more))

    def chat_ids(self, messages: Sequence[Message], **how: Any) -> list[int]:
        """Ids of `chat(messages, **how)`: the template writes beginnings and ends itself, so none are added."""
        return self.encode(self.chat(messages, **how), special=False)

    def chat_spans(self, messages: Sequence[Message], **how: Any) -> tuple[list[int], list[int]]:
        """Ids as `chat_ids`, and for each 1 if a character of it lies in the template's `{% generation %}` blocks, what the assistant
        wrote, else 0. Raises ValueError as `chat`, and when the template has no such block.
        """
        source = self._template(how.pop("template", None), how.get("tools"))
        kept = {name: how.pop(name) for name in ("add_generation_prompt", "tools", "now") if name in how}
        rendered = chat.render_spans(source, messages, **kept, **self._variables(how))
        ids, places = self.vocabulary.spans(rendered.text)
        return ids, [int(any(start < b and end > a for a, b in rendered.spans)) for start, end in places]

    def with_tokens(self, tokens: Sequence[str], **roles: str) -> "CheckpointTokenizer":
        """With more special tokens, at the next ids in their order; roles as `pad="<pad>"` may name them (or tokens there are).

        The model's embedding has to grow with them. Raises ValueError for a token that is there already.
        """
        if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
            raise ValueError(f"tokens={tokens!r} must be a list of texts that are not empty")
        for i, token in enumerate(tokens):
            if token in tokens[:i] or self.id(token) is not None:
                raise ValueError(f"token {token!r} is in the vocabulary already (id {self.id(token)}) or named twice; leave it out")
        grown = self.vocabulary.grown(tokens)
        if [grown.id(token) for token in tokens] != list(range(self.vocab, self.vocab + len(tokens))):
            raise ValueError(f"the vocabulary's ids have holes, so {list(tokens)} would not come after id {self.vocab - 1}")
        for role, token in roles.items():
            if role not in ROLES or grown.id(token) is None:
                raise ValueError(f"{role}={token!r}: roles are {', '.join(ROLES)}, for a token of the vocabulary or one of the new tokens")
        return replace(self, vocabulary=grown, roles={**self.roles, **roles})

    def with_pieces(self, texts: Iterable[str], count: int) -> tuple["CheckpointTokenizer", dict[int, tuple[int, ...]]]:
        """With so many pieces more after the last id, learned from texts (`lmx.data.expansion`), and the old tokens each is made of.

        Raises ValueError where the vocabulary cannot have more pieces, or the texts have not so many.
        """
        vocabulary, parts = self.vocabulary.expanded(texts, count)
        return replace(self, vocabulary=vocabulary), parts

    def save(self, path: str | Path) -> None:
        """Write the files that `load_tokenizer` and transformers read into a folder (which may hold a model already)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        dropped = {"chat_template", "added_tokens_decoder", *(f"{role}_token" for role in ROLES)}
        config = {key: value for key, value in self.config.items() if key not in dropped} | self.vocabulary.save(folder)
        config |= {f"{role}_token": token for role, token in self.roles.items()}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        named = folder / "additional_chat_templates"
        if strange := [name for name in self.templates if name != Path(name).name]:
            raise ValueError(f"chat template {strange[0]!r} cannot be a file's name; rename it")
        # What an older save left would contradict this one.
        for old in (
            *(folder / name for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")),
            *named.glob("*.jinja"),
        ):
            old.unlink(missing_ok=True)
        for name, text in self.templates.items():
            file = folder / "chat_template.jinja" if name == "default" else named / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        _write(folder / CONFIG_FILE, config)
        if self.generation is not None and not (folder / "generation_config.json").exists():
            _write(folder / "generation_config.json", self.generation)

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab:
            raise ValueError(
                f"token id {id} is outside the vocabulary 0..{self.vocab - 1}; it comes from another tokenizer or a padded model"
            )

    def _template(self, name: str | None, tools: Sequence | None) -> str:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
            if name not in self.templates:
                there = f"only templates named {sorted(self.templates)}" if self.templates else "no chat template"
                raise ValueError(f"the checkpoint has {there}; give chat(..., template=) a name or a Jinja2 template")
        return self.templates.get(name, name)

    def _variables(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{role}_token": token for role, token in self.roles.items()} | dict(more)


def load_tokenizer(path: str | Path) -> CheckpointTokenizer:
    """The tokenizer in a checkpoint's folder: `tokenizer.json`, else a SentencePiece model, else `vocab.txt` or `vocab.json` with
    `merges.txt`, and the small files beside it.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no vocabulary in it, a file that is not what its name says, files that contradict each other, or a tokenizer class whose way
        with a SentencePiece model is not known.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected a checkpoint's, with tokenizer.json or one of {', '.join(PIECE_FILES)}")
    files = read_files(folder)
    models = [name for name in PIECE_FILES if (folder / name).exists()]
    if (folder / "tokenizer.json").exists():
        vocabulary, roles = _json(files, (folder / "tokenizer.json").read_bytes())
    elif len(models) == 1:
        vocabulary, roles = _pieces(files, models[0])
    elif not models and plain_vocabularies.found(folder):
        vocabulary, roles = _json(files, plain_vocabularies.as_json(files))
    else:
        none = f"has none of tokenizer.json, {', '.join(PIECE_FILES)}, vocab.txt, vocab.json with merges.txt"
        raise ValueError(f"{folder} {f'has {" and ".join(models)}' if models else none}; expected exactly one vocabulary")
    eos = vocabulary.id(roles["eos"]) if "eos" in roles else None
    return CheckpointTokenizer(
        vocabulary=vocabulary,
        roles=roles,
        templates=files.templates,
        stop_ids=files.stop_ids or (() if eos is None else (eos,)),
        config=({"tokenizer_class": files.kind} if files.kind else {}) | dict(files.config),
        generation=files.generation,
    )


def _json(files: Files, data: bytes) -> tuple[Json, dict[str, str]]:
    try:
        vocabulary = Json(data)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{files.folder / 'tokenizer.json'} is not a tokenizer.json ({str(error).splitlines()[0][:120]})") from error
    for id, token in sorted(files.added.items()):
        if token.content not in vocabulary.added() and vocabulary.id(token.content) in (id, None) and id <= vocabulary.size:
            vocabulary.add([token])
        _agree(vocabulary, id, token.content, files)
    special = {token for token, is_special in vocabulary.added().items() if is_special}
    roles = _roles(vocabulary, files)
    if not roles and not files.without:
        roles = {role: next(token for token in tokens if token in special) for role, tokens in USUAL.items() if special & set(tokens)}
    for where, token in [
        *((f"{role}_token", Added(token, special=True)) for role, token in roles.items()),
        *(("a special token", t) for t in files.extra),
    ]:
        _present(vocabulary, token.content, where, files)
        if token.content not in special:
            vocabulary.add([replace(token, special=True)])
    _check_frame(vocabulary, roles, files)
    if files.kind in WORDPIECE_CLASSES and {"cls", "sep"} <= set(roles):
        vocabulary.frame_pairs(roles["cls"], roles["sep"])
    return vocabulary, roles


def _check_frame(vocabulary: Json, roles: Mapping[str, str], files: Files) -> None:
    """The post-processor says what stands around a text; `add_bos_token` and `add_eos_token` may only repeat it.

    (Older releases of transformers let them overrule it for some classes, newer ones ignore them.)
    """
    for role, flag, frame in zip(("bos", "eos"), ("add_bos_token", "add_eos_token"), vocabulary.frame(), strict=True):
        told = files.config.get(flag)
        does = role in roles and vocabulary.id(roles[role]) in frame
        if told is not None and told != does:
            raise ValueError(
                f"{files.folder}/{CONFIG_FILE} has {flag}={told!r}, but the post-processor of tokenizer.json {'adds' if does else 'does not add'} "
                f"a {role} token ({roles.get(role)!r}); remove {flag} to have what tokenizer.json says, or correct that"
            )


def _pieces(files: Files, name: str) -> tuple[Pieces, dict[str, str]]:
    folder, data = files.folder, (files.folder / name).read_bytes()
    generic = (None, "PreTrainedTokenizer", "TokenizersBackend")  # classes that say nothing
    kind = KINDS.get(None if files.kind in generic else files.kind)
    if kind is None:
        known = ", ".join(str(k) for k in KINDS if k)
        raise ValueError(
            f"{folder}: tokenizer class {files.kind!r} is not known without a tokenizer.json (known: {known}); load it once with transformers "
            "and save_pretrained, which writes one"
        )
    bare = Pieces(data, str(folder / name), replace(kind, first_only=False), {}, {})
    own_tokens: dict[int, Added] = {}
    if kind.shifted:
        own_tokens = {id: Added(token, special=True) for id, token in enumerate(FAIRSEQ)}
        own_tokens[bare.size] = Added("<mask>", special=True, lstrip=True)
    count = files.config.get("extra_ids", kind.sentinels) if kind.sentinels else 0
    if type(count) is not int or count < 0:
        raise ValueError(f"{folder}/{CONFIG_FILE}: extra_ids={count!r} must be the number of sentinels, 0 or more")
    for i in range(count if bare.id("<extra_id_0>") is None else 0):
        own_tokens[bare.size + count - 1 - i] = Added(f"<extra_id_{i}>", special=True)
    first = Pieces(data, str(folder / name), kind, own_tokens, {})
    for id, token in files.added.items():
        if id < first.size or first.id(token.content) is not None:
            _agree(first, id, token.content, files)
    added = own_tokens | dict(files.added)
    base = Pieces(data, str(folder / name), kind, added, {})
    roles = {role: token for role, token in bare.roles().items() if role not in files.without} | _roles(base, files)
    ids = {role: _present(base, token, f"{role}_token", files) for role, token in roles.items()}
    # Where files name special tokens, these are found in text; a bare model reads it as its library does.
    if files.kind or files.config or files.roles:
        for role, id in ids.items():
            added[id] = replace(added.get(id, Added(roles[role], lstrip=role == "mask" and kind.unigram)), special=True)
    for token in files.extra:
        id = _present(base, token.content, "a special token", files)
        added[id] = replace(added.get(id, token), special=True)
    holes = sorted(set(range(bare.size, max(added, default=-1))) - set(added))
    if holes:
        raise ValueError(
            f"{folder}: added tokens leave ids {holes[:5]} without a token; added_tokens.json or {CONFIG_FILE} is not this model's"
        )
    kind = _with_flags(kind, roles, files)
    return Pieces(data, name, kind, added, ids), roles


def _with_flags(kind: Kind, roles: Mapping[str, str], files: Files) -> Kind:
    """A SentencePiece kind as the checkpoint's own settings change it."""
    legacy, config = files.config.get("legacy"), files.config
    told = {role: config.get(f"add_{role}_token") for role in ("bos", "eos")}
    has = {role: role in kind.single for role in told}
    if not kind.optional:
        if any(value is not None and value != has[role] for role, value in told.items()):
            raise ValueError(
                f"{files.folder}/{CONFIG_FILE}: add_bos_token/add_eos_token={told} contradict {files.kind}'s frame {kind.single}"
            )
    else:
        wanted = {role: has[role] if value is None else value for role, value in told.items()}
        one = tuple(role for role in ("bos", "A", "eos") if wanted.get(role, True))
        kind = replace(kind, single=one, pair=one + tuple("B" if role == "A" else role for role in one))
    for role in sorted({*kind.single, *kind.pair} - {"A", "B", *roles}):
        raise ValueError(f"{files.folder}: its tokenizer puts a {role} token around texts, but no file names one; name it in {CONFIG_FILE}")
    lower = config.get("do_lower_case", True) if not kind.accents else True
    if not lower or (not kind.accents and config.get("keep_accents")):
        raise ValueError(
            f"{files.folder}/{CONFIG_FILE}: do_lower_case={lower}, keep_accents={config.get('keep_accents')} needs a tokenizer.json"
        )
    return replace(kind, first_only=kind.first_only and legacy is not True)


def _roles(vocabulary: Vocabulary, files: Files) -> dict[str, str]:
    """What the files say, and what the tokenizer's class takes for granted."""
    usual = ROLES_OF_CLASS.get(files.kind, {})
    usual = {role: token for role, token in usual.items() if role not in files.without and vocabulary.id(token) is not None}
    return usual | dict(files.roles)


def _agree(vocabulary: Vocabulary, id: int, token: str, files: Files) -> None:
    if vocabulary.id(token) != id:
        there = vocabulary.token(id)
        raise ValueError(
            f"{files.folder}: added tokens say that {token!r} is {id}, but the vocabulary has {there!r} there (and {token!r} at "
            f"{vocabulary.id(token)}); the files are not of one checkpoint"
        )


def _present(vocabulary: Vocabulary, token: str, where: str, files: Files) -> int:
    id = vocabulary.id(token)
    if id is None:
        raise ValueError(
            f"{files.folder}: {where} is {token!r}, which its vocabulary has not; correct the files, or take the name out and give the "
            "token an id with with_tokens"
        )
    return id


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
