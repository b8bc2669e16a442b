"""`RMiPOTrainer`: a `transformers.Trainer` whose batch is a whole optimizer step of pairs.

accelerate, trackers, callbacks and schedules come with the base class. What is ours: a dataloader
batch holds every pair of one optimizer step and is cut into micro-steps by tokens (`step.py`);
evaluation and metrics are means over pairs; checkpoints are verified and free of pickle
(`checkpoints/`).
"""

import math
from pathlib import Path
from typing import Any, cast

from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from rmipo_lite.adapters import attach
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.lora import Adapter
from rmipo_lite.adapters.start import trained_weights
from rmipo_lite.checkpoints.trainer_mixin import SafeCheckpointing
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport, name_rows
from rmipo_lite.model import loading, names, upstream
from rmipo_lite.model.backbone import disable_dropout
from rmipo_lite.model.batch import packed_length
from rmipo_lite.model.generation import other_ends, savable_generation_config
from rmipo_lite.ops.devices import slow_bf16, unused_gpu
from rmipo_lite.output.console import say
from rmipo_lite.output.uncertainty import PairedValues
from rmipo_lite.parallel.group import Group
from rmipo_lite.planning.half_range import keep_family_in_range, keep_model_in_range
from rmipo_lite.step.losses import balance_of
from rmipo_lite.step.make import make_step
from rmipo_lite.step.pair_values import StepOutcome
from rmipo_lite.tokens.ending import anchored_end, scored_end
from rmipo_lite.tokens.options import prior_front
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.training.datasets import ReadsPairs
from rmipo_lite.training.evaluation import PairEvaluation, set_mode
from rmipo_lite.training.known_before import KnowsBefore, RefModel, say_uneven_labels
from rmipo_lite.training.learning_rate import FindsLearningRate, with_own_rate
from rmipo_lite.training.refusals import (
    refuse_bad_pairs,
    refuse_bad_schedule,
    refuse_bad_weights,
    refuse_coarse_steps,
    refuse_other_callbacks,
    refuse_other_options,
    refuse_unknown_metric,
    whole_step_batches,
)
from rmipo_lite.training.resume import GoingOn
from rmipo_lite.training.run_log import RunLog
from rmipo_lite.training.sharding import decide_sharding, refuse_parts, seen_by_us_alone, share_out
from rmipo_lite.training.shared_steps import (
    SharesSteps,
    begin_alike,
    say_how_many,
    take_first_card,
)
from rmipo_lite.watch.doctor import Doctor
from rmipo_lite.watch.progress import show_progress


def _collate(pairs: list[TokenizedPair]) -> dict[str, list[TokenizedPair]]:
    # Rows are built per micro-step, after the cut. No field is called "labels": transformers would
    # multiply the gradient by the accumulation steps.
    return {"pairs": pairs}


class _LogLastStep(TrainerCallback):
    """Log after the last step too: a run shorter than `logging_steps` would leave no numbers."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class RMiPOTrainer(
    GoingOn,
    FindsLearningRate,
    KnowsBefore,
    SafeCheckpointing,
    PairEvaluation,
    SharesSteps,
    ReadsPairs,
    Trainer,
):
    """Train a causal language model on preference pairs.

    Args:
        model: a name or folder, a PreTrainedModel or a PeftModel.
        args: the options; None takes the defaults and the folder `rmipo-<model name>`.
        train_dataset: any preference dataset that `train()` takes, or a list of `TokenizedPair`.
        eval_dataset: likewise, or a dict of several by name, or None.
        processing_class: the tokenizer; None loads the model's.
        peft_config: "auto", "new", a peft config, a dict of one, or None (`attach.attach_adapter`).
        quantization_config: for a model given by name, how its weights are quantised.
        callbacks: transformers callbacks.
        optimizers: (optimizer, scheduler), or Nones for those of `args`.
        ref_model: what methods with a reference measure from, a name or a loaded model; None: the
            model as it came to the run, adapter and all.
        split, eval_split: which split of `train_dataset` and `eval_dataset`, where these have
            several; None takes train, or the only one.

    Attributes:
        data_report: what happened to the training rows, None for tokenised pairs.
        start: the adapter's weights at step 0, by name; None where the model is trained in full.
        doctor: watches the run; `doctor.findings` are what it found so far.
        run_log: what the steps did.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says which.
    """

    args: RMiPOConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RMiPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Adapter = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        ref_model: RefModel = None,
        split: str | None = None,
        eval_split: str | None = None,
    ) -> None:
        if isinstance(model, Path):
            model = str(model)
        args = RMiPOConfig(names.run_name(model)) if args is None else args
        upstream.require()
        refuse_other_options(args)
        refuse_other_callbacks(callbacks)
        decide_sharding(args)
        on_slow_cpu = args.bf16 and args.device.type == "cpu"
        for warning in (
            None if args.use_cpu else unused_gpu(), slow_bf16() if on_slow_cpu else None,
        ):  # fmt: skip
            if warning:
                say(f"WARNING: {warning}")
        if processing_class is None:
            processing_class = loading.load_tokenizer(names.name_of(model))
        if not isinstance(model, str) and quantization_config is not None:
            raise ValueError(
                "quantization_config is for a model given by name or folder; this one is loaded"
            )
        loaded: nn.Module
        if isinstance(model, str):
            keep_family_in_range(model, args)
            with seen_by_us_alone(args):
                loaded = loading.load_model(model, args, quantization_config)
        else:
            loaded = model
        refuse_parts(loaded)
        take_first_card(args, loaded)
        loading.protect_4bit_on_cpu(loaded)
        refuse_bad_weights(loaded)
        set_seed(args.seed)  # a new adapter's weights belong to the run's seed, as its order does
        had_adapter = any(isinstance(part, BaseTunerLayer) for part in loaded.modules())
        loaded = attach.attach_adapter(loaded, peft_config, args)
        self.went_on = had_adapter and (peft_config is None or peft_config == "auto")
        begin_alike(loaded, Group.current(), bool(args.shards_layers))
        self.start = trained_weights(loaded) if isinstance(loaded, PeftModel) else None
        if args.disable_dropout:
            disable_dropout(loaded)
        self._tokenizer = prepare_tokenizer(processing_class, args.chat_template)
        self._prior_front = prior_front(args, self._tokenizer)
        self.data_report: DataReport | None = None
        train_pairs, self.data_report = self._tokenized(
            train_dataset, args, loaded, "train_dataset", split
        )
        refuse_bad_pairs(train_pairs or [], args)
        say_uneven_labels(train_pairs or [], args)
        eval_pairs = self._tokenized_eval(eval_dataset, args, loaded, eval_split)
        keep_model_in_range(loaded, train_pairs or [], args)
        base = causal_lm(loaded)
        ends = other_ends(base.generation_config, self._tokenizer, scored_end(train_pairs or []))
        base.generation_config = savable_generation_config(loaded, self._tokenizer)
        use_cache = getattr(base.config, "use_cache", None)
        share_out(loaded, args, Group.current())
        own_args = with_own_rate(whole_step_batches(args), optimizers[0])
        with seen_by_us_alone(own_args):
            super().__init__(
                model=loaded,
                args=own_args,
                data_collator=_collate,
                train_dataset=train_pairs,
                eval_dataset=eval_pairs,
                processing_class=self._tokenizer,
                callbacks=None if callbacks is None else list(callbacks),
                optimizers=optimizers,
            )
        if use_cache is not None and not args.use_cache:
            base.config.use_cache = use_cache  # no pass of ours asks it, and it is saved
        self.neftune_noise_alpha = None  # the step draws it
        self.add_callback(_LogLastStep())
        self.doctor = Doctor(self.args, len(eval_pairs) if isinstance(eval_pairs, list) else 0)
        self.doctor.report, self.doctor.ends = self.data_report, ends
        self.add_callback(self.doctor)
        if not self.args.disable_tqdm:
            show_progress(self)
        # Our batch has no num_items: the loss is a mean over pairs already.
        self.model_accepts_loss_kwargs = False
        self.run_log = RunLog(self.args)
        self.add_callback(self.run_log.clock)
        self.pair_step = make_step(
            self.model, self.args, train_pairs or [], tokenizer=self._tokenizer,
            prior_front=self._prior_front, autocast=self.accelerator.autocast,
        )  # fmt: skip
        self.make_reference(ref_model, train_pairs or [])
        self.length_balance, self.pair_step.weights = balance_of(train_pairs or [], self.args)
        self.pair_step.end_id = anchored_end(train_pairs or [], self._tokenizer)
        self.doctor.is_anchored = self.pair_step.end_id is not None
        self.held_out_values = self.doctor.held_out_values = PairedValues()
        say_how_many(args, self.pair_step.group)
        self.begin_run()
        refuse_unknown_metric(self)
        refuse_coarse_steps(self)
        refuse_bad_schedule(self)

    @property
    def dropped_pairs(self) -> list[dict[str, int]]:
        """Pairs that training dropped as not finite: row and step."""
        return self.run_log.dropped_pairs

    @property
    def weights_step(self) -> int | None:
        """The step whose weights `load_best_model_at_end` brought back; None where it didn't."""
        if not self.args.load_best_model_at_end or self.state.best_model_checkpoint is None:
            return None
        return int(self.state.best_global_step or 0)

    def before_training(self) -> None:
        """Score by the reference, and find the learning rate, where these are asked for."""
        self.know_reference()
        if self.pair_step.reference is not None:
            self.pair_step.reference.close()
        self.find_learning_rate()
        self.doctor.learning_rate = self.learning_rate or 0.0

    def begin_run(self) -> None:
        """A new run counts from zero and has no cached priors, unless a checkpoint gives some."""
        self.run_log.clear()
        self.held_out_values.begin()
        self.forget()
        self._dropped_in_a_row = 0
        self._place = None
        if self.found_rate is not None:  # an earlier run's, which its optimizer has
            self.found_rate = self.optimizer = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        set_mode(self.optimizer, "eval")  # what is saved is what was evaluated
        super()._save_checkpoint(model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """An evaluation without one finite pair, or one cut short, has no number to choose by."""
        wanted = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if self.args.metric_for_best_model is not None and wanted not in metrics:
            say(f"This evaluation has no {wanted}: the best model stays what it was")
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Give back the mean loss that was logged; transformers' counts dropped steps as 0."""
        set_mode(self.optimizer, "eval")
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One optimizer step's gradients; the mean loss over its pairs."""
        model.train()
        set_mode(self.optimizer, "train")
        pairs: list[TokenizedPair] = inputs["pairs"]
        scored = 0
        if self.args.prior != "live" and self.args.uses_prior:
            scored = self.fill_prior_cache(pairs)
        outcome = self.pair_step.train(pairs, self.accelerator.backward)
        outcome.num_tokens += scored
        self.run_log.add(self.state.global_step + 1, outcome)
        self._count_dropped(outcome)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return outcome.loss.to(self.args.device)

    def _count_dropped(self, outcome: StepOutcome) -> None:
        if not outcome.dropped:
            self._dropped_in_a_row = 0
            return
        step = self.state.global_step + 1
        if not outcome.num_pairs:
            refuse_bad_weights(self.model, f"stopped at step {step}: ", Group.current())
        rows = [pair.row for pair in outcome.dropped]
        named = name_rows(rows)
        say(
            f"Step {step}: {len(rows)} pair(s) dropped, loss or gradient not finite (row {named}); "
            f"{len(self.dropped_pairs)} dropped so far"
        )
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= self.args.max_dropped_in_a_row:
            raise FloatingPointError(
                f"stopped at step {step}: {self._dropped_in_a_row} optimizer steps in a row had "
                f"pairs whose loss or gradient is not finite (last: row {named}). These pairs "
                "changed no weight. A lower learning_rate or fp32 weights are the usual cures."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """transformers reads lengths from columns, which tokenised pairs haven't."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        pairs = cast(list[TokenizedPair], train_dataset or self.train_dataset)
        return LengthGroupedSampler(
            self.args.pairs_per_step, lengths=[packed_length(pair) for pair in pairs]
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula counts padded tokens of one model input."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs since the last log line."""
        if "loss" in logs:
            logs = self.run_log.line(logs)
        if "train_loss" in logs:
            # In place: transformers returns the same dict. Its own mean counts dropped steps as 0.
            mean_loss = self.run_log.mean_loss
            if mean_loss is None:
                del logs["train_loss"]
            else:
                logs["train_loss"] = mean_loss
        super().log(logs, start_time)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and random state (JSON)."""
        return {
            "step": int(self.state.global_step),
            **self.run_state(),
            "run_log": self.run_log.state(),
            "found_rate": self.found_rate,
            "max_tokens_per_microstep": self.pair_step.max_tokens,
            "max_tokens_no_grad": self.pair_step.max_tokens_no_grad,
            "packing": self.pair_step.packing,
            "checkpointing": self.pair_step.checkpointing,
            **self.known_state(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the settings and counts of the checkpoint."""
        self.take_changes(state)
        self.run_log.load_state(state["run_log"], self.args.device, state["step"])
        if "max_tokens_per_microstep" not in self.changed:
            self.pair_step.max_tokens = state["max_tokens_per_microstep"]
            # Absent in older checkpoints, whose passes had one budget.
            self.pair_step.max_tokens_no_grad = state.get("max_tokens_no_grad")
        self.pair_step.packing = state["packing"]
        wanted = state.get("checkpointing") and self.args.checkpointing_is_open
        if wanted and not self.pair_step.checkpointing:
            self.pair_step.enable_checkpointing()
        self.found_rate = state.get("found_rate")  # absent in older checkpoints
        self.load_known_state(state)
