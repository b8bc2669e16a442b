"""Answers to a benchmark's questions, in the form that its judge reads.

AlpacaEval 2, Arena-Hard-Auto and MT-Bench are judged by their own programs, with models of somebody
else. What they want is a file of answers; the forms are those of alpaca-eval 0.6.6, of
arena-hard-auto (utils/add_markdown_info.py) and of FastChat's llm_judge.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmipo_lite.model.generation import Answer, Prompt
from rmipo_lite.system.files import refuse_existing, write_whole

Question = str | Mapping[str, Any]
Generate = Callable[[list[Prompt]], list[Answer]]
FORMATS = ("jsonl", "alpaca_eval", "arena_hard", "mt_bench")
# What a question must say, by format; a plain text will do where one name stands alone.
_NEEDED = {
    "jsonl": ("prompt",), "alpaca_eval": ("instruction",), "arena_hard": ("uid", "prompt"),
    "mt_bench": ("question_id", "turns"),
}  # fmt: skip
_CODE = re.compile("```([^`]*)```")


def write_answers(
    questions: Sequence[Question] | str | Path,
    path: str | Path,
    kind: str,
    generate: Generate,
    count_tokens: Callable[[str], int],
    name: str,
) -> tuple[Path, list[Answer]]:
    """Answer the questions and write the file; (the file, the answers).

    Args:
        questions: texts, rows, or a file of rows (.json, .jsonl) as the benchmark has it.
        path: the new file.
        kind: one of `FORMATS`.
        generate: gives an answer to every conversation.
        count_tokens: of a text, for `token_len`.
        name: what the benchmark calls the model.

    Raises:
        ValueError: a format that isn't one, or a question without what it needs; names the place.
        FileExistsError: there is such a file.
    """
    target = Path(path)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    refuse_existing(target)
    rows = [_row(question, place, kind) for place, question in enumerate(_read(questions))]
    if not rows:
        raise ValueError("questions: there is none")
    turns = [row["turns"] if kind == "mt_bench" else [row[_NEEDED[kind][-1]]] for row in rows]
    answers = _answered(turns, generate)
    lines = [
        _line(kind, row, of, name, count_tokens) for row, of in zip(rows, answers, strict=True)
    ]
    if kind == "alpaca_eval":
        text = json.dumps(lines, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(target, text)
    return target, [answer for of in answers for answer in of]


def _read(questions: Sequence[Question] | str | Path) -> list[Question]:
    if not isinstance(questions, str | Path):
        return list(questions)
    path = Path(questions)
    if not path.is_file():
        raise ValueError(f"questions: there is no file {path}; a list of texts is wanted otherwise")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found: list[Question] = json.loads(text)
        return found
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _row(question: Question, place: int, kind: str) -> dict[str, Any]:
    needed = _NEEDED[kind]
    if isinstance(question, str) and len(needed) == 1:
        return {needed[0]: question}
    if not isinstance(question, Mapping) or any(question.get(n) in (None, "", []) for n in needed):
        raise ValueError(
            f"questions: number {place} has no {' and '.join(needed)}, which {kind} needs"
        )
    return dict(question)


def _answered(turns: list[list[str]], generate: Generate) -> list[list[Answer]]:
    """Turn by turn: what was answered before stands in front of the next question."""
    found: list[list[Answer]] = [[] for _ in turns]
    for number in range(max(map(len, turns))):
        places = [place for place, own in enumerate(turns) if len(own) > number]
        prompts = [_conversation(turns[place][: number + 1], found[place]) for place in places]
        for place, answer in zip(places, generate(prompts), strict=True):
            found[place].append(answer)
    return found


def _conversation(turns: list[str], answers: list[Answer]) -> Prompt:
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        messages.append({"role": "assistant", "content": str(answer)})
        messages.append({"role": "user", "content": turn})
    return messages


def _line(
    kind: str, row: dict[str, Any], answers: list[Answer], name: str, count: Callable[[str], int]
) -> dict[str, Any]:
    text = str(answers[0])
    if kind == "jsonl":
        return {"prompt": row["prompt"], "answer": text, "ended": answers[0].ended}
    if kind == "alpaca_eval":
        kept = {key: value for key, value in row.items() if key in ("dataset", "input")}
        return {"instruction": row["instruction"], "output": text, "generator": name, **kept}
    stamp, own = time.time(), uuid.uuid4().hex
    if kind == "arena_hard":
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": {"answer": text}},
        ]
        return {
            "uid": row["uid"], "ans_id": own, "model": name, "messages": messages,
            "tstamp": stamp, "metadata": {"token_len": count(text), **_markdown(text)},
        }  # fmt: skip
    choices = [{"index": 0, "turns": [str(answer) for answer in answers]}]
    return {
        "question_id": row["question_id"], "answer_id": own, "model_id": name,
        "choices": choices, "tstamp": stamp,
    }  # fmt: skip


def _markdown(text: str) -> dict[str, dict[str, int]]:
    """Headers, lists and bold texts outside of code, as Arena-Hard's style control counts them."""
    plain = text
    for block in _CODE.findall(text):  # wherever its words stand
        plain = plain.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
