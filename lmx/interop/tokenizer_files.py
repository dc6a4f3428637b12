"""What the small files beside a checkpoint's vocabulary say: named tokens, added tokens, chat templates, where generation stops."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.interop.files import read_json

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# The tokenizer class of a checkpoint whose files name none.
CLASS_OF_MODEL = {
    "albert": "AlbertTokenizer",
    "bart": "BartTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}

# Roles that a class takes for granted where the files do not name them and the vocabulary has the token.
_FAIRSEQ = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
ROLES_OF_CLASS = {
    "AlbertTokenizer": {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]", "pad": "<pad>", "cls": "[CLS]", "mask": "[MASK]"},
    "BartTokenizer": _FAIRSEQ,
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "RobertaTokenizer": _FAIRSEQ,
    "T5Tokenizer": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "XLMRobertaTokenizer": _FAIRSEQ,
}

# Those of a tokenizer.json of no known class, whose other files name none: where such a special token is in it.
USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
    "sep": ("[SEP]",),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "cls": ("[CLS]",),
    "mask": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True)
class Added:
    """A token beside the vocabulary's own pieces, found in text before those are."""

    content: str
    special: bool = False
    """Left out by `decode` unless asked for."""
    lstrip: bool = False
    """Takes the white space before it along."""
    rstrip: bool = False
    single_word: bool = False
    """Only where no letter or digit touches it."""
    normalized: bool = False
    """Found in the normalised text, not the raw one."""


@dataclass(frozen=True)
class Files:
    folder: Path
    kind: str | None
    """Tokenizer class, without `Fast`."""
    config: Mapping[str, Any]
    """tokenizer_config.json."""
    roles: Mapping[str, str]
    """`bos`, `eos` … to the token, for those that the files name."""
    without: frozenset[str]
    """Roles of which they say that there is none."""
    extra: tuple[Added, ...]
    """Special tokens without a role."""
    added: Mapping[int, Added]
    """Added tokens whose ids the files give."""
    templates: Mapping[str, str]
    """Chat templates; `default` is the one without a name."""
    generation: Mapping[str, Any] | None
    """generation_config.json."""
    stop_ids: tuple[int, ...]
    """Where generation stops; () where no file says."""


def read_files(folder: Path) -> Files:
    """Raises ValueError when a file is not what it should be, or two of them contradict each other."""
    config, named = _if_there(folder / "tokenizer_config.json") or {}, _if_there(folder / "special_tokens_map.json") or {}
    model, generation = _if_there(folder / "config.json") or {}, _if_there(folder / "generation_config.json")
    roles: dict[str, str] = {}
    for role in ROLES:
        said = {
            name: _token(file[f"{role}_token"], f"{name}: {role}_token").content
            for name, file in (("tokenizer_config.json", config), ("special_tokens_map.json", named))
            if file.get(f"{role}_token") is not None
        }
        if len(set(said.values())) > 1:
            raise ValueError(
                f"{folder}: the {role} token is {' but '.join(f'{t!r} in {f}' for f, t in said.items())}; correct one of the two"
            )
        if said:
            roles[role] = next(iter(said.values()))
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or CLASS_OF_MODEL.get(model.get("model_type"))
    stops = (generation or {}).get("eos_token_id", model.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if any(type(stop) is not int or stop < 0 for stop in stops):
        raise ValueError(f"{folder}: eos_token_id={stops} in generation_config.json or config.json must be a token id or a list of them")
    return Files(
        folder=folder,
        kind=kind.removesuffix("Fast") if isinstance(kind, str) else None,
        config=config,
        roles=roles,
        without=frozenset(r for r in ROLES if r not in roles and any(f"{r}_token" in file for file in (config, named))),
        extra=tuple(token for token in _extra(config, named).values() if token.content not in roles.values()),
        added=_added(folder, config, set(roles.values())),
        templates=_templates(folder, config),
        generation=generation,
        stop_ids=tuple(stops),
    )


def _if_there(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    return read_json(path) if path.exists() else None


def _token(value: Any, where: str, **defaults: Any) -> Added:
    """A token as the files write it: its text, or its text and how it is found."""
    if isinstance(value, str):
        value = {"content": value}
    known = {"content", "special", "lstrip", "rstrip", "single_word", "normalized"}
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str) or not value["content"]:
        raise ValueError(f"{where} is {value!r}; expected a token's text, or an object with its 'content'")
    return Added(**defaults | {key: item for key, item in value.items() if key in known})


def _extra(config: Mapping, named: Mapping) -> dict[str, Added]:
    """Special tokens without one of the seven roles: a list, or (multimodal models) a table of roles of their own."""
    found = {}
    for name, file in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = file.get(key) or []
            for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
                token = _token(token, f"{name}: {key}", special=True)
                found.setdefault(token.content, token)
    return found


def _added(folder: Path, config: Mapping, special: set[str]) -> dict[int, Added]:
    found: dict[int, Added] = {}
    where: dict[str, int] = {}
    said = [(id, token, "tokenizer_config.json: added_tokens_decoder") for id, token in (config.get("added_tokens_decoder") or {}).items()]
    said += [(id, token, "added_tokens.json") for token, id in (_if_there(folder / "added_tokens.json") or {}).items()]
    for id, token, name in said:
        if not str(id).isdecimal():
            raise ValueError(f"{folder}/{name} gives {token!r} the id {id!r}; expected a number")
        id, token = int(id), _token(token, f"{folder}/{name}: {id}")
        if token.content in special and not token.special:
            token = Added(**{**vars(token), "special": True})
        if found.get(id, token).content != token.content or where.get(token.content, id) != id:
            other = found[id].content if id in found else where[token.content]
            raise ValueError(f"{folder}/{name} says that {token.content!r} is token {id}, another entry or file has {other!r} for it")
        found.setdefault(id, token)
        where[token.content] = id
    return found


def _templates(folder: Path, config: Mapping) -> dict[str, str]:
    inside = config.get("chat_template") or {}
    if isinstance(inside, str):
        inside = {"default": inside}
    elif isinstance(inside, list):
        if not all(isinstance(entry, Mapping) and {"name", "template"} <= set(entry) for entry in inside):
            raise ValueError(f"{folder}/tokenizer_config.json: chat_template is a list, but not one of {{'name': ..., 'template': ...}}")
        inside = {entry["name"]: entry["template"] for entry in inside}
    if not isinstance(inside, Mapping) or not all(isinstance(text, str) for text in inside.values()):
        raise ValueError(f"{folder}/tokenizer_config.json: chat_template must be a template or a list of named ones")
    found = dict(inside)
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if found.get(name, text) != text:
                raise ValueError(f"{path} and tokenizer_config.json have different chat templates {name!r}; remove one of the two")
            found[name] = text
    return found
