"""`RMiPOTrainer`: a `transformers.Trainer` whose batch is a whole optimizer step of pairs.

accelerate, trackers, callbacks and schedules come with the base class. What is ours: a dataloader
batch holds every pair of one optimizer step and is cut into micro-steps by tokens (`step.py`);
evaluation and metrics are means over pairs; checkpoints are verified and free of pickle
(`checkpoint.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from rmipo_lite import batch, loading, metrics
from rmipo_lite.budget import plan_micro_steps
from rmipo_lite.checkpoint import SafeCheckpointing
from rmipo_lite.config import RMiPOConfig, TokenizationMode, TruncationMode
from rmipo_lite.data import DataReport, load_rows
from rmipo_lite.display import say
from rmipo_lite.model import causal_lm, disable_dropout
from rmipo_lite.selfcheck import packing_problem
from rmipo_lite.step import PairStep, StepOutcome
from rmipo_lite.tokenization import (
    TokenizationOptions,
    TokenizedPair,
    prepare_tokenizer,
    tokenize_rows,
)

_ROWS_NAMED = 5  # dropped rows that one message names


def _collate(pairs: list[TokenizedPair]) -> dict[str, list[TokenizedPair]]:
    # Rows are built per micro-step, after the cut. No field is called "labels": transformers would
    # multiply the gradient by the accumulation steps.
    return {"pairs": pairs}


class _LogLastStep(TrainerCallback):
    """Log after the last step too: a run shorter than `logging_steps` would leave no numbers."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class RMiPOTrainer(SafeCheckpointing, Trainer):
    """Train a causal language model on preference pairs.

    Args:
        model: a name or folder, a PreTrainedModel or a PeftModel.
        args: the options; None takes the defaults and the folder `rmipo-<model name>`.
        train_dataset: any preference dataset that `train()` takes, or a list of `TokenizedPair`.
        eval_dataset: likewise, or a dict of several by name, or None.
        processing_class: the tokenizer; None loads the model's.
        peft_config: "auto", "new", a peft config or None (`loading.attach_adapter`).
        quantization_config: for a model given by name, how its weights are quantised.
        callbacks: transformers callbacks.
        optimizers: (optimizer, scheduler), or Nones for those of `args`.

    Attributes:
        data_report: what happened to the training rows, None for tokenised pairs.
        dropped_pairs: pairs that training dropped as not finite: row, step and count.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says which.
    """

    args: RMiPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RMiPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = RMiPOConfig(loading.run_name(model)) if args is None else args
        _refuse_several_devices(args)
        if processing_class is None:
            processing_class = loading.load_tokenizer(loading.name_of(model))
        if not isinstance(model, str) and quantization_config is not None:
            raise ValueError(
                "quantization_config is for a model given by name or folder; this one is loaded"
            )
        loaded: nn.Module = (
            loading.load_model(model, args, quantization_config)
            if isinstance(model, str)
            else model
        )
        loading.protect_4bit_on_cpu(loaded)
        set_seed(args.seed)  # a new adapter's weights belong to the run's seed, as its order does
        loaded = loading.attach_adapter(loaded, peft_config)
        if args.disable_dropout:
            disable_dropout(loaded)
        self._tokenizer = prepare_tokenizer(processing_class, args.chat_template)
        self._prior_bos_id = prior_bos_id(args, self._tokenizer)
        self.data_report: DataReport | None = None
        train_pairs, self.data_report = self._tokenized(train_dataset, args, loaded)
        eval_pairs = self._tokenized_eval(eval_dataset, args, loaded)
        super().__init__(
            model=loaded,
            args=_whole_step_batches(args),
            data_collator=_collate,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=self._tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(_LogLastStep())
        # Our batch has no num_items: the loss is a mean over pairs already.
        self.model_accepts_loss_kwargs = False
        self.dropped_pairs: list[dict[str, int]] = []
        self._window: list[StepOutcome] = []
        self._num_tokens = 0
        self._dropped_in_a_row = 0
        self.pair_step = self._make_step(train_pairs or [])

    # ---- data -----------------------------------------------------------------------------

    def _tokenized(
        self, dataset: Any, args: RMiPOConfig, model: nn.Module
    ) -> tuple[list[TokenizedPair] | None, DataReport | None]:
        if dataset is None:
            return None, None
        if _is_tokenized(dataset):
            return list(dataset), None
        rows, report = load_rows(dataset)
        options = tokenization_options(args, model)
        return tokenize_rows(rows, self._tokenizer, options, report), report

    def _tokenized_eval(self, dataset: Any, args: RMiPOConfig, model: nn.Module) -> Any:
        if isinstance(dataset, dict) and not {"chosen", "rejected"} & dataset.keys():
            return {name: self._tokenized(part, args, model)[0] for name, part in dataset.items()}
        return self._tokenized(dataset, args, model)[0]

    # ---- set-up ---------------------------------------------------------------------------

    def _make_step(self, pairs: Sequence[TokenizedPair]) -> PairStep:
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        pad_id = next(i for i in ids if i is not None)
        packing = self.args.packing
        if packing and pairs:
            problem = packing_problem(self.model, pairs, self.args.kernel_impl, pad_id)
            if problem is not None:
                packing = False
                say(f"Packed batches are off for this model, padded ones are used: {problem}")
        longest = max((batch.micro_step_tokens([pair], packing) for pair in pairs), default=0)
        plan = plan_micro_steps(self.model, self.args, longest)
        step = PairStep(
            model=self.model,
            args=self.args,
            max_tokens=plan.max_tokens,
            packing=packing,
            prior_bos_id=self._prior_bos_id,
            pad_id=pad_id,
            autocast=self.accelerator.autocast,
        )
        if plan.checkpointing:
            step.enable_checkpointing()
            if self.args.checkpointing_is_open:
                say(f"Checkpointing is on: a pair of {longest} tokens would not fit without")
        return step

    # ---- training -------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One optimizer step's gradients; the mean loss over its pairs."""
        model.train()
        pairs: list[TokenizedPair] = inputs["pairs"]
        if self.args.prior == "cached" and self.args.uses_prior:
            self._fill_prior_cache()
        outcome = self.pair_step.train(pairs, self.accelerator.backward)
        self._window.append(outcome)
        self._num_tokens += outcome.num_tokens
        self._count_dropped(outcome)
        return outcome.loss.to(self.args.device)

    def _fill_prior_cache(self) -> None:
        """Before the first step: the prior of every training pair under the untrained policy."""
        if self.pair_step.prior_cache is None:
            pairs = cast(list[TokenizedPair], self.train_dataset)
            self.pair_step.prior_cache = self.pair_step.prior_means(pairs)

    def _count_dropped(self, outcome: StepOutcome) -> None:
        if not outcome.dropped:
            self._dropped_in_a_row = 0
            return
        step = self.state.global_step + 1
        rows = [pair.row for pair in outcome.dropped]
        self.dropped_pairs += [{"row": row, "step": step} for row in rows]
        named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (
            " ..." if len(rows) > _ROWS_NAMED else ""
        )
        say(
            f"Step {step}: {len(rows)} pair(s) dropped, loss or gradient not finite (row {named}); "
            f"{len(self.dropped_pairs)} dropped so far"
        )
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= self.args.max_dropped_in_a_row:
            raise FloatingPointError(
                f"stopped at step {step}: {self._dropped_in_a_row} optimizer steps in a row had "
                f"pairs whose loss or gradient is not finite (last: row {named}). No such step "
                "changed a weight. A lower learning_rate or fp32 weights are the usual cures."
            )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula counts padded tokens of one model input."""
        return 0

    # ---- evaluation -----------------------------------------------------------------------

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, metrics.PairValues, None]:
        """(mean loss, per-pair values, None) of a batch; there are no labels and no logits."""
        values = metrics.concat(list(self.pair_step.evaluate(inputs["pairs"])))
        return values.loss.mean(), values, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over all pairs of the dataset. Leaves mode and random state as they were."""
        was_training = self.model.training
        self.model.eval()
        parts = []
        try:
            for inputs in dataloader:
                parts.append(self.prediction_step(self.model, inputs, True)[1])
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        finally:
            self.model.train(was_training)
        if not parts:
            raise ValueError("eval_dataset: no pair to evaluate")
        values = metrics.concat(parts)
        named = {"loss": float(values.loss.mean()), **metrics.reduce(parts, self.args)}
        return EvalLoopOutput(
            predictions=np.empty(0),  # no logits are ever held
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in named.items()},
            num_samples=len(values.loss),
        )

    # ---- logging and state ----------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs since the last log line."""
        if "loss" in logs and self._window:
            logs = self._window_logs(logs)
            self._window = []
        super().log(logs, start_time)

    def _window_logs(self, logs: dict[str, float]) -> dict[str, float]:
        counted = [outcome for outcome in self._window if outcome.num_pairs]
        num_pairs = sum(outcome.num_pairs for outcome in counted)
        logs = dict(logs)
        if counted:
            total = sum(outcome.loss * outcome.num_pairs for outcome in counted)
            logs["loss"] = float(total) / num_pairs
        else:
            # Every pair since the last line was dropped: a zero here would look healthy.
            del logs["loss"]
        values = [part for outcome in counted for part in outcome.values]
        logs |= metrics.reduce(values, self.args)
        logs["num_tokens"] = float(self._num_tokens)
        if self.dropped_pairs:
            logs["rmipo/dropped_pairs"] = float(len(self.dropped_pairs))
        return logs

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and random state (JSON)."""
        cache = self.pair_step.prior_cache
        return {
            "num_tokens": self._num_tokens,
            "max_tokens_per_microstep": self.pair_step.max_tokens,
            "packing": self.pair_step.packing,
            "checkpointing": self.pair_step.checkpointing,
            "dropped_pairs": self.dropped_pairs,
            "prior_cache": None if cache is None else [[row, *cache[row]] for row in sorted(cache)],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the settings and counts of the checkpoint."""
        self._num_tokens = state["num_tokens"]
        self.pair_step.max_tokens = state["max_tokens_per_microstep"]
        self.pair_step.packing = state["packing"]
        wanted = state.get("checkpointing") and self.args.checkpointing_is_open
        if wanted and not self.pair_step.checkpointing:
            self.pair_step.enable_checkpointing()
        self.dropped_pairs = list(state["dropped_pairs"])
        cache = state["prior_cache"]
        if cache is not None:
            self.pair_step.prior_cache = {
                int(row): (side_w, side_l) for row, side_w, side_l in cache
            }


def tokenization_options(args: RMiPOConfig, model: nn.Module) -> TokenizationOptions:
    """The run's tokenisation, `max_length` clamped to the model's context (with one line)."""
    config = causal_lm(model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    max_length = args.max_length
    if context is not None and (max_length is None or max_length > context):
        if max_length is not None:
            say(f"max_length {max_length} is more than the model's context: {context} is used")
        max_length = int(context)
    return TokenizationOptions(
        mode=cast(TokenizationMode, args.tokenization),
        max_length=max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=cast(TruncationMode, args.truncation_mode),
        chat_template=args.chat_template,
        num_proc=args.dataset_num_proc,
    )


def prior_bos_id(args: RMiPOConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token in front of a bare response, None for `prior_context="none"`.

    Raises:
        ValueError: "bos" with a tokenizer that has none.
    """
    if args.prior_context == "none":
        return None
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "prior_context='bos' needs a tokenizer with a BOS token, and this one has none; use "
            "prior_context='none'"
        )
    return int(tokenizer.bos_token_id)


def _whole_step_batches(args: RMiPOConfig) -> RMiPOConfig:
    """A copy whose dataloader batch is one optimizer step; the caller's own stays as it is."""
    whole = copy.copy(args)
    whole.per_device_train_batch_size = args.pairs_per_step
    whole.gradient_accumulation_steps = 1
    return whole


def _is_tokenized(dataset: Any) -> bool:
    return (
        isinstance(dataset, Sequence)
        and len(dataset) > 0
        and all(isinstance(pair, TokenizedPair) for pair in dataset)
    )


def _refuse_several_devices(args: RMiPOConfig) -> None:
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"one process on one device: this run has {args.world_size} processes and "
            f"{args.n_gpu} GPUs visible. Start it without a launcher and set "
            "CUDA_VISIBLE_DEVICES=0; several devices are refused until they are proven"
        )
