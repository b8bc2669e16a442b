"""What others make of a trained model: judges, benchmarks, pairs, and whoever chats with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.judging.answers_file import Question, write_answers
from rmipo_lite.judging.judgement import Judged, Judgement
from rmipo_lite.judging.judges import JudgeLike, judge_of
from rmipo_lite.judging.pair_accuracy import PairAccuracy, score_pairs
from rmipo_lite.model.generation import Answer, Prompt
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
                second, None where neither; the folder of a reward model; or one of trl's judges.
                Those that see two answers are asked in both orders, and tie where these disagree.
            against: "before" (the model at step 0), "chosen" (the data's own responses), another
                result, or a list of texts, one a prompt.
            max_new_tokens, **options: as for `generate`, of both sides.

        Returns:
            Judgement: win rate with its 95 % interval (bootstrap over prompts), ties, lengths, and
            every pair to read.

        Raises:
            ValueError, TypeError: no such judge or opponent, no prompt, or a judge that gives
                something else than a number.
        """
        decide = judge_of(judge, self.model)
        if decide is None:
            raise TypeError("judge: there is none")
        prompts, others, whose = self._opponent(prompts, against, max_new_tokens, options)
        say(f"Answering {len(prompts)} prompts")
        answers = self.generate(prompts, max_new_tokens, **options)
        wins = decide.wins(prompts, answers, others)
        pairs = [Judged(*one) for one in zip(prompts, answers, others, wins, strict=True)]
        lengths = [(self._count(p.answer), self._count(p.other)) for p in pairs]
        return Judgement.of(pairs, whose, lengths)

    def _opponent(
        self, prompts: Any, against: Any, max_new_tokens: int, options: dict[str, Any]
    ) -> tuple[list[Prompt], list[Answer], str]:
        """(prompts, an answer of somebody else to each, who that is)."""
        if isinstance(against, str) and against == "chosen":
            rows = self._chosen_rows(prompts)
            return [prompt for prompt, _ in rows], [Answer(text) for _, text in rows], against
        asked = list(self.held_out_prompts if prompts is None else self._list_of(prompts))
        if not asked:
            raise ValueError("prompts: none were given, and none held out here; pass some texts")
        if isinstance(against, str) and against == "before":
            say(f"Answering {len(asked)} prompts as at step 0")
            with self.at_start():
                return asked, self.generate(asked, max_new_tokens, **options), "the model at step 0"
        if isinstance(against, Trained):
            say(f"Answering {len(asked)} prompts with the other model")
            others = against.generate(asked, max_new_tokens, **options)
            return asked, others, short_name(name_of(against.model)) or "the other model"
        if isinstance(against, Sequence) and not isinstance(against, str):
            if len(against) != len(asked):
                raise ValueError(f"against: {len(against)} texts for {len(asked)} prompts")
            texts = [one if isinstance(one, Answer) else Answer(one) for one in against]
            return asked, texts, "given answers"
        raise ValueError(
            'against must be "before", "chosen", another result or a list of answers, '
            f"got {against!r}"
        )

    @staticmethod
    def _list_of(prompts: Any) -> Any:
        if isinstance(prompts, str | Path):
            raise TypeError("prompts must be a list of prompts, got one string; write [prompt]")
        return prompts

    def _chosen_rows(self, dataset: Any) -> list[tuple[Prompt, str]]:
        if dataset is None:
            held_out = zip(self.held_out_prompts, self.held_out_chosen, strict=True)
            rows = [(prompt, text) for prompt, text in held_out if text is not None]
            if not rows:
                raise ValueError(
                    "prompts: no chosen response was held out here; pass rows with prompt, chosen"
                )
            return rows
        found = load_rows(dataset, argument="prompts").rows
        return list({str(r.prompt): (r.prompt, chosen_text(r.chosen)) for r in found}.values())

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
        return score_pairs(dataset, split, self.model, self.tokenizer, self.args, self.at_start)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
