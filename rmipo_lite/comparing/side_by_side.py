"""`compare(model, dataset, methods=[...])`: several methods on the same pairs, side by side.

All see the same training pairs, in the same order for the same seed, and are measured on the same
held-out pairs and prompts. A folder a run: what is there isn't made again, and a run that fails
doesn't end the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from rmipo_lite.adapters.lora import Adapter
from rmipo_lite.comparing.as_it_came import as_it_came
from rmipo_lite.comparing.board import Board
from rmipo_lite.comparing.comparison import Comparison
from rmipo_lite.comparing.contenders import DEFAULT, Contender, Methods, Rates, contenders
from rmipo_lite.comparing.folder import folder_for, open_folder
from rmipo_lite.comparing.runs import Runs
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.holdout import split_holdout
from rmipo_lite.data.rows import Row, load_rows
from rmipo_lite.judging.judges import JudgeLike, judge_of
from rmipo_lite.methods.table import method_named
from rmipo_lite.model.generation import Prompt
from rmipo_lite.model.loading import load_tokenizer
from rmipo_lite.model.names import name_of
from rmipo_lite.output.console import duration, show, size
from rmipo_lite.parallel.group import refuse_several
from rmipo_lite.planning.quantization import Quantization, load_for_run
from rmipo_lite.tokens.prepare import is_several
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.training.known_before import RefModel
from rmipo_lite.training.rehearsal import plan_run
from rmipo_lite.training.restore import nothing_held, surroundings_restored, unwrap_forward
from rmipo_lite.training.trainer import RMiPOTrainer

_HOLDOUT_SHARE, _HOLDOUT_AT_MOST = 0.1, 200  # pairs
# What a run of a comparison does without unless told: its own answers, and lines for each step.
_QUIET: dict[str, Any] = {"sample_prompts": 0, "eval_completions": 0}


@nothing_held()
def compare(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Any,
    methods: Methods = DEFAULT,
    learning_rates: Rates = None,
    seeds: Sequence[int] = (0,),
    judge: JudgeLike = None,
    output_dir: str | Path | None = None,
    *,
    split: str | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Adapter = "auto",
    ref_model: RefModel = None,
    quantization: Quantization | BitsAndBytesConfig = "auto",
    prompts: int = 64,
    max_new_tokens: int = 128,
    **config: Any,
) -> Comparison:
    """Train a model by several methods on the same pairs, and set them side by side.

    Args:
        model: as for `train`; it is loaded once, and every run begins with it as it came.
        dataset, split, eval_dataset, eval_split, tokenizer, peft_config, ref_model, quantization:
            as for `train`. Without eval_dataset 10 % of the pairs are held out, at most 200, the
            same for all runs.
        methods: names (`loss_type`), or dicts of options such as {"loss_type": "dpo", "beta":
            0.05}, with a `name` where it is to have one; "all" is every method there is. The first
            is what the others are compared with.
        learning_rates: a number or several for all methods, or by their names; None leaves what
            the options say, by default a rate that each run finds for itself.
        seeds: of order, adapter and answers; every method runs with each.
        judge: whose answer is better: a callable that takes prompt and answer and gives a number,
            the folder of a reward model, or an object with trl's `judge(prompts, completions)`.
            Against the answers of the model as it came.
        output_dir: None makes a new folder; of an earlier comparison on the same pairs, it goes on.
        prompts: so many held-out prompts are answered after each run, sampled at temperature 1
            from the likeliest 95 %; 0: none.
        max_new_tokens: of an answer.
        **config: options of `RMiPOConfig` for all runs, for example `max_steps=300`.

    Returns:
        Comparison: a table with standard errors, what the differences are worth, a plot, a report.

    Raises:
        ValueError, TypeError: as `train`; a method, rate, seed or judge that can't be; a folder of
            other pairs or options.
    """
    refuse_several("compare")
    found = contenders(methods, learning_rates, config)
    seeds = _seeds(seeds)
    if isinstance(model, Path):
        model = str(model)
    if is_several(eval_dataset):
        raise ValueError("eval_dataset must be one set in a comparison; several have no one number")
    if "seed" in config:
        raise ValueError("seed: a comparison has several; pass seeds")
    args = RMiPOConfig("rmipo-compare", **config)
    # Pairs are pairs for all, where a method takes them for two rows too.
    unpaired = all(method_named(one.options["loss_type"]).unpaired for one in found)
    data = load_rows(dataset, split=split, unpaired=unpaired)
    show(data.report)
    train_rows, held_out = _rows(data.rows, eval_dataset, eval_split, unpaired)
    asked = _distinct(held_out)[: max(0, prompts)]
    folder = folder_for(model, output_dir)
    if tokenizer is None:
        tokenizer = load_tokenizer(name_of(model))
    tokenizer = prepare_tokenizer(tokenizer, args.chat_template)
    if not held_out:
        raise ValueError("dataset: too few pairs or prompts to hold any out; pass eval_dataset")
    identity = {
        "model": model if isinstance(model, str) else name_of(model),
        "pairs": _digest(train_rows), "held_out": _digest(held_out),
        "prompts": len(asked), "max_new_tokens": max_new_tokens,
        "peft_config": str(peft_config), "options": {k: str(config[k]) for k in sorted(config)},
    }  # fmt: skip
    before = open_folder(folder, identity)
    loaded = load_for_run(model, args, quantization) if isinstance(model, str) else model
    with as_it_came(loaded, peft_config) as (loaded, put_back):
        runs = Runs(
            loaded, tokenizer, train_rows, held_out, asked, folder, max_new_tokens,
            judge_of(judge, loaded), before,
            {"peft_config": peft_config, "ref_model": ref_model}, {**_QUIET, **config},
        )  # fmt: skip
        board = Board(len(found) * len(seeds))
        todo = [(one, seed) for seed in seeds for one in found]
        left = [(one, seed) for one, seed in todo if runs.made(one, seed) is None]
        board.tell(_planned(runs, left, put_back))
        if left:
            runs.answer_before(seeds, board)
        results = runs.run(todo, board, put_back)
    return Comparison(
        [one.name for one in found], results, asked,
        {seed: [str(a) for a in answers] for seed, answers in runs.before.items()},
        folder, planned=len(todo),
    )  # fmt: skip


def _seeds(seeds: Any) -> list[int]:
    found = [seeds] if isinstance(seeds, int) else list(seeds)
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in found)
    if not found or not whole or len(set(found)) < len(found):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {seeds!r}")
    return found


def _rows(
    rows: list[Row], eval_dataset: Any, eval_split: str | None, unpaired: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what all train on, what all are measured on)."""
    if eval_dataset is None:
        kept, held_out = split_holdout(rows, share=_HOLDOUT_SHARE, at_most=_HOLDOUT_AT_MOST)
    else:
        kept = rows
        held_out = load_rows(
            eval_dataset, split=eval_split, argument="eval_dataset", unpaired=unpaired
        ).rows
    return [_plain(row) for row in kept], [_plain(row) for row in held_out]


def _plain(row: Row) -> dict[str, Any]:
    if row.label is None:
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    (completion,) = row.responses.values()
    return {"prompt": row.prompt, "completion": completion, "label": row.label}


def _distinct(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    found = {json.dumps(row["prompt"], ensure_ascii=False): row["prompt"] for row in rows}
    return list(found.values())


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _planned(runs: Runs, left: Sequence[tuple[Contender, int]], put_back: Any) -> str:
    """What the runs that are left will take, from one that is planned and thrown away."""
    if not left:
        return "Every run is there already"
    head = f"Plan: {len(left)} runs"
    try:
        seconds, disk = _measured(runs, left[0][0])
    except RuntimeError as error:  # this method's trouble, perhaps, and not the others'
        return f"{head}, not measured: {error}"
    finally:
        put_back()
    whole = sum(_passes(one) for one, _ in left) / _passes(left[0][0])
    time_text = "" if seconds is None else f", about {duration(seconds * whole)} without answers"
    return f"{head}{time_text}, {size(disk * len(left))} on disk"


def _measured(runs: Runs, one: Contender) -> tuple[float | None, int]:
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        surroundings_restored(runs.model),
    ):
        args = RMiPOConfig(folder, **{**runs.config, **one.options, "disable_tqdm": True})
        trainer = RMiPOTrainer(
            runs.model, args, train_dataset=runs.train_rows,
            processing_class=runs.tokenizer,
            **runs.arguments,
        )  # fmt: skip
        try:
            plan = plan_run(trainer)
        finally:
            unwrap_forward(trainer.model)
    return plan.seconds, plan.disk


def _passes(one: Contender) -> float:
    """Forward passes' worth of a step, more or less: three, and what the method adds."""
    loss = method_named(one.options["loss_type"])
    return 3 + 0.5 * loss.needs_prior + loss.needs_reference + 2 * loss.needs_logits
