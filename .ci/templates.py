"""Scorecard check 9: every chat template in trl's wheel, times eight conversations.

    pip install --no-deps trl==1.16.0 && python .ci/templates.py
    python .ci/templates.py FOLDER      # the *.jinja files of a folder instead

A trial gives one pair of answers to `rmipo_lite.tokens.tokenize_rows`, alone and among the other
conversations, and is right in one of two ways. Kept: prompt and scored tokens are those
that this script finds by itself, by comparing renderings of answers that have no letter in common
(the package looks for a known word). Refused: for a reason that this script finds too, and with
the template's own words about this very pair. Everything else is lost.

The tokenizer has one token for every byte and the control tokens that the template names, so ids
turn back into the exact text.
"""

# ruff: noqa: RUF001 - control tokens and other scripts, written as they are

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.tokenize_rows import tokenize_rows

Message = dict[str, str]
CONTROL = re.compile(
    r"<\|[^|<>{}' ]+\|>|<｜[^｜]+｜>|</?s>|<[a-z_]+\|>|<\|[a-z_]+>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance)>"
)
PROBES = ("x1y", "q2w", "77")  # no first and no last character in common


@dataclass(frozen=True)
class Family:
    """The control tokens of a family's real tokenizers that its templates don't spell out."""

    prefix: str
    bos: str | None
    eos: str
    end: str  # what ends an answer and is scored


# The first prefix that fits counts.
FAMILIES = (
    Family(
        "cohere2",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    Family("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    Family("deepseek", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    Family("diffusion_gemma", "<bos>", "<eos>", "<turn|>"),
    Family("gemma4", "<bos>", "<eos>", "<turn|>"),
    Family("gemma", "<bos>", "<eos>", "<end_of_turn>"),
    Family("glm4moe_training", None, "<|endoftext|>", "<|user|>"),
    Family("glm4moe", None, "<|endoftext|>", "<|endoftext|>"),
    Family("gptoss", "<|startoftext|>", "<|return|>", "<|return|>"),
    Family("idefics3", "<|begin_of_text|>", "<end_of_utterance>", "<end_of_utterance>"),
    Family("lfm2", "<|startoftext|>", "<|im_end|>", "<|im_end|>"),
    Family("llama3", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    Family("llava", "<s>", "</s>", "</s>"),
    Family("muse", "<|begin_of_text|>", "<|eot|>", "<|eot|>"),
    Family("nemotron", "<s>", "<|im_end|>", "<|im_end|>"),
    Family("phi3", "<s>", "<|endoftext|>", "<|end|>"),
    Family("qwen", None, "<|im_end|>", "<|im_end|>"),
    Family("smolvlm", "<|im_start|>", "<end_of_utterance>", "<end_of_utterance>"),
)


@dataclass(frozen=True)
class Conversation:
    """A prompt and two answers."""

    name: str
    prompt: list[Message]
    answers: tuple[str, str]

    def with_answer(self, content: str) -> list[Message]:
        """The whole conversation with one answer."""
        return [*self.prompt, {"role": "assistant", "content": content}]


def turns(*pairs: tuple[str, str]) -> list[Message]:
    """Messages of (role, content) pairs."""
    return [{"role": role, "content": content} for role, content in pairs]


QUESTION = ("user", "Capital of France?")
PLAIN = ("It is Paris.", "Probably Rome?")
THOUGHT = "<think>\nweigh both\n</think>\n\nIt is Paris."
CONVERSATIONS = (
    Conversation("plain", turns(QUESTION), PLAIN),
    Conversation("system role", turns(("system", "Be brief."), QUESTION), PLAIN),
    Conversation("several turns", turns(("user", "Hi"), ("assistant", "Hello!"), QUESTION), PLAIN),
    Conversation(
        "thinking", turns(QUESTION), (THOUGHT, "<think>\nguess then\n</think>\n\nProbably Rome?")
    ),
    Conversation("one side thinking", turns(QUESTION), (THOUGHT, PLAIN[1])),
    Conversation("outer blanks", turns(QUESTION), ("  It is Paris.\n", " Probably Rome? \n\n")),
    Conversation(
        "other scripts",
        turns(("user", "Où? \U0001f1eb\U0001f1f7 \u202e")),
        ("C’est à Paris \U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301.", "羅馬嗎？\U0001f642"),
    ),
    Conversation(
        "thinking in an earlier turn",
        turns(("user", "Hi"), ("assistant", "<think>\nold thought\n</think>\n\nHello!"), QUESTION),
        PLAIN,
    ),
)


@dataclass(frozen=True)
class Wanted:
    """What the tokens of a pair must say, as found here."""

    prompt: str
    answers: tuple[str, str]  # with their end
    stripped: int  # answers that the template took outer blanks from
    rewritten: int


class RefusalWantedError(Exception):
    """The pair can't be trained on; the message says why."""


class LostError(Exception):
    """The package has it wrong."""


class Template:
    """A template on a tokenizer that has its control tokens."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        source = path.read_text(encoding="utf-8")
        fitting = [family for family in FAMILIES if path.stem.startswith(family.prefix)]
        if not fitting:
            raise SystemExit(f"{path.name}: no family in {__file__} fits; add its control tokens")
        self.family = fitting[0]
        self.tokenizer: Any = self._tokenizer(source)
        bos = self.family.bos
        try:
            self.writes_bos = bool(bos) and self.full(CONVERSATIONS[0], "x").startswith(str(bos))
        except Exception:  # it refuses this conversation, so nothing of it will be tokenised
            self.writes_bos = False
        if self.writes_bos:  # as Llama's and Gemma's do: a second one must not come in
            self.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, self.tokenizer.bos_token_id)]
            )

    def _tokenizer(self, source: str) -> Any:
        bytes_alone = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend: Any = Tokenizer(models.BPE(bytes_alone, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        own = {self.family.bos, self.family.eos}
        named = {*CONTROL.findall(source), *CONTROL.findall(self.family.end)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=self.family.bos,
            eos_token=self.family.eos,
            additional_special_tokens=sorted(named - own),
        )
        tokenizer.chat_template = source
        return tokenizer

    def opening(self, conversation: Conversation) -> str:
        """The prompt with the header of the answer."""
        return self._render(conversation.prompt, add_generation_prompt=True)

    def full(self, conversation: Conversation, answer: str) -> str:
        """The conversation with an answer."""
        return self._render(conversation.with_answer(answer), add_generation_prompt=False)

    def _render(self, messages: list[Message], **options: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def text(self, ids: Sequence[int]) -> str:
        """The exact text of some ids."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def wanted(template: Template, conversation: Conversation) -> Wanted:
    """What the tokens must say. Raises RefusalWantedError, or what the template raises."""
    opening = template.opening(conversation)
    fulls = [template.full(conversation, answer) for answer in conversation.answers]
    for full, answer in zip(fulls, conversation.answers, strict=True):
        if not full.startswith(opening):
            raise RefusalWantedError("the prompt is no prefix of the conversation")
        if answer.split()[-1] not in full[len(opening) :]:
            raise RefusalWantedError("the template leaves the answer out")
        behind = full[full.rindex(conversation.prompt[-1]["content"]) :]
        if "<think>" in answer and behind.count("<think>") > answer.count("<think>"):
            raise RefusalWantedError("the answer's thinking comes after an empty one")
    probes = [template.full(conversation, probe) for probe in PROBES]
    inserted = common_start(probes)
    after = common_start([probe[::-1] for probe in probes])[::-1]
    # An answer with thinking of its own has it where others have the template's empty one. The
    # prompt is one for both sides, so what one side lacks belongs to the other side's answer.
    shared = inserted.startswith(opening) and all(full.startswith(inserted) for full in fulls)
    prompt = inserted if shared else opening
    bodies = [full[len(prompt) : len(full) - len(after)] for full in fulls]
    end = template.family.end
    if not after.startswith(end) and after.strip():
        raise LostError(f"{end!r} is not the end of an answer before {after!r}: FAMILIES is wrong")
    pairs = list(zip(bodies, conversation.answers, strict=True))
    return Wanted(
        prompt,
        (bodies[0] + end, bodies[1] + end),
        stripped=sum(body != answer and body.strip() == answer.strip() for body, answer in pairs),
        rewritten=sum(body.strip() != answer.strip() for body, answer in pairs),
    )


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    size = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        size += 1
    return texts[0][:size]


def as_row(number: int, conversation: Conversation) -> Row:
    """The conversation as the package's row."""
    chosen, rejected = (turns(("assistant", answer)) for answer in conversation.answers)
    return Row(number, conversation.prompt, chosen, rejected)


def tokenized(template: Template, rows: list[Row]) -> tuple[dict[int, TokenizedPair], DataReport]:
    """The pairs that the package makes of rows, by number, and its report."""
    report = DataReport(source="conversations", total=len(rows), kept=len(rows))
    try:
        pairs = tokenize_rows(
            rows, template.tokenizer, TokenizationOptions(max_length=None), report
        )
    except ValueError:
        if report.kept:
            raise
        pairs = []  # not one row was kept; the report says why
    return {pair.row: pair for pair in pairs}, report


def judge(template: Template, number: int, batches: list[dict[int, TokenizedPair]]) -> str:
    """`correct` or `refused`. Raises LostError, or what the package raises."""
    conversation = CONVERSATIONS[number]
    refusal, want = "", None
    try:
        want = wanted(template, conversation)
    except LostError:
        raise
    except Exception as error:
        refusal = str(error)
    pairs, report = tokenized(template, [as_row(number, conversation)])
    for batch in batches:
        if batch.get(number) != pairs.get(number):
            raise LostError("comes out otherwise among other rows than alone")
    if number not in pairs:
        check_refusal(template, conversation, report, refusal)
        return "refused"
    if want is None:
        raise LostError(f"kept, and should have been refused: {refusal}")
    check_pair(template, pairs[number], want)
    if (report.template_stripped, report.template_rewritten) != (want.stripped, want.rewritten):
        raise LostError(
            f"counted {report.template_stripped} stripped and {report.template_rewritten} "
            f"rewritten answers, there are {want.stripped} and {want.rewritten}"
        )
    return "correct"


def check_pair(template: Template, pair: TokenizedPair, want: Wanted) -> None:
    """Raise LostError unless the pair says what it must, token by token."""
    if pair.rejected_prompt_ids is not None:
        raise LostError("the two sides have different prompts")
    sides = (pair.chosen_ids, pair.rejected_ids)
    found = (template.text(pair.prompt_ids), *map(template.text, sides))
    names = ("prompt", "chosen", "rejected")
    for name, got, wish in zip(names, found, (want.prompt, *want.answers), strict=True):
        if got != wish:
            raise LostError(f"{name} is ...{got[-60:]!r}, wanted ...{wish[-60:]!r}")
    for ids, answer in zip(sides, want.answers, strict=True):
        whole = template.tokenizer(want.prompt + answer, add_special_tokens=False)["input_ids"]
        if pair.prompt_ids + ids != whole:
            raise LostError("joined ids differ from those of the joined text")
        bos = (pair.prompt_ids + ids).count(template.tokenizer.bos_token_id)
        if template.writes_bos and bos != 1:
            raise LostError(f"{bos} BOS tokens")


def check_refusal(
    template: Template, conversation: Conversation, report: DataReport, refusal: str
) -> None:
    """Raise LostError unless the pair had to be refused and its own texts are shown."""
    if report.dropped or len(report.refused) != 1:
        raise LostError(f"neither kept nor refused: {report.dropped}")
    ((reason, tally),) = report.refused.items()
    if not refusal:
        raise LostError(f"refused without need: {reason}: {tally.example}")
    try:
        opening = template.opening(conversation)
        fulls = [template.full(conversation, answer) for answer in conversation.answers]
    except Exception as error:
        if str(error) not in tally.example:
            raise LostError(f"the template's own error is not told: {tally.example}") from error
        return
    prompt, against, answered = tally.example.partition(" against ")
    quoted = ast.literal_eval(answered if against else prompt)
    pieces = quoted.split(" ... ")
    if against and ast.literal_eval(prompt) not in opening:
        raise LostError(f"the prompt shown is not this row's: {tally.example}")
    if not any(all(piece in full for piece in pieces) for full in fulls):
        raise LostError(f"the text shown is not this row's: {tally.example}")


def template_files(arguments: Sequence[str]) -> list[Path]:
    """The templates of a folder, or of trl, which is found without importing it."""
    if arguments:
        folder = Path(arguments[0])
    else:
        found = importlib.util.find_spec("trl")
        if found is None or found.origin is None:
            raise SystemExit("no trl: pip install --no-deps trl==1.16.0, or name a folder")
        folder = Path(found.origin).parent / "chat_templates"
    files = sorted(folder.glob("*.jinja"))
    if not files:
        raise SystemExit(f"{folder}: no *.jinja in it")
    return files


def main(arguments: Sequence[str]) -> int:
    """Print a row for each template and the total; 1 if anything is lost."""
    transformers_logging.set_verbosity_error()
    say = sys.stdout.write
    say(f"{'template':<36}{'correct':>8}{'refused':>8}{'lost':>6}\n")
    totals = {"correct": 0, "refused": 0, "lost": 0}
    for path in template_files(arguments):
        template = Template(path)
        rows = [as_row(number, conversation) for number, conversation in enumerate(CONVERSATIONS)]
        batches = [tokenized(template, order)[0] for order in (rows, rows[::-1])]
        counts, losses = dict.fromkeys(totals, 0), []
        for number, conversation in enumerate(CONVERSATIONS):
            try:
                counts[judge(template, number, batches)] += 1
            except Exception as error:
                counts["lost"] += 1
                name = "" if isinstance(error, LostError) else f"{type(error).__name__}: "
                losses.append(f"    lost, {conversation.name}: {name}{error}\n")
        say(f"{template.name:<36}{counts['correct']:>8}{counts['refused']:>8}{counts['lost']:>6}\n")
        say("".join(losses))
        totals = {kind: totals[kind] + counts[kind] for kind in totals}
    say(f"{'all':<36}{totals['correct']:>8}{totals['refused']:>8}{totals['lost']:>6}\n")
    say(f"{sum(totals.values())} trials, {totals['lost']} lost\n")
    return 1 if totals["lost"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
