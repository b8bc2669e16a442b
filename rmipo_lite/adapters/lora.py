"""Which adapter a run attaches: a peft config, a dict of one, or LoRA by the run's options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftModel
from peft.utils import PeftType

# Options of the config by the name that peft's LoraConfig has for them.
_OPTIONS = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
}  # fmt: skip
_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")  # of layers; anything else is peft's own expression

Adapter = PeftConfig | Mapping[str, Any] | str | None


def lora_config(**changes: Any) -> LoraConfig:
    """LoRA on every linear layer but the head: r=16, alpha twice r, no dropout, but for `changes`.

    Raises:
        ValueError: peft has no such field, or refuses its value.
    """
    rank = changes.get("r", 16)
    settings = {
        "r": 16, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear",
        "task_type": "CAUSAL_LM", **changes,
    }  # fmt: skip
    return _config(LoraConfig, settings)


def adapter_config(peft_config: Adapter, args: Any) -> PeftConfig | str | None:
    """`peft_config` as it was given, or as the config's LoRA options make it.

    Args:
        peft_config: "auto", "new", None, a peft config, or a dict of its fields: of LoRA, where no
            `peft_type` is among them.
        args: the run's options.

    Returns:
        "auto" and "new" where no option says more than they do.

    Raises:
        ValueError: both a peft config and LoRA options, or a field that peft doesn't know.
    """
    given = _given(args)
    if given and not isinstance(peft_config, str):
        named = "None, which attaches nothing," if peft_config is None else "a config of its own"
        raise ValueError(
            f"{', '.join(given)}: peft_config is {named} so it would not be heard; say it in one "
            "place, or leave peft_config='auto'"
        )
    if isinstance(peft_config, Mapping):
        fields = dict(peft_config)
        named = str(fields.pop("peft_type", "LORA")).upper()
        if named == "LORA":
            return lora_config(**fields)
        if named not in PeftType.__members__:
            raise ValueError(f"peft_config: peft has no peft_type {named!r}")
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[named]]
        return _config(kind, {"task_type": "CAUSAL_LM", **fields})
    if not given or peft_config not in ("auto", "new"):
        return peft_config
    changes = {_OPTIONS[ours]: value for ours, value in given.items()}
    if isinstance(names := changes.get("target_modules"), str):
        changes["target_modules"] = _targets(names)
    return lora_config(**changes)


def refuse_another(adapted: PeftModel, args: Any) -> None:
    """Raise ValueError where LoRA options ask for another adapter than the one that goes on."""
    own = adapted.active_peft_config
    for ours, wanted in _given(args).items():
        was = getattr(own, _OPTIONS[ours], None)
        if ours == "target_modules":
            targets = _targets(wanted) if isinstance(wanted, str) else wanted
            same = targets == "all-linear" or targets == was or set(targets) == set(was or ())
        else:
            same = was == wanted
        if not same:
            raise ValueError(
                f"{ours}: the model has an adapter that goes on, whose {_OPTIONS[ours]} is {was!r} "
                f"and not {wanted!r}; peft_config='new' makes a fresh one"
            )


def _given(args: Any) -> dict[str, Any]:
    """The LoRA options that somebody set."""
    return {ours: value for ours in _OPTIONS if (value := getattr(args, ours, None)) is not None}


def _targets(names: str) -> str | list[str]:
    """Names between commas as a list, which peft finds by their ends; a text is an expression."""
    if names == "all-linear" or not _NAMES.fullmatch(names.strip()):
        return names
    return [name.strip() for name in names.split(",")]


def _config(kind: type[PeftConfig], fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"peft_config: {error}") from error
