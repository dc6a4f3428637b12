"""What PEFT's adapter_config.json says: which modules are adapted, and how. What lmx does not have is refused by name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = (None, False, [], {}, "")
ABOUT = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("base_model_class", "parent_library", "modules_to_save"),
)
"""Fields that are read elsewhere or say nothing of what is computed."""
LORA = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_core", "qalora_group_size"),
    *("eva_config", "ensure_weight_tying", "runtime_config", "loftq_config", "enable_lora", "merge_weights"),
)
IA3 = ("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights")
VIRTUAL = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
FIELDS = {
    "LORA": LORA,
    "IA3": IA3,
    "PROMPT_TUNING": (*VIRTUAL, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    "P_TUNING": (
        *VIRTUAL,
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    ),
    "PREFIX_TUNING": (*VIRTUAL, "prefix_projection", "encoder_hidden_size", "init_weights"),
}
"""By kind, the fields that lmx knows. Encoders of virtual tokens (an MLP, an LSTM, a projection) are run before PEFT saves what they give."""
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: those that leave the base as it is."""


@dataclass(frozen=True)
class Settings:
    """An adapter_config.json whose every field is known."""

    said: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.said["peft_type"]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.said.get(name)
        return default if value is None else value

    @property
    def saved(self) -> tuple[str, ...]:
        return tuple(self.get("modules_to_save", ()))

    def targeted(self, modules: Iterable[str], *, linear: Iterable[str], head: str | None) -> list[str] | None:
        """Those of the base's modules that are adapted, by PEFT's rules; None where the file alone says so.

        Args:
          linear: those that "all-linear" stands for, with the head.
          head: what gives the logits, if anything does.
        """
        target = self.get("target_modules")
        if target is None:
            return None
        if isinstance(target, str) and target.lower() == "all-linear":
            return [name for name in linear if name != head and not self._excluded(name)]
        return [name for name in modules if not self._excluded(name) and self._found(target, name)]

    def _excluded(self, name: str) -> bool:
        listed = self.get("exclude_modules", ())
        excluded = bool(re.fullmatch(listed, name)) if isinstance(listed, str) else _ends(name, listed)
        return excluded or any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.saved)

    def _found(self, target: str | list[str], name: str) -> bool:
        if isinstance(target, str):
            return bool(re.fullmatch(target, name))
        if name in target:
            return True
        layers = self.get("layers_to_transform", [])
        layers = [layers] if isinstance(layers, int) else layers
        if not _ends(name, target) or not layers:
            return _ends(name, target)
        patterns = self.get("layers_pattern", [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        forms = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next((found for form in forms if (found := re.match(form, name))), None)
        return match is not None and int(match["idx"]) in layers

    def rank(self, name: str) -> int:
        """Of a module."""
        return self._of("rank_pattern", name, self.get("r", 8))

    def scale(self, name: str) -> float:
        """Of a module."""
        rank = self.rank(name)
        return self._of("alpha_pattern", name, self.get("lora_alpha", 8)) / (rank**0.5 if self.get("use_rslora") else rank)

    def _of(self, field: str, name: str, default: Any) -> Any:
        patterns = self.get(field, {})
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)

    def feeds(self, name: str) -> bool:
        """Whether IA3 scales what a module reads, and not what it gives."""
        listed = self.get("feedforward_modules", ())
        return bool(re.fullmatch(listed, name)) if isinstance(listed, str) else _ends(name, listed)


def _ends(name: str, listed: Iterable[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in listed)


def read(said: Mapping[str, Any]) -> Settings:
    """Settings. Raises ValueError, with the field, for what lmx does not have."""
    kind = said.get("peft_type")
    if kind not in FIELDS:
        raise ValueError(f"adapter_config.json: peft_type={kind!r} is not one of {', '.join(FIELDS)}")
    left = {name: value for name, value in said.items() if name not in (*ABOUT, *FIELDS[kind]) and value not in NOTHING}
    if left:
        fields = ", ".join(f"{name}={value!r}" for name, value in left.items())
        raise ValueError(
            f"adapter_config.json of a {kind} has fields that lmx does not know: {fields}; what they change is not known either"
        )
    start = said.get("init_lora_weights")
    if start not in STARTS:
        raise ValueError(
            f"adapter_config.json: init_lora_weights={start!r} changes the base as well as adding to it; save the adapter over the unchanged "
            "base (in peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    if said.get("loftq_config"):
        raise ValueError(f"adapter_config.json: loftq_config={said['loftq_config']!r} changes the base; it is not supported")
    if said.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"adapter_config.json: bias={said['bias']!r} is not one of none, all, lora_only")
    if said.get("ensure_weight_tying") and said.get("modules_to_save"):
        raise ValueError("adapter_config.json: ensure_weight_tying=True with modules_to_save is not supported")
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        needed = ("num_virtual_tokens", "token_dim") + (("num_layers", "num_attention_heads") if kind == "PREFIX_TUNING" else ())
        for name in needed:
            if not isinstance(said.get(name), int):
                raise ValueError(f"adapter_config.json of a {kind} has {name}={said.get(name)!r}; it should be a number")
    return Settings(said)
