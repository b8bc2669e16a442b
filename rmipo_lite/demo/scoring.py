"""Answers and their true reward: what the demo measures, apart from how it trains.

Win rate is against a fixed opponent: for every held-out prompt one answer that the model gave
before training, sampled with a seed of its own. A higher true reward wins, an equal one counts
half. The model before training therefore scores about 50 % against itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.demo.task import (
    PAIR_KINDS,
    REWARDS,
    Pair,
    Question,
    questions_by_text,
    true_reward,
    what_it_says,
)
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.ops import linear_logps, rmipo_loss

MAX_NEW_TOKENS = 64  # the longest supervised answer has about 50


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: text, whether it ended by itself, tokens with the end token."""

    text: str
    ended: bool
    tokens: int


def _prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    messages = [{"role": "user", "content": question.text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def sample_answers(
    model: Any, tokenizer: Any, questions: Sequence[Question], seed: int, top_p: float = 0.95
) -> list[Answer]:
    """One answer for each question, sampled at temperature 1 in one left-padded batch.

    Of the likeliest tokens that hold `top_p` of the probability, as models usually speak.

    Sampled, not greedy: the reward of samples is what preference training raises, and a greedy
    answer would hide how often the model says something else. The caller's random state stays.
    """
    prompts = [_prompt_ids(tokenizer, question) for question in questions]
    width = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with evaluating(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=top_p,
            use_cache=True,
            pad_token_id=pad,
        )
    answers = []
    for row in output[:, width:].tolist():
        ended = end in row
        ids = row[: row.index(end)] if ended else row
        answers.append(Answer(tokenizer.decode(ids), ended, len(ids) + ended))
    return answers


def judge(prompt: list[dict[str, str]], answer: Any) -> float:
    """The true reward of an answer to a question of the demo's, as `rmipo_lite.compare` asks it.

    Raises:
        KeyError: it isn't one of the demo's questions.
    """
    question = questions_by_text()[prompt[-1]["content"]]
    return true_reward(question, str(answer), ended=answer.ended)


@dataclass(frozen=True, slots=True)
class Score:
    """Means over the held-out prompts; shares are in [0, 1]."""

    win_rate: float  # against the fixed opponent, ties half
    full_marks: float  # right, terse and ended
    mean_reward: float
    generic: float
    garbled: float  # no sentence of the task's
    mean_tokens: float
    unended: float


def score_answers(
    questions: Sequence[Question], answers: Sequence[Answer], opponents: Sequence[Answer]
) -> Score:
    """Score answers by the true reward; `opponents` answer the same questions."""
    pairs = list(zip(questions, answers, strict=True))
    rewards = [true_reward(q, a.text, a.ended) for q, a in pairs]
    other = [true_reward(q, a.text, a.ended) for q, a in zip(questions, opponents, strict=True)]
    wins = sum((r > o) + 0.5 * (r == o) for r, o in zip(rewards, other, strict=True))
    said = [what_it_says(q.fact, a.text) for q, a in pairs]
    count = len(rewards)
    return Score(
        win_rate=wins / count,
        full_marks=sum(reward == REWARDS["right"] for reward in rewards) / count,
        mean_reward=sum(rewards) / count,
        generic=said.count("generic") / count,
        garbled=said.count("garbled") / count,
        mean_tokens=sum(a.tokens for a in answers) / count,
        unended=sum(not a.ended for a in answers) / count,
    )


def _mean_logps(model: Any, contexts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """(N,) mean log-probability of each response after its context, nats per token.

    Without a context the first token has nothing before it and stays unscored, as in training.
    """
    rows = [c + r for c, r in zip(contexts, responses, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = torch.full_like(input_ids, -100)
    for i, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        first = max(1, len(context))
        targets[i, first - 1 : len(row) - 1] = input_ids[i, first : len(row)]
    device = next(model.parameters()).device
    with torch.no_grad():
        # Padding stands on the right and is never scored, so causal attention needs no mask.
        hidden = model.model(input_ids=input_ids.to(device)).last_hidden_state
        flat = linear_logps(
            hidden.flatten(0, 1), model.lm_head.weight, targets.flatten().to(device)
        )
    return flat.view(input_ids.shape).sum(1).cpu() / (targets != -100).sum(1)


def gamma_by_pair_kind(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], per_kind: int = 64
) -> dict[str, tuple[float, float]]:
    """Mean (PMI gap, gamma) of up to `per_kind` pairs of each kind under `model`, a Llama."""
    table = {}
    for kind in PAIR_KINDS:
        some = [pair for pair in pairs if pair.kind == kind][:per_kind]
        prompts = [_prompt_ids(tokenizer, pair.question) for pair in some]
        logps: list[Tensor] = []
        no_prompts: list[list[int]] = [[] for _ in some]
        for contexts in (prompts, no_prompts):
            for texts in ([p.chosen for p in some], [p.rejected for p in some]):
                ids = [
                    [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
                    for text in texts
                ]
                logps.append(_mean_logps(model, contexts, ids))
        output = rmipo_loss(*logps)
        table[kind] = (output.pmi_gap.mean().item(), output.gamma.mean().item())
    return table
