"""`train(model, dataset)`: a model, a file of pairs, and done.

The order: load -> read and report the data -> attach the adapter -> evaluate -> train -> evaluate
-> save -> `TrainResult`. Everything it decides it says in one line, and what it changes on the
caller's model beside the adapter is put back.
"""

import math
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.lora import Adapter
from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint, writable_folder
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.holdout import evaluated_part, split_holdout
from rmipo_lite.data.rows import LoadedRows, Row, load_rows
from rmipo_lite.model.generation import BATCH, Prompt
from rmipo_lite.model.loading import load_tokenizer
from rmipo_lite.model.names import name_of, new_folder, run_name
from rmipo_lite.output.console import say, show
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.once import once_a_machine
from rmipo_lite.parallel.sharded import is_sharded
from rmipo_lite.planning.quantization import Quantization, load_for_run
from rmipo_lite.results.judged import chosen_text
from rmipo_lite.results.model_card import model_card
from rmipo_lite.results.result import TrainResult
from rmipo_lite.system.files import is_empty
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.prepare import is_several, prepare
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.training.interrupt import GracefulInterrupt
from rmipo_lite.training.known_before import RefModel
from rmipo_lite.training.learning_rate import pairs_of_a_search
from rmipo_lite.training.refusals import refuse_bad_weights, refuse_other_callbacks
from rmipo_lite.training.rehearsal import plan_run
from rmipo_lite.training.restore import nothing_held, surroundings_restored, unwrap_forward
from rmipo_lite.training.sharding import decide_sharding, seen_by_us_alone
from rmipo_lite.training.trainer import RMiPOTrainer
from rmipo_lite.watch.completions import Told
from rmipo_lite.watch.progress import phase, show_progress

Asked = tuple[Prompt, str | None]  # a prompt and its chosen response, where there is one
EvalPairs = list[TokenizedPair] | dict[str, list[TokenizedPair]]

HOLDOUT_SHARE = 0.05
HOLDOUT_AT_MOST = 200  # pairs
_SAMPLE_TOKENS = 64  # of an answer that is shown with the result


@nothing_held()
def train(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Any,
    *,
    split: str | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    peft_config: Adapter = "auto",
    ref_model: RefModel = None,
    quantization: Quantization | BitsAndBytesConfig = "auto",
    resume: bool | str | Path = False,
    callbacks: list[TrainerCallback] | None = None,
    **config: Any,
) -> TrainResult:
    """Align a model with preference pairs.

    Args:
        model: a name, a folder, a PreTrainedModel or a PeftModel (its adapter goes on).
        dataset: a hub name, a path (.jsonl, .json, .csv, .parquet, also .gz), a Dataset or
            DatasetDict, a list of dicts, a dict of lists or a pandas DataFrame with prompt, chosen
            and rejected; text, message lists, or message lists with the prompt inside. Several as
            one: a list of names or paths, with shares as [("a.jsonl", 0.7), ("b.jsonl", 0.3)].
        split: which split of a dataset that has several; None takes train, or the only one.
        eval_dataset: likewise, or several by name ({"easy": ..., "hard": ...}); None holds out 5 %
            of the pairs, at most 200, sharing no prompt with the others; a short run evaluates
            fewer of them, so that an evaluation takes at most a tenth of its time.
        eval_split: as `split`.
        tokenizer: None loads the model's own.
        output_dir: None makes a new folder `rmipo-<model name>`; another run's is never reused.
        peft_config: "auto" (go on with the adapter the model has, else LoRA r=16 on every linear
            layer but the head), "new" (a fresh one), a peft config or a dict of its fields
            ({"r": 8}), or None (train what the model has: its adapter, or every weight).
            `lora_r`, `lora_alpha`, `lora_dropout` and `target_modules` change the default.
        ref_model: what methods with a reference (`loss_type="dpo"` and its kind) measure from, a
            name or a loaded model; None: the model as it came to the run.
        quantization: "auto" (4-bit on CUDA when the weights would not fit otherwise), "none",
            "4bit" (NF4, double quantisation) or a BitsAndBytesConfig; for a model given by name.
        resume: True goes on from the newest valid checkpoint in `output_dir`; a path from that one.
        callbacks: transformers callbacks, called beside the package's own.
        **config: any option of `RMiPOConfig`, for example `learning_rate=2e-5`, `max_steps=300`.

    Returns:
        TrainResult: model, tokenizer, metrics before and after, history, data report; it plots,
        generates, compares before and after, saves, merges.

    Raises:
        ValueError, TypeError: an option, a dataset or a model that can't be used; the message
            names it, what is wanted and what came.
        FileExistsError: `output_dir` holds another run and `resume` isn't set.
    """
    if isinstance(model, Path):
        model = str(model)
    refuse_other_callbacks(callbacks)
    with surroundings_restored(model):
        # Where there are several processes they know of each other from here on.
        args = RMiPOConfig(output_dir=str(output_dir or run_name(model)), **config)
        group = Group.current()
        folder = group.from_first(lambda: _output_folder(model, output_dir, resume))
        args.output_dir = str(folder)
        say("Reading the pairs")
        data = once_a_machine(lambda: load_rows(dataset, split=split, unpaired=args.loss.unpaired))
        decide_sharding(args)
        with seen_by_us_alone(args):
            loaded, tokenizer = _load(model, tokenizer, args, quantization)
        tokenizer = prepare_tokenizer(tokenizer, args.chat_template)
        # With its report, which tokenising adds to.
        data, (train_pairs, eval_pairs, asked) = once_a_machine(
            lambda: (data, _pairs(data, eval_dataset, eval_split, tokenizer, args, loaded))
        )
        show(data.report)
        interrupt = GracefulInterrupt()
        trainer = RMiPOTrainer(
            loaded,
            args,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs or None,
            processing_class=tokenizer,
            peft_config=peft_config,
            ref_model=ref_model,
            callbacks=[interrupt, *(callbacks or [])],
        )
        trainer.data_report = trainer.doctor.report = data.report
        trainer.doctor.shown_before.add("chosen_longer")  # by the report
        show_progress(trainer)
        with interrupt:
            try:
                result = _run(trainer, eval_pairs, data, interrupt, folder, resume)
            except BaseException as error:
                _tell_what_is_left(trainer, folder, error)
                raise
            finally:
                unwrap_forward(trainer.model)
        result.held_out_prompts = [prompt for prompt, _ in asked]
        result.held_out_chosen = [chosen for _, chosen in asked]
        _answer_samples(trainer, result)
        stops = causal_lm(result.model).generation_config
    # Beside the adapter it is what the run leaves on the model: answers end where they were taught.
    causal_lm(result.model).generation_config = stops
    return result


def _run(
    trainer: RMiPOTrainer,
    eval_pairs: EvalPairs,
    data: LoadedRows,
    interrupt: GracefulInterrupt,
    folder: Path,
    resume: bool | str | Path,
) -> TrainResult:
    checkpoint = trainer.resolve_resume(str(resume) if isinstance(resume, Path) else resume)
    done = None
    if checkpoint is not None:
        state = trainer.check_resume(checkpoint)
        done = int(state["step"])
        trainer.load_reference(state)
    trainer.know_reference()
    before = trainer.evaluate_before() if eval_pairs else {}
    _rehearse_card(trainer, before, data, folder)
    if trainer.pair_step.group.any(interrupt.requested):
        raise KeyboardInterrupt  # before the first step there is nothing to save
    seconds = sum(before[name] for name in before if name.endswith("_runtime"))
    plan = plan_run(trainer, seconds, done=done)
    for line in (str(plan), *plan.warnings):
        say(line)
    if trainer.pair_step.group.any(interrupt.requested):
        raise KeyboardInterrupt
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    interrupt.answered()
    after = _evaluate_after(trainer) if eval_pairs else {}
    result = _result(trainer, {**outcome.metrics, **after}, before, data, folder)
    result.stopped_at_step, result.plan = interrupt.stopped_at_step, plan
    _save(result, folder)
    return result


def _result(
    trainer: RMiPOTrainer,
    metrics: dict[str, float],
    before: dict[str, float],
    data: LoadedRows,
    folder: Path,
) -> TrainResult:
    history = list(trainer.state.log_history)
    return TrainResult(
        model=trainer.model,
        tokenizer=trainer.processing_class,
        args=trainer.args,
        metrics=metrics,
        metrics_before=before,
        # train() starts a new log, so what was measured before it is put in front.
        history=[{**before, "step": 0}, *history] if before else history,
        data_report=data.report,
        output_dir=folder,
        conversational=not isinstance(data.rows[0].prompt, str),
        findings=trainer.doctor.findings,
        start=trainer.start,
        went_on=trainer.went_on,
        weights_step=trainer.weights_step,
        learning_rate=trainer.learning_rate,
        errors=dict(trainer.held_out_values.errors),
        held_out=trainer.held_out_values,
    )


def _rehearse_card(
    trainer: RMiPOTrainer, before: dict[str, float], data: LoadedRows, folder: Path
) -> None:
    """Write the card once and throw it away, as `rehearse_save` does with the rest."""
    model_card(_result(trainer, before, before, data, folder))


def _evaluate_after(trainer: RMiPOTrainer) -> dict[str, float]:
    """The evaluation after training; what was trained isn't lost where it fails."""
    try:
        return dict(trainer.evaluate())
    except Exception as error:
        say(f"WARNING: the evaluation after training failed: {type(error).__name__}: {error}")
        return {}


def _answer_samples(trainer: RMiPOTrainer, result: TrainResult) -> None:
    """Answer the first held-out prompts before and after, for whoever looks at the result."""
    prompts = result.held_out_prompts[: result.args.sample_prompts]
    if not prompts or result.stopped_at_step is not None:
        return
    if not isinstance(result.model, PeftModel):
        return  # trained in full: there is no adapter to switch off
    if not (Group.current().is_first or is_sharded(result.model)):
        return  # whoever looks at the result looks at the first's
    say(f"Answering {len(prompts)} prompts before and after training")
    most = 2 * math.ceil(len(prompts) / BATCH) * _SAMPLE_TOKENS
    try:
        with phase(trainer, "answering samples", most, "tokens") as advance:
            told = Told(lambda done, _: advance(done), most)
            result.compare(prompts, max_new_tokens=_SAMPLE_TOKENS, stopping_criteria=[told])
    except KeyboardInterrupt:
        say("No samples: stopped")
    except Exception as error:
        # The run is done and saved; a look at it must not end it.
        say(f"No samples: {type(error).__name__}: {error}")


def _save(result: TrainResult, folder: Path) -> None:
    """Save the result; where that fails, the result is returned all the same, and says so."""
    try:
        Group.current().agreed(lambda: result.save(folder))
    except Exception as error:  # whatever it is, what was trained isn't lost with it
        result.unsaved = str(error)
        what = "adapter" if isinstance(result.model, PeftModel) else "model"
        first = "make room and " if isinstance(error, OSError) else ""
        say(
            f"WARNING: the {what} could not be saved to {folder}: {str(error).rstrip('.')}. It is "
            f"in memory: {first}call result.save(folder)"
        )


def _tell_what_is_left(trainer: RMiPOTrainer, folder: Path, error: BaseException) -> None:
    """Before a run ends with an error: save what is sound, and say where one can go on."""
    # A sharded model's weights are gathered by all, and this process may be alone with its error.
    can_save = isinstance(error, Exception) and not is_sharded(trainer.model)
    if can_save and trainer.state.global_step > 0:
        # An error comes before the optimizer's update, so the adapter is that of a whole step.
        try:
            refuse_bad_weights(trainer.model)
            trainer.save_model(str(folder))
            say(f"The weights as of step {trainer.state.global_step} are in {folder}")
        except Exception as second:
            say(f"The weights as of step {trainer.state.global_step} are not saved: {second}")
    newest, _ = newest_valid_checkpoint(folder)
    if newest is not None:
        say(f"Stopped; resume=True, output_dir={str(folder)!r} goes on from {newest.name}")


def _load(
    model: str | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    args: RMiPOConfig,
    quantization: Quantization | BitsAndBytesConfig,
) -> tuple[Any, PreTrainedTokenizerBase]:
    if not isinstance(model, str):
        if quantization not in ("auto", "none"):
            raise ValueError(
                "quantization is for a model given by name or folder; this one is loaded"
            )
        return model, tokenizer or load_tokenizer(name_of(model))
    tokenizer = tokenizer or load_tokenizer(model)
    return load_for_run(model, args, quantization), tokenizer


def _pairs(
    data: LoadedRows,
    eval_dataset: Any,
    eval_split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    args: RMiPOConfig,
    model: nn.Module,
) -> tuple[list[TokenizedPair], EvalPairs, list[Asked]]:
    """(training pairs, held-out pairs, distinct prompts of the held-out ones)."""
    config = causal_lm(model).config
    pairs = prepare(data, tokenizer, args, config).pairs
    if eval_dataset is None:
        train_pairs, held_out = split_holdout(
            pairs, share=HOLDOUT_SHARE, at_most=HOLDOUT_AT_MOST, seed=args.seed
        )
        if not held_out:
            say("Too few pairs or prompts to hold any out: nothing is evaluated")
        part = evaluated_part(held_out, _trained_pairs(args, len(train_pairs)), args.seed)
        if len(part) < len(held_out):
            say(f"{len(part)} of {len(held_out)} held-out pairs are evaluated: the run is short")
        held_out = part
        return train_pairs, held_out, _asked(held_out, data.rows)
    named = eval_dataset if is_several(eval_dataset) else {"": eval_dataset}
    eval_pairs: dict[str, list[TokenizedPair]] = {}
    asked: list[Asked] = []
    for name, part in named.items():
        argument = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        own = load_rows(
            part, split=eval_split, argument=argument, as_messages=data.report.has_system,
            unpaired=args.loss.unpaired,
        )  # fmt: skip
        eval_pairs[name] = prepare(own, tokenizer, args, config).pairs
        asked += _asked(eval_pairs[name], own.rows)
        title = f"Evaluation set {name}" if name else "Evaluation set"
        say(f"{title}: {own.report.kept} of {own.report.total} pairs kept")
        if _forms(own.rows) != _forms(data.rows):
            say(
                f"WARNING: the rows of {argument} are {_forms(own.rows)}, those trained on are "
                f"{_forms(data.rows)}; only messages go through the chat template"
            )
    return pairs, eval_pairs.get("", eval_pairs), asked


def _trained_pairs(args: RMiPOConfig, pairs: int) -> int:
    """How many pairs a run on so many trains on, one pass or several, its search included."""
    search = pairs_of_a_search(args.pairs_per_step) if args.learning_rate == "auto" else 0.0
    return int(args.steps_of_a_run(pairs) * args.pairs_per_step + search)


def _forms(rows: list[Row]) -> str:
    kinds = sorted({isinstance(row.prompt, str) for row in rows})
    return " and ".join("plain text" if is_text else "messages" for is_text in kinds)


def _asked(pairs: list[TokenizedPair], rows: list[Row]) -> list[Asked]:
    """The prompts of the pairs as they came in, each once, in order, with a chosen response."""
    row_of = {row.index: row for row in rows}
    found: dict[str, Asked] = {}
    for row in (row_of[pair.row] for pair in pairs):
        key, chosen = str(row.prompt), row.responses.get("chosen")
        if key not in found or found[key][1] is None:
            found[key] = (row.prompt, None if chosen is None else chosen_text(chosen))
    return list(found.values())


def _output_folder(
    model: str | nn.Module, output_dir: str | Path | None, resume: bool | str | Path
) -> Path:
    if output_dir is not None:
        folder = writable_folder(output_dir)
        if resume is False and folder.is_dir() and not is_empty(folder):
            raise FileExistsError(
                f"output_dir: {folder} isn't empty, and another run is never written over; name "
                "a new folder, or pass resume=True to go on with that run"
            )
        return folder
    name = run_name(model)
    return Path(name) if resume else new_folder(name)
