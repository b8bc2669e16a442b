"""Every option of a run, once, with its unit: `RMiPOConfig`.

It extends `transformers.TrainingArguments`, so the options users know (`learning_rate`,
`max_steps`, `output_dir`, ...) keep their names and meaning. The texts in `metadata["help"]` are
the documentation: the command line's `--help` is made from them.
"""

from __future__ import annotations

import difflib
import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from rmipo_lite.methods.table import SumLoss
from rmipo_lite.ops.devices import accelerator, has_native_bf16
from rmipo_lite.ops.losses import option_problem
from rmipo_lite.ops.native import Impl
from rmipo_lite.options import inherited, own
from rmipo_lite.options.method import MethodFields, described
from rmipo_lite.options.types import enum_values, in_words, is_a, plain, union_members

TokenizationMode = Literal["separate", "authors"]
TruncationMode = Literal["keep_end", "keep_start"]

# What other packages and programs call options of ours, for errors.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
}

# What transformers takes, and leaves in the option, beside what its annotation says.
_ALSO: dict[str, tuple[type, ...]] = {"accelerator_config": (AcceleratorConfig,), "fsdp": (bool,)}


@dataclass
class RMiPOConfig(MethodFields, TrainingArguments):
    """Options of a run: those of `transformers.TrainingArguments` and the ones below.

    One optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps` pairs. How
    they are cut into micro-steps is decided by `max_tokens_per_microstep` alone and never changes
    the result, which is the mean over the step's pairs.

    Raises:
        ValueError: a value that makes no sense; the message names the option, what is wanted and
            what came.
    """

    # Data and tokens
    max_length: int | None = described(
        1024,
        "Longest prompt + response, tokens; clamped to the model's context. None: the context.",
    )
    max_prompt_length: int | None = described(
        None, "Longest prompt, tokens (needed for tokenization=authors); None: no own limit."
    )
    truncation_mode: TruncationMode = described(
        "keep_end", "tokenization=authors only: which end of a too long prompt stays."
    )
    tokenization: TokenizationMode = described(
        "separate",
        "separate: prompt and response tokenised apart and joined; authors: the joint encoding of "
        "the authors' code, for exact comparison, with packing=False only.",
    )
    chat_template: str | None = described(
        None,
        "Chat template for conversational rows: plain ('User: ...\\nAssistant: '), a Jinja text, "
        "or None for the tokenizer's own.",
    )
    dataset_num_proc: int | None = described(None, "Processes for tokenising; None: this one.")

    # The adapter, where peft_config is "auto" or "new"
    lora_r: int | None = described(None, "Rank of the LoRA adapter; None: 16.")
    lora_alpha: float | None = described(
        None, "Scale of the adapter, alpha / r times its product; None: twice the rank."
    )
    lora_dropout: float | None = described(
        None, "Dropout in front of the adapter; None: 0. Needs disable_dropout=False."
    )
    target_modules: str | list[str] | None = described(
        None, "Layers that get LoRA, names between commas or in a list; None: every linear layer."
    )

    # How a step is computed
    packing: bool = described(
        True,
        "Pack the pairs of a micro-step into one row without padding, every prompt once. A "
        "self-check before training compares it with the padded form on the run's own data.",
    )
    max_tokens_per_microstep: Literal["auto"] | int = described(
        "auto",
        "Tokens that go through the model at once (prompts counted once when packed); auto: from "
        "the device's free memory, more of them where no gradient is wanted. Splitting never "
        "changes the result. Where memory runs out all the same, the number is halved and the "
        "step repeated.",
    )
    gradient_checkpointing: bool | None = described(
        None,
        "Compute activations again in the backward pass, for memory; None: only in micro-steps "
        "that would not fit otherwise, in as many layers as they need, or in all once memory ran "
        "out with a single pair.",
    )
    kernel_impl: Impl = described(
        "auto", "auto, native (the compiled extension) or torch (the plain PyTorch reference)."
    )
    fused_layers: Literal["auto", "off"] = described(
        "auto",
        "auto: norms and gated units run in liger-kernel's kernels, where that is installed and "
        "the device has Triton; each layer is compared with the original before training. off: "
        "as transformers computes them.",
    )
    disable_dropout: bool = described(
        True, "Switch every dropout off, so that policy and prior pass see the same network."
    )
    max_dropped_in_a_row: int = described(
        10, "Stop after this many optimizer steps in a row that dropped pairs as not finite."
    )
    save_pair_values: bool = described(
        False,
        "Write loss, log-probs, PMI and gamma of every pair of every step to pair_values.jsonl in "
        "the run's folder, about 300 bytes a pair.",
    )
    sample_prompts: int = described(
        3,
        "So many held-out prompts train() answers before and after training, to show them with the "
        "result; 0 for none.",
    )

    eval_completions: int = described(
        8,
        "So many prompts of an evaluation are answered (sampled, at most 128 tokens), to see "
        "answers that repeat themselves or no longer end; 0 for none.",
    )

    # transformers' own options with another default
    learning_rate: Literal["auto"] | float = described(  # type: ignore[assignment]
        "auto",
        "Peak learning rate (AdamW); auto: a search before the first step raises it until the "
        "model begins to say what it never would have; the run's rates then add up to the "
        "search's (docs/claims.md).",
    )
    num_train_epochs: float = described(1.0, "Passes over the pairs.")
    per_device_train_batch_size: int = described(32, "Pairs in a dataloader batch.")
    per_device_eval_batch_size: int = described(32, "Pairs in an evaluation batch.")
    lr_scheduler_type: str = described("cosine", "Learning-rate schedule.")
    warmup_steps: float = described(0.1, "Warm-up: steps, or a share of all steps when below 1.")
    logging_steps: float = described(10, "Log every so many optimizer steps.")
    save_total_limit: int | None = described(2, "Checkpoints kept; older ones are deleted.")
    bf16: bool | None = described(  # type: ignore[assignment]
        None,
        "bfloat16 autocast; None: where the GPU has it in hardware (NVIDIA's Ampere and newer; "
        "Apple's compute in float32 unless asked).",
    )
    fp16: bool | None = described(  # type: ignore[assignment]
        None,
        "float16 autocast with a gradient scaler; None: on NVIDIA's and AMD's without bfloat16.",
    )
    remove_unused_columns: bool = described(False, "Kept False: the batch is ours.")
    logging_nan_inf_filter: bool = described(
        False, "Kept False: a loss that is not finite is dropped and counted, never shown as 0."
    )
    dataloader_pin_memory: bool = described(
        False, "Nothing to pin: rows are built per micro-step, after the dataloader."
    )
    report_to: str | list[str] | None = described("none", "Trackers to report to.")

    def __new__(cls, *args: Any, **options: Any) -> RMiPOConfig:
        """Raise TypeError for an option that isn't there, with the name of the nearest."""
        known = [f.name for f in fields(cls) if f.init]
        for name in options:
            if name not in known:
                near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
                near = near or difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise TypeError(f"RMiPOConfig: there is no option {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Reject nonsense, then let transformers resolve its own options."""
        for option in fields(self):
            setattr(self, option.name, plain(getattr(self, option.name)))
        if str(self.max_tokens_per_microstep).isdigit():  # the command line and YAML give a text
            self.max_tokens_per_microstep = int(self.max_tokens_per_microstep)
        if self.report_to is None:
            self.report_to = "none"
        _refuse(own.take_defaults(self))
        self._check_types()
        self._check_inherited()
        self._check_method()
        self._resolve_precision()
        # transformers makes False of None, and older versions know one name alone.
        names = ("gradient_checkpointing", "activation_checkpointing")
        self.shards_layers: bool | None = None  # FSDP2, by `training.sharding.decide_sharding`
        self._checkpointing_is_open = all(getattr(self, name, None) is None for name in names)
        try:
            with self._bf16_on_a_cpu():
                super().__post_init__()
        except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
            raise ValueError(f"RMiPOConfig: {error}") from error
        _refuse(inherited.schedule_problem(self.learning_rate, self.lr_scheduler_kwargs))
        _refuse(
            inherited.parsed_problem(self.accelerator_config, self.gradient_checkpointing_kwargs)
        )
        if self._checkpointing_is_open:  # a copy made from the fields must know it too
            for name in names:
                if hasattr(self, name):
                    setattr(self, name, None)

    def _check_types(self) -> None:
        """Every value against its annotation, so that a new option is checked by itself."""
        hints = get_type_hints(RMiPOConfig)
        for option in fields(RMiPOConfig):
            kinds = (*union_members(hints[option.name]), *_ALSO.get(option.name, ()))
            value = getattr(self, option.name)
            fits = not option.init or any(is_a(value, kind) for kind in kinds)
            _require(fits and _is_member(value, kinds), option.name, in_words(kinds), value)

    def _check_inherited(self) -> None:
        _refuse(inherited.problem({f.name: getattr(self, f.name) for f in fields(RMiPOConfig)}))
        # torch takes 0 and 0.999 for two kinds of number
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)

    def _check_method(self) -> None:
        if not isinstance(self.loss, SumLoss):
            _refuse(option_problem(self.pair_options, strict=True))
        _refuse(own.problem(self))

    def _resolve_precision(self) -> None:
        """Pick bf16 where the card has it, fp16 on older cards, neither on the CPU and Apple's."""
        kind = None if self.use_cpu else accelerator()
        self._half_is_open = self.bf16 is None and self.fp16 is None
        self._weights_dtype: torch.dtype | None = None  # None: as the run computes
        if self.bf16 is None:
            self.bf16 = bool(kind and not self.fp16 and has_native_bf16(kind))
        if self.fp16 is None:
            self.fp16 = bool(kind == "cuda" and not self.bf16)
        # There it would compute in float32, without the scaler that sees infinite gradients.
        on_cpu = self.use_cpu or not (kind or torch.accelerator.is_available())
        _require(not (on_cpu and self.fp16), "fp16", "False on the CPU (bf16 works there)", True)

    @contextmanager
    def _bf16_on_a_cpu(self) -> Iterator[None]:
        """transformers refuses bfloat16 without a GPU unless the CPU was asked for by name."""
        asked = self.use_cpu
        self.use_cpu = asked or bool(self.bf16 and not torch.accelerator.is_available())
        yield
        self.use_cpu = asked

    @property
    def half_is_open(self) -> bool:
        """Whether float16 was taken for want of bfloat16, and nobody asked for it."""
        return self._half_is_open and bool(self.fp16)

    def take_float32(self, *, weights_alone: bool = False) -> None:
        """Where float16 was chosen and can't hold the numbers: weights in float32, or everything.

        With the weights alone hidden states are in float32 too, and products in float16.
        """
        self._weights_dtype = torch.float32
        if not weights_alone:
            self.fp16, self.mixed_precision = False, "no"

    @property
    def weights_dtype(self) -> torch.dtype:
        """What weights are loaded in."""
        return self._weights_dtype or self.dtype

    @property
    def pairs_per_step(self) -> int:
        """Pairs in one optimizer step."""
        return int(self.per_device_train_batch_size) * int(self.gradient_accumulation_steps)

    def steps_of_an_epoch(self, pairs: int) -> int:
        """Optimizer steps of a pass over so many pairs."""
        whole = pairs // self.pairs_per_step if self.dataloader_drop_last else 0
        return whole or math.ceil(pairs / self.pairs_per_step)

    def steps_of_a_run(self, pairs: int) -> int:
        """Optimizer steps of a whole run that trains on so many pairs."""
        if self.max_steps > 0:
            return int(self.max_steps)
        return max(1, math.ceil(self.steps_of_an_epoch(pairs) * self.num_train_epochs))

    @property
    def dtype(self) -> torch.dtype:
        """What the run computes in."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def checkpointing_is_open(self) -> bool:
        """Whether nobody said yes or no to computing activations again."""
        return self._checkpointing_is_open and not self.wants_checkpointing

    @property
    def wants_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass (under either of its names)."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)


def own_option_names() -> list[str]:
    """Names of the options that `RMiPOConfig` defines or gives another default.

    In the order of the source: the method, then data, then transformers' with our defaults.
    """
    known = {f.name for f in fields(RMiPOConfig)}
    named = MethodFields.__annotations__ | RMiPOConfig.__annotations__
    return [name for name in named if name in known]


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"RMiPOConfig: {problem}")


def _require(holds: bool, name: str, wanted: str, came: object) -> None:
    if not holds:
        raise ValueError(f"RMiPOConfig: {name} must be {wanted}, got {came!r}")


def _is_member(value: object, kinds: tuple[Any, ...]) -> bool:
    """Whether a text that stands for an enum's member names one."""
    enums = [kind for kind in kinds if isinstance(kind, enum.EnumMeta)]
    if not enums or not isinstance(value, str):
        return True
    return any(value in enum_values(kind) for kind in enums)


# Where no activation is kept for a backward pass, so none has to be computed again.
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # new name, old name
NO_BACKWARD = {next(n for n in _CHECKPOINTING if n in RMiPOConfig.__dataclass_fields__): False}
