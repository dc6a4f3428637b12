"""Vocabularies from before `tokenizer.json`, `vocab.txt` or `vocab.json` with `merges.txt`: made into what that would have held."""

from collections.abc import Mapping
from pathlib import Path

from lmx.interop.tokenizer_files import ROLES_OF_CLASS, Files

WORDPIECES, PAIRS = ("vocab.txt",), ("vocab.json", "merges.txt")
WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
BYTE_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer")
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def found(folder: Path) -> tuple[str, ...]:
    """The files of such a vocabulary in a folder; () where there is none."""
    return next((names for names in (WORDPIECES, PAIRS) if all((folder / name).exists() for name in names)), ())


def as_json(files: Files) -> bytes:
    """The `tokenizer.json` that the checkpoint's tokenizer class makes of them.

    Raises:
      ValueError: the class is not one of those known, the files are not what their names say, or lack a token that the class needs.
    """
    import tokenizers

    names = found(files.folder)
    known = WORDPIECE_CLASSES if names == WORDPIECES else BYTE_CLASSES
    if files.kind not in known:
        raise ValueError(
            f"{files.folder}: what tokenizer class {files.kind!r} does with {' and '.join(names)} is not known (known: {', '.join(known)}); "
            "name the class in tokenizer_config.json, or load it once with transformers and save_pretrained, which writes a tokenizer.json"
        )
    roles = {role: token for role, token in ROLES_OF_CLASS.get(files.kind, {}).items() if role not in files.without} | dict(files.roles)
    try:
        tokenizer = (_wordpiece if names == WORDPIECES else _byte_pairs)(files, roles)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{files.folder}: {' and '.join(names)} cannot be read ({str(error).splitlines()[0][:120]})") from error
    for role, token in roles.items():
        if tokenizer.token_to_id(token) is not None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(token, lstrip=role == "mask" and names == PAIRS, normalized=False)])
    return tokenizer.to_str().encode()


def _wordpiece(files: Files, roles: Mapping[str, str]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = models.WordPiece.read_file(str(files.folder / "vocab.txt"))
    tokenizer, config = Tokenizer(models.WordPiece(vocabulary, unk_token=roles.get("unk", "[UNK]"))), files.config
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls, sep = ends = [_frame(tokenizer, roles, role) for role in ("cls", "sep")]
    one = f"{cls[0]}:0 $A:0 {sep[0]}:0"
    tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=f"{one} $B:1 {sep[0]}:1", special_tokens=ends)
    return tokenizer


def _byte_pairs(files: Files, roles: Mapping[str, str]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary, merges = models.BPE.read_file(*(str(files.folder / name) for name in PAIRS))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    spaced = bool(files.config.get("add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    if files.kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)])
        return tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    if files.kind == "GPT2Tokenizer":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        if files.config.get("add_bos_token"):
            bos, _ = start = _frame(tokenizer, roles, "bos")
            one = f"{bos}:0 $A:0"
            tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=f"{one} {bos}:0 $B:0", special_tokens=[start])
    else:
        ends = [_frame(tokenizer, roles, role) for role in ("sep", "cls")]
        tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=spaced)
    return tokenizer


def _frame(tokenizer, roles: Mapping[str, str], role: str) -> tuple[str, int]:
    token = roles.get(role)
    id = None if token is None else tokenizer.token_to_id(token)
    if id is None:
        raise ValueError(f"its {role} token, which stands around texts, is {token!r}, which is not in it")
    return token, id
