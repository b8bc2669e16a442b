"""The runs of a comparison, one after the other, each into a folder of its own."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.comparing.board import Board
from rmipo_lite.comparing.contenders import Contender
from rmipo_lite.comparing.folder import answer_of, note_before, ready_for_a_run
from rmipo_lite.comparing.outcome import (
    Cases,
    RunOutcome,
    cases_of_answers,
    cases_of_pairs,
    of_whole_pairs,
    read_outcome,
)
from rmipo_lite.judging.judges import Judge
from rmipo_lite.methods.table import method_named
from rmipo_lite.model.generation import (
    Answer,
    Generated,
    Prompt,
    generate_ids,
    prompt_ids,
    savable_generation_config,
)
from rmipo_lite.run import train


@dataclass
class Runs:
    """What all runs share."""

    model: Any
    tokenizer: Any
    train_rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    prompts: list[Prompt]
    folder: Path
    max_new_tokens: int
    judge: Judge | None
    before: dict[int, list[Answer]]
    arguments: dict[str, Any]
    config: dict[str, Any]

    def folder_of(self, one: Contender, seed: int) -> Path:
        return self.folder / f"{one.folder}-seed{seed}"

    def made(self, one: Contender, seed: int) -> RunOutcome | None:
        """The run as its folder has it; None where it isn't made.

        Raises:
            ValueError: another method or other options have that name there.
        """
        outcome = read_outcome(self.folder_of(one, seed))
        if outcome is None:
            return None
        there = {name: str(value) for name, value in outcome.options.items()}
        if there != {name: str(value) for name, value in one.options.items()}:
            raise ValueError(
                f"output_dir: {outcome.folder.name} there has other options ({outcome.options}); "
                "give this method a name of its own, or name a new folder"
            )
        return outcome

    def run(
        self, todo: Sequence[tuple[Contender, int]], board: Board, put_back: Any
    ) -> list[RunOutcome]:
        """Every run that isn't made; Ctrl-C ends it with those that are."""
        results: list[RunOutcome] = []
        for one, seed in todo:
            outcome = self.made(one, seed)
            if outcome is not None:
                self._judge_again(outcome, board)
                board.end(outcome, was_there=True)
                results.append(outcome)
                continue
            board.begin(one.name, seed)
            try:
                outcome = self._one(one, seed, board)
            except KeyboardInterrupt:
                outcome = None
            finally:
                put_back()
            if outcome is None:
                board.tell(
                    f"Stopped in {one.name}, seed {seed}. The same call with output_dir="
                    f"{str(self.folder)!r} goes on"
                )
                break
            board.end(outcome)
            results.append(outcome)
        return results

    def _one(self, one: Contender, seed: int, board: Board) -> RunOutcome | None:
        """A run; None where Ctrl-C stopped it. An error is its outcome."""
        folder, began = self.folder_of(one, seed), time.monotonic()
        resume = ready_for_a_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{folder.name}.log"
        with (
            log.open("a", encoding="utf-8") as lines,
            contextlib.redirect_stdout(lines),
            contextlib.redirect_stderr(lines),
        ):
            try:
                result = train(
                    self.model, self.train_rows, eval_dataset=self.held_out,
                    tokenizer=self.tokenizer, output_dir=folder, resume=resume, callbacks=[board],
                    **self.arguments, **{**self.config, **one.options, "seed": seed},
                )  # fmt: skip
                if result.stopped_at_step is not None:
                    return None
                outcome = RunOutcome(
                    one.name, seed, folder, dict(one.options), result.learning_rate,
                    int(result.history[-1].get("step", 0)),
                    cases=self._cases(one, result.held_out.first, result.held_out.newest),
                )  # fmt: skip
                if self.prompts:
                    board.doing("answering prompts")
                    self._add_answers(outcome, self._sampled(result.model, seed), board)
                if result.unsaved is not None:
                    raise OSError(f"the adapter could not be saved: {result.unsaved}")
                outcome.seconds = time.monotonic() - began
                outcome.write()
            except Exception as error:
                traceback.print_exc(file=lines)
                return RunOutcome(
                    one.name, seed, folder, dict(one.options),
                    error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                    if str(error) else type(error).__name__,
                )  # fmt: skip
        return outcome

    def _cases(self, one: Contender, *values: Mapping[str, Any]) -> dict[str, Cases]:
        """Of pairs, also where the method took their halves for rows."""
        if method_named(one.options["loss_type"]).unpaired and "chosen" in self.held_out[0]:
            values = tuple(map(of_whole_pairs, values))
        return cases_of_pairs(*values)

    def _sampled(self, model: Any, seed: int) -> list[Generated]:
        ids = [prompt_ids(self.tokenizer, p, conversational=False) for p in self.prompts]
        with kept_random_state():
            torch.manual_seed(seed)
            return generate_ids(
                model, self.tokenizer, ids, self.max_new_tokens, do_sample=True, temperature=1.0,
                top_k=0, top_p=0.95,
            )  # fmt: skip

    def _texts(self, given: Sequence[Generated]) -> list[Answer]:
        return [
            answer_of(self.tokenizer.decode(one.ids, skip_special_tokens=True), one.ended)
            for one in given
        ]

    def answer_before(self, seeds: Sequence[int], board: Board) -> None:
        """The answers of the model as it came, for every seed; the judge is tried on the first.

        Raises:
            Exception: what the judge raises.
        """
        base = causal_lm(self.model)
        base.generation_config = savable_generation_config(self.model, self.tokenizer)
        for seed in seeds:
            if seed not in self.before and self.prompts:
                board.tell(f"Answering {len(self.prompts)} prompts before training, seed {seed}")
                self.before[seed] = self._texts(self._sampled(self.model, seed))
                note_before(self.folder, self.before)
        if self.judge is not None and self.prompts:
            one = self.before[seeds[0]][:1]
            self.judge.wins(self.prompts[:1], one, one)

    def _add_answers(self, outcome: RunOutcome, given: Sequence[Generated], board: Board) -> None:
        answers = self._texts(given)
        outcome.answers = [str(answer) for answer in answers]
        outcome.cases |= cases_of_answers(given, self._wins(answers, outcome, board))

    def _wins(
        self, answers: Sequence[Answer], outcome: RunOutcome, board: Board
    ) -> list[float] | None:
        """What a judge fails at is told, and judged when the comparison goes on."""
        if self.judge is None:
            return None
        try:
            return self.judge.wins(self.prompts, answers, self.before[outcome.seed])
        except Exception as error:
            board.tell(f"{outcome.method}, seed {outcome.seed}: not judged: {error}")
            return None

    def _judge_again(self, outcome: RunOutcome, board: Board) -> None:
        """A run that was made without a judge gets the verdicts of this one's."""
        if self.judge is None or "win_rate" in outcome.cases or not outcome.answers:
            return
        unended = outcome.cases["unended"]
        answers = [
            answer_of(text, not unended[str(place)]) for place, text in enumerate(outcome.answers)
        ]
        wins = self._wins(answers, outcome, board)
        if wins is None:
            return
        verdicts = {str(place): win for place, win in enumerate(wins) if win == win}
        outcome.cases["win_rate"] = verdicts
        outcome.write()
