"""Check 10: responses of no, one and two words, prompts about as long as all that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import BOS_ID, EOS_ID, tiny_model, tiny_trainer, word_level
from tests.trials.data.borders import WORDS, tokenized
from tests.trials.scorecard import Check, Trial, Trials, expect

_SIZES = tuple((chosen, rejected) for chosen in range(3) for rejected in range(3))  # words
_OFFSETS = (-2, -1, 0, 1, 2)  # of the prompt's tokens against max_length


@dataclass(frozen=True)
class Cut:
    """What must be left of a pair: its tokens, or the reason why there is none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    dropped: str = ""


def length_edges(trials: Trials) -> None:
    """Responses of no, one and two words behind prompts about as long as all that fits."""
    model = tiny_model()
    steps = [
        tiny_trainer(trials.folder / f"packing-{packing}", model=model, packing=packing).pair_step
        for packing in (True, False)
    ]
    for trial in trials:
        with trial:
            _one_length(trial, trial.rng.choice(steps), model)


def _one_length(trial: Trial, step: PairStep, model: nn.Module) -> None:
    adds_bos = trial.rng.random() < 0.5
    max_length = trial.rng.choice((2, 3, 4, 5, 8, 16))
    sizes = _SIZES[trial.index % len(_SIZES)]
    if trial.rng.random() < 0.3:  # one side much longer than the other
        sizes = trial.rng.choice(((sizes[0], 20), (20, sizes[1])))
    prompt_words = max_length + _OFFSETS[trial.index // len(_SIZES) % len(_OFFSETS)] - adds_bos
    if trial.rng.random() < 0.2:
        prompt_words = trial.rng.randrange(3)
    prompt, chosen, rejected = (
        trial.rng.choices(range(4, 90), k=max(0, count)) for count in (prompt_words, *sizes)
    )
    trial.tried = (
        f"{len(prompt)} words of prompt, {sizes[0]} and {sizes[1]} of response, "
        f"max_length {max_length}, BOS {adds_bos}"
    )
    texts = [" ".join(f"w{token}" for token in ids) for ids in (prompt, chosen, rejected)]
    row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    good = {"prompt": "w5", "chosen": "w6", "rejected": "w7"}
    pairs, report = tokenized(
        [row, good], word_level(WORDS, adds_bos=adds_bos), max_length=max_length
    )
    want = cut_by_hand(([BOS_ID] if adds_bos else []) + prompt, chosen, rejected, max_length)
    pair = next((pair for pair in pairs if pair.row == 0), None)
    if want.dropped:
        reasons = [reason for reason, tally in report.dropped.items() if tally.rows == [0]]
        expect(pair is None and reasons, f"wanted it dropped: {want.dropped}")
        expect(want.dropped in reasons[0], f"dropped for another reason: {reasons[0]}")
        return
    expect(pair is not None, f"not kept: {report.dropped or report.refused}")
    assert pair is not None
    found = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    expect(found == (want.prompt, want.chosen, want.rejected), f"cut to {found}, wanted {want}")
    _expect_numbers(pair, step, model)


def cut_by_hand(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int) -> Cut:
    """The rules of `row_tokens`, a token at a time; the prompt with its BOS, no EOS anywhere."""
    for name, words in (("chosen", chosen), ("rejected", rejected)):
        if not words:
            return Cut([], [], [], f"{name}: wanted a response, got an empty or blank one")
    if chosen == rejected:
        return Cut([], [], [], "two different responses, got identical ones")
    sides = [[*chosen, EOS_ID], [*rejected, EOS_ID]]
    kept = list(prompt)
    while len(kept) > max_length // 2 and len(kept) + max(map(len, sides)) > max_length:
        second = kept[:1] == [BOS_ID] and len(kept) > 2  # BOS stays while anything else is there
        del kept[1 if second else 0]
    if kept and prompt[:1] == [BOS_ID] and len(kept) == 1:
        kept = prompt[-1:]
    sides = [side[: max_length - len(kept)] for side in sides]
    if not kept and min(map(len, sides)) < 2:
        return Cut([], [], [], "a token (or a BOS) before a response of one token")
    if sides[0] == sides[1]:
        return Cut([], [], [], "two different responses, got identical ones")
    return Cut(kept, sides[0], sides[1])


@torch.no_grad()
def _mean_logp(model: nn.Module, context: list[int], response: list[int]) -> float:
    """Mean log-probability of what can be scored, from all logits; NaN where nothing can."""
    ids = context + response
    scored = len(response) if context else len(response) - 1
    if not scored:
        return math.nan
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    logps = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return float(logps[-scored:].mean())


def _expect_numbers(pair: TokenizedPair, step: PairStep, model: nn.Module) -> None:
    """Loss, margin and gap as the paper's formulas give them, and nothing that isn't finite."""
    values = pair_values.concat([values for _, values in step.evaluate([pair])])
    logps = [
        _mean_logp(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    priors = [_mean_logp(model, [], ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    gap = (logps[0] - priors[0]) - (logps[1] - priors[1])
    gap = 0.0 if math.isnan(gap) else gap
    gamma = 0.3 + 1.3 * math.exp(-max(0.0, gap))
    loss = float(F.softplus(torch.tensor(gamma - 2.0 * (logps[0] - logps[1]))))
    wanted = {"loss": loss, "gamma": gamma, "pmi_gap": gap, "chosen_logps": logps[0],
              "rejected_logps": logps[1]}  # fmt: skip
    for name, number in wanted.items():
        found: Tensor = getattr(values, name)
        close = math.isclose(float(found), number, rel_tol=1e-5, abs_tol=1e-5)
        expect(close, f"{name} is {float(found)}, by hand {number}")
    lengths = (float(values.chosen_length), float(values.rejected_length))
    by_hand = tuple(
        len(ids) - (not pair.prompt_ids) for ids in (pair.chosen_ids, pair.rejected_ids)
    )
    expect(lengths == by_hand, f"{lengths} tokens scored, by hand {by_hand}")


CHECKS = [
    Check(10, "responses of 0, 1, 2 words; prompts as long as max_length", 200, length_edges,
          least=60),
]  # fmt: skip
