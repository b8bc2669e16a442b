"""Every option of a run, once, with its unit: `RMiPOConfig`.

It extends `transformers.TrainingArguments`, so the options users know (`learning_rate`,
`max_steps`, `output_dir`, ...) keep their names and meaning. The texts in `metadata["help"]` are
the documentation: the command line's `--help` is made from them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from rmipo_lite.ops.losses import LOSSES, Loss, PairOptions, loss_named, losses_with, option_problem
from rmipo_lite.ops.native import Impl

PriorMode = Literal["live", "cached"]
PriorContext = Literal["none", "bos"]
TokenizationMode = Literal["separate", "authors"]
TruncationMode = Literal["keep_end", "keep_start"]

# What other packages and programs call options of ours, for errors.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RMiPOConfig(TrainingArguments):
    """Options of a run: those of `transformers.TrainingArguments` and the ones below.

    One optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps` pairs. How
    they are cut into micro-steps is decided by `max_tokens_per_microstep` alone and never changes
    the result, which is the mean over the step's pairs.

    Raises:
        ValueError: a value that makes no sense; the message names the option, what is wanted and
            what came.
    """

    # The method (arXiv 2604.24804, equation 11; formulas in ops/losses.py)
    loss_type: str = _option("rmipo", f"Loss: {', '.join(LOSSES)}.")
    beta: float = _option(2.0, "Scale of the log-probability gap, 1/nat, > 0.")
    gamma_min: float = _option(
        0.3, "rmipo: smallest target margin, reached at a large PMI gap, reward units."
    )
    gamma_max: float = _option(
        1.6, "rmipo: largest target margin, at a PMI gap of 0 or below, reward units."
    )
    gamma_scaled_by_beta: bool = _option(
        False,
        "rmipo, with d = logps_chosen - logps_rejected: False is the paper's "
        "sigma(beta*d - gamma); True the authors' released code's sigma(beta*(d - gamma)), where "
        "gamma is in nats per token.",
    )
    simpo_gamma: float = _option(
        0.5, f"{losses_with(margin='constant')}: constant target margin outside beta, reward units."
    )
    label_smoothing: float = _option(
        0.0, f"{losses_with(smoothable=True)}: assumed share of swapped labels, in [0, 0.5)."
    )
    sft_weight: float = _option(
        0.0,
        "Weight of the mean negative log-probability per chosen token (nats per token, mean over "
        "all chosen tokens of the optimizer step), >= 0.",
    )
    prior: PriorMode = _option(
        "live",
        "rmipo: live scores the bare response under the current policy at every step (exact); "
        "cached scores it once before training: an approximation whose gamma drifts away, by "
        "0.06-0.11 at learning rate 1e-4 and 0.4-0.6 at 1e-3 within 150 steps of a 260K-parameter "
        "model.",
    )
    prior_context: PriorContext = _option(
        "none",
        "rmipo: none scores the bare response from its second token on, as the authors; bos puts "
        "the tokenizer's BOS in front and scores every token.",
    )

    # Data and tokens
    max_length: int | None = _option(
        1024,
        "Longest prompt + response, tokens; clamped to the model's context. None: the context.",
    )
    max_prompt_length: int | None = _option(
        None, "Longest prompt, tokens (needed for tokenization=authors); None: no own limit."
    )
    truncation_mode: TruncationMode = _option(
        "keep_end", "tokenization=authors only: which end of a too long prompt stays."
    )
    tokenization: TokenizationMode = _option(
        "separate",
        "separate: prompt and response tokenised apart and joined; authors: the joint encoding of "
        "the authors' code, for exact comparison, with packing=False only.",
    )
    chat_template: str | None = _option(
        None,
        "Chat template for conversational rows: plain ('User: ...\\nAssistant: '), a Jinja text, "
        "or None for the tokenizer's own.",
    )
    dataset_num_proc: int | None = _option(None, "Processes for tokenising; None: this one.")

    # How a step is computed
    packing: bool = _option(
        True,
        "Pack the pairs of a micro-step into one row without padding, every prompt once. A "
        "self-check before training compares it with the padded form on the run's own data.",
    )
    max_tokens_per_microstep: Literal["auto"] | int = _option(
        "auto",
        "Tokens that go through the model at once (prompts counted once when packed); auto: from "
        "the device's free memory. Splitting never changes the result. Where memory runs out all "
        "the same, the number is halved and the step repeated.",
    )
    gradient_checkpointing: bool | None = _option(
        None,
        "Compute activations again in the backward pass, for memory; None: only where the longest "
        "pair would not fit otherwise, or memory ran out.",
    )
    kernel_impl: Impl = _option(
        "auto", "auto, native (the compiled extension) or torch (the plain PyTorch reference)."
    )
    disable_dropout: bool = _option(
        True, "Switch every dropout off, so that policy and prior pass see the same network."
    )
    max_dropped_in_a_row: int = _option(
        10, "Stop after this many optimizer steps in a row that dropped pairs as not finite."
    )
    save_pair_values: bool = _option(
        False,
        "Write loss, log-probs, PMI and gamma of every pair of every step to pair_values.jsonl in "
        "the run's folder, about 300 bytes a pair.",
    )
    sample_prompts: int = _option(
        3,
        "So many held-out prompts train() answers before and after training, to show them with the "
        "result; 0 for none.",
    )

    eval_completions: int = _option(
        8,
        "So many prompts of an evaluation are answered (sampled, at most 128 tokens), to see "
        "answers that repeat themselves or no longer end; 0 for none.",
    )

    # transformers' own options with another default
    learning_rate: float = _option(1e-5, "Peak learning rate of the adapter (AdamW).")
    num_train_epochs: float = _option(1.0, "Passes over the pairs.")
    per_device_train_batch_size: int = _option(32, "Pairs in a dataloader batch.")
    per_device_eval_batch_size: int = _option(32, "Pairs in an evaluation batch.")
    lr_scheduler_type: str = _option("cosine", "Learning-rate schedule.")
    warmup_steps: float = _option(0.1, "Warm-up: steps, or a share of all steps when below 1.")
    logging_steps: float = _option(10, "Log every so many optimizer steps.")
    save_total_limit: int | None = _option(2, "Checkpoints kept; older ones are deleted.")
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "bfloat16 autocast; None: where the GPU has it in hardware (Ampere and newer)."
    )
    fp16: bool | None = _option(  # type: ignore[assignment]
        None, "float16 autocast with a gradient scaler; None: on a GPU without bfloat16."
    )
    remove_unused_columns: bool = _option(False, "Kept False: the batch is ours.")
    logging_nan_inf_filter: bool = _option(
        False, "Kept False: a loss that is not finite is dropped and counted, never shown as 0."
    )
    dataloader_pin_memory: bool = _option(
        False, "Nothing to pin: rows are built per micro-step, after the dataloader."
    )
    report_to: str | list[str] | None = _option("none", "Trackers to report to.")

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
        if str(self.max_tokens_per_microstep).isdigit():  # the command line and YAML give a text
            self.max_tokens_per_microstep = int(self.max_tokens_per_microstep)
        self._check_types()
        self._check_method()
        self._check_data()
        self._check_step()
        self._resolve_precision()
        # transformers makes False of None, and older versions know one name alone.
        names = ("gradient_checkpointing", "activation_checkpointing")
        self._checkpointing_is_open = all(getattr(self, name, None) is None for name in names)
        super().__post_init__()
        if self._checkpointing_is_open:  # a copy made from the fields must know it too
            for name in names:
                if hasattr(self, name):
                    setattr(self, name, None)

    def _check_types(self) -> None:
        """Every value against its annotation, so that a new option is checked by itself."""
        hints = get_type_hints(RMiPOConfig)
        own = own_option_names()
        for option in fields(RMiPOConfig):
            kinds = union_members(hints[option.name])
            value = getattr(self, option.name)
            # transformers sees to its own options that aren't plain numbers
            if option.init and (option.name in own or set(kinds) <= _NUMERIC):
                wanted = " or ".join(dict.fromkeys(map(_kind_in_words, kinds)))
                _require(any(_is_a(value, kind) for kind in kinds), option.name, wanted, value)
        _require(self.learning_rate >= 0, "learning_rate", "a number >= 0", self.learning_rate)

    def _check_method(self) -> None:
        try:
            problem = option_problem(self.pair_options, strict=True)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(f"RMiPOConfig: {problem}")
        _require(0 <= self.sft_weight < float("inf"), "sft_weight", ">= 0", self.sft_weight)

    def _check_data(self) -> None:
        for name in ("max_length", "max_prompt_length", "dataset_num_proc"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "None or a whole number >= 1", value)
        if self.tokenization == "authors":
            _require(
                self.max_length is not None and self.max_prompt_length is not None,
                "max_prompt_length",
                "a number when tokenization='authors' (theirs: max_length 1024 or 2048, "
                "max_prompt_length 512 or 1800)",
                self.max_prompt_length,
            )
            _require(
                not self.packing,
                "packing",
                "False when tokenization='authors', whose two sides can have different prompts",
                self.packing,
            )
        _require(
            not self.remove_unused_columns,
            "remove_unused_columns",
            "False",
            self.remove_unused_columns,
        )

    def _check_step(self) -> None:
        for name in ("sample_prompts", "eval_completions"):
            value = getattr(self, name)
            _require(value >= 0, name, "a whole number >= 0", value)
        budget = self.max_tokens_per_microstep
        _require(
            budget == "auto" or budget >= 1,
            "max_tokens_per_microstep",
            "'auto' or a whole number >= 1",
            budget,
        )
        _require(
            self.max_dropped_in_a_row >= 1,
            "max_dropped_in_a_row",
            ">= 1",
            self.max_dropped_in_a_row,
        )
        _require(
            not self.logging_nan_inf_filter,
            "logging_nan_inf_filter",
            "False (it shows losses that are not finite as healthy ones)",
            self.logging_nan_inf_filter,
        )

    def _resolve_precision(self) -> None:
        """Pick bf16 where the card has it, fp16 on older cards, neither on the CPU."""
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = bool(on_cuda and not self.fp16 and _has_native_bf16())
        if self.fp16 is None:
            self.fp16 = bool(on_cuda and not self.bf16)

    @property
    def pairs_per_step(self) -> int:
        """Pairs in one optimizer step."""
        return int(self.per_device_train_batch_size) * int(self.gradient_accumulation_steps)

    @property
    def dtype(self) -> torch.dtype:
        """What the run computes in, and what weights that it loads are in."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def loss(self) -> Loss:
        """The table's entry of `loss_type`."""
        return loss_named(self.loss_type)

    @property
    def pair_options(self) -> PairOptions:
        """The constants of the loss."""
        return PairOptions(*(getattr(self, name) for name in PairOptions._fields))

    @property
    def uses_prior(self) -> bool:
        """Whether the loss needs the response scored without its prompt."""
        return self.loss.needs_prior

    @property
    def checkpointing_is_open(self) -> bool:
        """Whether nobody said yes or no to computing activations again."""
        return self._checkpointing_is_open and not self.wants_checkpointing

    @property
    def wants_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass (under either of its names)."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)


def own_option_names() -> list[str]:
    """Names of the options that `RMiPOConfig` defines or gives another default, in order."""
    own = RMiPOConfig.__annotations__
    return [f.name for f in fields(RMiPOConfig) if f.name in own]


def _has_native_bf16() -> bool:
    # torch.cuda.is_bf16_supported() counts emulation (Turing) too, which is slower than fp16.
    return torch.cuda.get_device_capability()[0] >= 8


def _require(holds: bool, name: str, wanted: str, came: object) -> None:
    if not holds:
        raise ValueError(f"RMiPOConfig: {name} must be {wanted}, got {came!r}")


_NUMERIC = {int, float, type(None)}
_IN_WORDS = {float: "a number", int: "a whole number", bool: "True or False", type(None): "None"}


def union_members(hint: Any) -> tuple[Any, ...]:
    """The types a value may have: the members of a union, or the one type."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(member for part in get_args(hint) for member in union_members(part))
    return (hint,)


def _is_a(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return repr(names[0]) if len(names) == 1 else "one of " + ", ".join(names)
    return _IN_WORDS.get(kind, "a text" if kind is str else getattr(kind, "__name__", str(kind)))
