"""A family of checkpoints as a table: which field of its config.json is which of ours, which of its tensors is which of our parameters.

Whatever the table does not know is refused by name, for a model that is almost the right one is worse than none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np

from lmx.models.config import EncoderDecoder, Transformer

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of activations, the usual one last where there are several."""
GENERIC = (
    *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_class", "prefix"),
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "chunk_size_feed_forward", "gradient_checkpointing"),
    *("initializer_range", "initializer_factor", "init_std", "is_encoder_decoder", "pretraining_tp", "layerdrop"),
    *("*dropout*", "*_pdrop", "*layerdrop"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences", "temperature"),
    *("top_k", "top_p", "typical_p", "*_penalty", "*no_repeat_ngram_size", "*suppress_tokens", "forced_*_token_id", "output_scores"),
    *("bad_words_ids", "remove_invalid_values", "return_dict_in_generate", "use_bfloat16", "tf_legacy_loss", "pruned_heads"),
)
"""Fields that say nothing of what a trained model computes."""
REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A field of theirs that is one of ours: its names, the value it has when it is left out, and what its values are called here. Fields
    of an encoder-decoder's encoder are `encoder.heads` and the like; one field of theirs may be several of ours."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Fused:
    """Several of our linear layers as one tensor of theirs, along its outputs.

    `concat`: one after another. `groups`: for each key head its query heads, then itself, then its value head (of Falcon; with as many key
    heads as query heads that is BLOOM's and GPT-NeoX's order).
    """

    parts: tuple[str, ...]
    order: Literal["concat", "groups"] = "concat"

    def split(self, array: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Parts of `[..., outputs]`, each `[..., *shape]`."""
        lead = array.shape[:-1]
        if self.order == "concat":
            ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
            pieces = np.split(array, ends[:-1], -1)
            return [piece.reshape(*lead, *shape) for piece, shape in zip(pieces, shapes, strict=True)]
        (heads, dim), (groups, _), _ = shapes
        array = array.reshape(*lead, groups, heads // groups + 2, dim)
        return [array[..., :-2, :].reshape(*lead, heads, dim), array[..., -2, :], array[..., -1, :]]

    def join(self, arrays: list[np.ndarray], lead: int) -> np.ndarray:
        """The inverse of `split`, for arrays with so many leading dimensions."""
        if self.order == "concat":
            return np.concatenate([a.reshape(*a.shape[:lead], -1) for a in arrays], -1)
        query, key, value = arrays
        *first, heads, dim = query.shape
        groups = key.shape[-2]
        query = query.reshape(*first, groups, heads // groups, dim)
        return np.concatenate([query, key[..., None, :], value[..., None, :]], -2).reshape(*first, -1)


@dataclass(frozen=True)
class Inside:
    """A model inside another, of a family of its own.

    Attributes:
      theirs: the field of the outer config.json that its own is (`vision_config`).
      ours: the field of our config that it is, and the beginning of our names of its parameters (`image`). Empty for a decoder, all of whose
        fields and parameters are those of the whole (LLaVA's).
      families: what it may be; the first where its config says no `model_type`.
      lead: what stands before its tensors' names in the whole.
      architecture: its class, where it is not its family's.
      usual: its config where the outer one has none.
      older: a field of older files that has precedence.
    """

    theirs: str
    ours: str
    families: tuple["Family", ...]
    lead: str = ""
    architecture: str | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    older: str | None = None

    def said(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Its config, from the outer one."""
        older = config.get(self.older) if self.older else None
        own = older if older is not None else config.get(self.theirs)
        return dict(self.usual if own is None else own)

    def of(self, config: Mapping[str, Any]) -> "Inside":
        """The same, with the one family that it is of. Raises ValueError, with the name, where lmx has none."""
        kind = self.said(config).get("model_type", self.families[0].model_type)
        found = [family for family in self.families if family.model_type == kind]
        if not found:
            known = ", ".join(family.model_type for family in self.families)
            raise ValueError(f"config.json: {self.theirs} has model_type={kind!r}, which is not supported; known is one of {known}")
        return replace(self, families=(found[0].of(self.said(config)),))

    def read(self, reader: "Reader") -> dict[str, Any]:
        """Fields of the whole's config of ours."""
        whole = {name: reader.take(name, None) for name in (self.theirs, self.older) if name}
        family = self.of(whole).families[0]
        config = family.read(self.said(whole) | {"architectures": [self.architecture or family.architecture]})
        return {self.ours: config} if self.ours else {one.name: getattr(config, one.name) for one in fields(config)}

    def write(self, config: Any) -> dict[str, Any]:
        """Its config of theirs."""
        return {self.theirs: {name: value for name, value in self.family.write(self.part(config)).items() if name != "architectures"}}

    @property
    def family(self) -> "Family":
        return self.families[0]

    def part(self, config: Any) -> Any:
        """Its config of ours, from that of the whole."""
        if self.ours:
            return getattr(config, self.ours)
        return self.family.kind(**{one.name: getattr(config, one.name) for one in fields(self.family.kind)})

    def path(self, ours: str | Fused) -> str | Fused:
        """A parameter's in the whole."""
        if isinstance(ours, Fused):
            return replace(ours, parts=tuple(self.path(part) for part in ours.parts))
        return f"{self.ours}/{ours}" if self.ours else ours


@dataclass(frozen=True)
class Architecture:
    """One of several classes that transformers has for a family's models, for it decides what stands on them.

    Attributes:
      settings: fields of ours that tell it from the family's other classes.
      modules: what it has beside the family's.
      bare: the prefix that the family's modules have in other classes and not in this one, which is what they call by that name.
    """

    settings: Mapping[str, Any]
    modules: Mapping[str, str | Fused] = field(default_factory=dict)
    bare: str = ""


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      model_type, architecture: its name in config.json, and the class that transformers loads it with (where there are several, that which
        a config.json without `architectures` means).
      architectures: the classes by name, where there are several.
      fields: `Field`s.
      settings: fields of ours that all its models share.
      expected: fields of theirs that must have a value, or be absent, for the table to hold; a tuple lists several.
      ignored: patterns of fields that change nothing here.
      more: functions from their config (as read: `Reader`) to fields of ours, and back, for what is no pair of fields.
      modules: their module, `{}` for the layer, `{expert}` for an expert, to ours (or `Fused`). A module has a weight (a norm's scale) and,
        where ours has one, a bias; a name that ends in .weight or .bias is of that tensor alone.
      variants: modules that are called so in models of some configs alone.
      tensors: their tensors of other names than modules have, to our parameter and how many dimensions of one theirs has before it;
        never turned.
      turned: whether linear layers are stored `[outputs, inputs]`.
      prefixes: what published files may leave out before a name, or have before it.
      renamed: ends of names, and what older files have in their place.
      kind: the type of our config, of one stack.
      pads_uncounted: whether padding, told by its token, has no position (RoBERTa).
      leftover: patterns of tensors in older files that are no parameters.
      copies: patterns of tensors in older files that repeat the table of embeddings; one that differs from it is refused.
      zeros: tensors that a file without a head may lack, and that are then zeros.
      unread: patterns of tensors that no file has, for nothing reads them: a layer's without what others have (RWKV-7's first).
      tokens: ids of special tokens that config.json may leave out.
      kernels: our linear layers, by their paths, whose inputs are several dimensions in theirs too (a convolution's).
      dialects: other ways of naming all tensors, each as what it has in place of parts of the names here.
      inside: models of other families that this one is made of.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    modules: Mapping[str, str | Fused]
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    more: tuple[tuple[Callable, Callable], ...] = ()
    tensors: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    variants: Callable[[Transformer], Mapping[str, str | Fused]] = lambda _: {}
    turned: bool = True
    prefixes: tuple[str, ...] = ("model.", "transformer.")
    leftover: tuple[str, ...] = ()
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    pads_uncounted: bool = False
    kind: type = Transformer
    copies: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    dialects: tuple[tuple[tuple[str, str], ...], ...] = ()
    inside: tuple[Inside, ...] = ()

    def of(self, config: Mapping[str, Any]) -> "Family":
        """The table of a model with this config.json: where other models are inside, with the tables of theirs."""
        if not self.inside:
            return self
        inside = tuple(one.of(config) for one in self.inside)
        return replace(
            self,
            inside=inside,
            kernels=self.kernels + tuple(one.path(ours) for one in inside for ours in one.family.kernels),
            leftover=self.leftover + tuple(pattern for one in inside for pattern in one.family.leftover),
            renamed=self.renamed + tuple(pair for one in inside for pair in one.family.renamed),
        )

    def read(self, config: Mapping[str, Any]) -> Transformer:
        """Our config from theirs. Raises ValueError, with the field, for what the table does not cover."""
        reader = Reader(config, self.model_type)
        ours = dict(self.settings)
        if self.architectures:
            said = (config.get("architectures") or [self.architecture])[0]
            if said not in self.architectures:
                raise reader.refused("architectures", said, f"one of {', '.join(self.architectures)}")
            ours |= self.architectures[said].settings
        for part in self.inside:
            ours |= part.read(reader)
        for one in self.fields:
            value = reader.take(one.theirs, one.default)
            if one.values is not None:
                if value not in one.values:
                    raise reader.refused(one.theirs, value, f"one of {', '.join(map(str, one.values))}")
                value = one.values[value]
            ours[one.ours] = value
        for theirs, wanted in self.expected.items():
            several = wanted if isinstance(wanted, tuple) else (wanted,)
            value = reader.take(theirs, several[0])
            if value not in several:
                raise reader.refused(theirs, value, " or ".join(map(repr, several)))
        for to_ours, _ in self.more:
            ours |= to_ours(reader, ours)
        reader.finish(self.ignored)
        encoder = {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}
        ours = {name: value for name, value in ours.items() if not name.startswith("encoder.")}
        made = EncoderDecoder(**ours, encoder=Transformer(**encoder)) if encoder else self.kind(**ours)
        _check_numbers(made, self.model_type, "model")
        return made

    def write(self, config: Transformer) -> dict[str, Any]:
        """Theirs from ours. Raises ValueError for a setting that the family has no field for."""
        theirs: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.named(config)]}
        for one in self.fields:
            value = attrgetter(one.ours)(config)
            if one.values is not None:
                back = {ours: name for name, ours in one.values.items()}
                if value not in back:
                    raise ValueError(f"{self.model_type} has no {one.theirs} for model.{one.ours}={value!r}")
                value = back[value]
            if value is not None or one.default is not None:  # transformers takes some fields that are null for numbers
                theirs[one.theirs] = value
        theirs |= {name: wanted[0] if isinstance(wanted, tuple) else wanted for name, wanted in self.expected.items()}
        for part in self.inside:
            theirs |= part.write(config)
        for _, to_theirs in self.more:
            theirs |= to_theirs(config)
        again = self.read(theirs)
        if again != config:
            different = [n for n in vars(config) if getattr(config, n) != getattr(again, n)]
            said = ", ".join(f"model.{n}={getattr(config, n)!r} (it means {getattr(again, n)!r})" for n in different)
            raise ValueError(f"{self.model_type} cannot say {said}; save it as another family")
        return theirs

    def named(self, config: Transformer) -> str:
        """The class of a model of ours. Raises ValueError where the family has none for it."""
        for name, one in self.architectures.items():
            if all(getattr(config, ours) == value for ours, value in one.settings.items()):
                return name
        if self.architectures:
            raise ValueError(f"{self.model_type} has no class for model.head={config.head}, only {', '.join(self.architectures)}")
        return self.architecture

    def modules_of(self, config: Transformer) -> dict[str, str | Fused]:
        """The modules of a model's class, those first that matter first: an untied head's matrix and bias, or what a tied one has beside."""
        one = self.architectures.get(self.named(config), Architecture({}))
        variants = self.variants(config)
        names = variants | {name: ours for name, ours in self.modules.items() if name not in variants}
        found = {name.removeprefix(one.bare): ours for name, ours in names.items()}
        found |= one.modules
        for part in self.inside:
            found |= {part.lead + name: part.path(ours) for name, ours in part.family.modules_of(part.part(config)).items()}
        return dict(sorted(found.items(), key=lambda pair: (pair[1] == "head") == config.tied))

    def tensors_of(self, config: Transformer) -> dict[str, tuple[str, int]]:
        """`tensors` of a model's class."""
        bare = self.architectures.get(self.named(config), Architecture({})).bare
        found = {name.removeprefix(bare): what for name, what in self.tensors.items()}
        for part in self.inside:
            own = part.family.tensors_of(part.part(config))
            found |= {part.lead + name: (part.path(ours), ones) for name, (ours, ones) in own.items()}
        return found


def _check_numbers(record: Any, family: str, name: str) -> None:
    """Raises ValueError for what should be a number, or whether or not, and is neither (a string, an infinity), in a config or what it holds."""
    for one in fields(record):
        value, at = getattr(record, one.name), f"{name}.{one.name}"
        if is_dataclass(value):
            _check_numbers(value, family, at)
        several = get_origin(one.type) is tuple and isinstance(value, tuple)
        kinds = set(get_args(one.type)) - {Ellipsis} if several or isinstance(one.type, UnionType) else {one.type}
        if not kinds <= {int, float, bool, NoneType} or value is None:
            continue
        for number in value if several else [value]:
            whole = isinstance(number, int) and (bool in kinds or not isinstance(number, bool))
            if not whole and not (float in kinds and isinstance(number, float) and math.isfinite(number)):
                named = " or ".join(sorted(kind.__name__ for kind in kinds - {NoneType}))
                raise ValueError(f"config.json of a {family} says {number!r} for {at}, which is {named}")


class Reader:
    """Their config as it is read: what nobody asked for is left at the end, and refused unless it says nothing."""

    def __init__(self, config: Mapping[str, Any], family: str):
        self._config, self._family, self._asked = dict(config), family, set()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        self._asked.add(name)
        if name in self._config:
            return self._config[name]
        if default is REQUIRED:
            raise ValueError(f"config.json of a {self._family} lacks {name}")
        return default

    def refused(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"config.json: {name}={value!r} of a {self._family} is not supported; known is {wanted}")

    def finish(self, ignored: tuple[str, ...]) -> None:
        patterns = (*GENERIC, *ignored)
        left = {n: v for n, v in self._config.items() if n not in self._asked and not any(fnmatchcase(n, p) for p in patterns)}
        left = {name: value for name, value in left.items() if value not in (None, False, [], {})}
        if left:
            said = ", ".join(f"{name}={value!r}" for name, value in left.items())
            raise ValueError(
                f"config.json of a {self._family} has fields that lmx does not know: {said}; what they change is not known either"
            )
