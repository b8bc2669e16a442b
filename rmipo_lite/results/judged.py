"""What others make of a trained model: judges, benchmarks, pairs, and whoever chats with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.checkpoints.weights import fingerprint
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.judging.answers_file import Question, write_answers
from rmipo_lite.judging.judgement import Judged, Judgement
from rmipo_lite.judging.judges import JudgeLike, judge_of
from rmipo_lite.judging.pair_accuracy import PairAccuracy, score_pairs
from rmipo_lite.model.generation import Answer, Prompt, prompts_of, whole_text
from rmipo_lite.model.names import name_of, short_name
from rmipo_lite.output.console import say
from rmipo_lite.results.conversation import Conversation
from rmipo_lite.results.trained import Trained


def _only_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1:
        raise ValueError("questions: a second turn needs a tokenizer with a chat template")
    return prompt[0]["content"]


def _given(answer: Any, place: int) -> Answer:
    """An answer that somebody brought: a text, or what an assistant said, as messages."""
    if isinstance(answer, Answer):
        return answer
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    if not isinstance(answer, str):
        raise TypeError(f"against: number {place} is no text: {answer!r:.80}")
    return Answer(whole_text(answer, f"against: number {place}"))


def chosen_text(side: Any) -> str:
    """A response of a row as a text: of messages what the assistant says."""
    return side if isinstance(side, str) else str(side[-1]["content"])


class JudgedModel(Trained):
    """A trained model that chats, and is judged by others.

    Attributes:
        args: the options of its run, or what is known of them.
        held_out_chosen: the chosen response to each of `held_out_prompts`; None where there is
            none, as of an unpaired row.
        conversation: the turns of the chat so far.
    """

    args: RMiPOConfig
    held_out_chosen: list[str | None]
    _conversation: Conversation | None
    _kept: dict[str, list[Answer]]  # that a judge failed at

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The chat so far, as messages."""
        return [] if self._conversation is None else list(self._conversation.messages)

    def chat(
        self,
        text: str,
        *,
        new: bool = False,
        system: str | None = None,
        max_new_tokens: int = 512,
        **options: Any,
    ) -> Answer:
        """Say something to the trained model; it knows what was said before.

        Args:
            text: the user's turn.
            new: begin another conversation; so does another `system`.
            system: what the first message says, where the chat template has a place for it.
            max_new_tokens: longest answer, tokens; fewer where the model's context ends.
            **options: those of `model.generate`; greedy unless `do_sample=True`.

        Raises:
            ValueError: there is no chat template, or no room is left in the model's context.
        """
        talk = self._conversation
        if talk is None or new or (system is not None and system != talk.system):
            talk = Conversation(self.model, self.tokenizer, system)
        answer = talk.say(text, max_new_tokens, **options)
        self._conversation = talk
        return answer

    def write_answers(
        self,
        questions: Sequence[Question] | str | Path,
        path: str | Path,
        format: str = "jsonl",
        *,
        name: str | None = None,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> Path:
        """Answer a benchmark's questions into the file that its judge reads.

        Args:
            questions: texts, rows, or the benchmark's own file (.json, .jsonl).
            path: the new file.
            format: "jsonl" (prompt, answer, ended), "alpaca_eval", "arena_hard" or "mt_bench".
            name: what the benchmark calls the model; None: the model's own name.
            max_new_tokens, **options: as for `generate`. What was cut is counted and said.

        Raises:
            ValueError: a format that isn't one, a question that lacks what it needs, or a second
                turn and no chat template.
            FileExistsError: there is such a file.
        """

        def generate(prompts: list[Prompt]) -> list[Answer]:
            if not self.tokenizer.chat_template:
                prompts = [_only_text(prompt) for prompt in prompts]
            return self.generate(prompts, max_new_tokens, **options)

        called = name or short_name(name_of(self.model)) or "model"
        target, answers = write_answers(questions, path, format, generate, self._count, called)
        cut = sum(not answer.ended for answer in answers)
        more = f", {cut} of them cut at max_new_tokens={max_new_tokens}" if cut else ""
        say(f"Answers: {target}, {len(answers)}{more}")
        return target

    def judge(
        self,
        prompts: Any = None,
        *,
        judge: JudgeLike,
        against: Any = "before",
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Judgement:
        """How often this model's answers are better than others', and how sure that is.

        Args:
            prompts: as for `generate`; None takes `held_out_prompts`. Against "chosen" rows with
                prompt and chosen, in any form that `train` takes.
            judge: a callable of a prompt and an answer that gives a number, more for better; one
                of a prompt and two answers that gives 0 where the first is better, 1 where the
                second, None where neither; the folder of a reward model; or an object with
                `judge(prompts, completions)`. Whoever sees two answers is asked in both orders,
                and neither won where these disagree.
            against: "before" (the model at step 0), "chosen" (the data's own responses), another
                result, or a list of texts, one a prompt.
            max_new_tokens, **options: as for `generate`, of both sides.

        Returns:
            Judgement: win rate with its 95 % interval (bootstrap over prompts), ties, lengths, and
            every pair to read.

        Raises:
            ValueError, TypeError: no such judge or opponent, no prompt, or a judge that gives
                something else than a number. The answers aren't lost with it: the next call that
                asks the same begins with them.
        """
        decide = judge_of(judge, self.model, conversational=self.conversational)
        if decide is None:
            raise TypeError("judge: there is none")
        self._refuse_switched()
        asked, others, whose = self._opponent(prompts, against, max_new_tokens, options)
        answers = self._answered("", self, asked, max_new_tokens, options)
        try:
            wins = decide.wins(asked, answers, others)
        except Exception:
            say("The judge failed; the answers are kept for the next call of judge that asks alike")
            raise
        self._kept.clear()
        pairs = [Judged(*one) for one in zip(asked, answers, others, wins, strict=True)]
        lengths = [(self._count(pair.answer), self._count(pair.other)) for pair in pairs]
        return Judgement.of(pairs, whose, lengths)

    def _answered(
        self, whose: str, of: Trained, prompts: list[Prompt], longest: int, options: dict[str, Any]
    ) -> list[Answer]:
        """Answers, or those that a judge failed at when the same was asked of the same weights."""
        weights = fingerprint(of.model.named_parameters())
        asked = [whose, weights, of.conversational, prompts, longest, repr(options)]
        key = json.dumps(asked, default=str)
        if key not in self._kept:
            say(f"Answering {len(prompts)} prompts{whose}")
            self._kept[key] = of.generate(prompts, longest, **options)
        return self._kept[key]

    def _opponent(
        self, prompts: Any, against: Any, max_new_tokens: int, options: dict[str, Any]
    ) -> tuple[list[Prompt], list[Answer], str]:
        """(prompts, an answer of somebody else to each, who that is)."""
        if isinstance(against, str) and against == "chosen":
            rows = self._chosen_rows(prompts)
            return [prompt for prompt, _ in rows], [Answer(text) for _, text in rows], against
        asked = prompts_of(self.held_out_prompts if prompts is None else prompts)
        if not asked:
            raise ValueError("prompts: none were given, and none held out here; pass some texts")
        if isinstance(against, str) and against == "before":
            with self.at_start():
                others = self._answered(" as at step 0", self, asked, max_new_tokens, options)
            return asked, others, "the model at step 0"
        if isinstance(against, Trained):
            if causal_lm(against.model) is causal_lm(self.model):
                raise ValueError(
                    "against: both results hold the same model object, whose weights are those "
                    "trained last; load one of them from its folder (load_run)"
                )
            name = short_name(name_of(against.model)) or "the other model"
            answered = self._answered(f" with {name}", against, asked, max_new_tokens, options)
            return asked, answered, name
        if isinstance(against, Sequence) and not isinstance(against, str):
            if len(against) != len(asked):
                raise ValueError(f"against: {len(against)} texts for {len(asked)} prompts")
            return asked, [_given(one, i) for i, one in enumerate(against)], "given answers"
        raise ValueError(
            'against must be "before", "chosen", another result or a list of answers, '
            f"got {against!r:.80}"
        )

    def _chosen_rows(self, dataset: Any) -> list[tuple[Prompt, str]]:
        """(prompt, chosen response), each prompt with the first that it has."""
        if dataset is None:
            if len(self.held_out_prompts) != len(self.held_out_chosen):
                raise ValueError(
                    f"held_out_chosen: {len(self.held_out_chosen)} responses for "
                    f"{len(self.held_out_prompts)} held_out_prompts; pass rows as prompts"
                )
            held_out = zip(self.held_out_prompts, self.held_out_chosen, strict=True)
            rows = [(prompt, text) for prompt, text in held_out if text is not None]
            if not rows:
                raise ValueError(
                    "prompts: no chosen response was held out here; pass rows with prompt, chosen"
                )
            return copy.deepcopy(rows)
        found, report = load_rows(dataset, argument="prompts")
        kept: dict[str, tuple[Prompt, str]] = {}
        for row in found:
            kept.setdefault(str(row.prompt), (row.prompt, chosen_text(row.chosen)))
        if len(kept) < report.total:
            say(
                f"prompts: {report.total} rows, {report.total - report.kept} of them unusable, "
                f"{len(kept)} distinct prompts, each with its first chosen response"
            )
        return list(kept.values())

    def score_pairs(self, dataset: Any, *, split: str | None = None) -> PairAccuracy:
        """How often this model's reward is higher for the chosen side, by the rows' `subset`.

        The reward is that of the run's method: the scaled mean log-probability, or for `dpo` and
        its kind what this model says more than the one at step 0 (whatever `ref_model` was).

        Args:
            dataset: pairs in any form that `train` takes; a column `subset`, as RewardBench's,
                groups them.
            split: which split of a dataset that has several.

        Returns:
            PairAccuracy: a table; `write(path)` makes RewardBench's files of it.

        Raises:
            ValueError: no usable pair.
        """
        self._refuse_switched()
        return score_pairs(dataset, split, self.model, self.tokenizer, self.args, self.at_start)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
