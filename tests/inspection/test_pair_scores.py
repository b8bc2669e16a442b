"""Scores of pairs: the right numbers, in any chunks, the same ones after any interruption."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import Row
from rmipo_lite.inspection.pair_scores import (
    PairScores,
    identity,
    loss_weight,
    mean_scores,
    score_pairs,
)
from rmipo_lite.inspection.score_file import NUMBERS, SCORES_FILE, ScoreFile
from rmipo_lite.ops import pair_loss
from rmipo_lite.step import pair_values
from rmipo_lite.step.make import make_step
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import random_pairs, tiny_model, word_tokenizer

COUNT, CHUNK = 23, 8


def options(tmp_path: Path, **changes: Any) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, **changes)


def step_of(tmp_path: Path, max_tokens: int = 60, **changes: Any) -> PairStep:
    args = options(tmp_path, max_tokens_per_microstep=max_tokens, **changes)
    return make_step(tiny_model(), args, random_pairs(COUNT), tokenizer=word_tokenizer())


def rows(count: int = COUNT) -> list[Row]:
    return [Row(index, "p", "c", "r") for index in range(count)]


def chunks(
    pairs: Sequence[TokenizedPair], size: int = CHUNK
) -> Iterator[tuple[int, Sequence[TokenizedPair]]]:
    for start in range(0, COUNT, size):
        yield start, [pair for pair in pairs if start <= pair.row < start + size]


def scored(step: PairStep, file: ScoreFile | None = None, size: int = CHUNK) -> PairScores:
    file = ScoreFile(None, {}) if file is None else file
    step.max_tokens_no_grad, step.packing = file.begin(step.budget_no_grad, step.packing)
    return score_pairs(step, chunks(random_pairs(COUNT), size), rows(), file)


def same(one: PairScores, other: PairScores) -> bool:
    """Equal to the last bit, NaN included."""
    return all(
        np.array_equal(one.columns[name], other.columns[name], equal_nan=name in NUMBERS)
        for name in one.columns
    )


def by_hand(model: Any, context: list[int], response: list[int]) -> float:
    """Mean log-prob of the tokens that have one before them, from the model's own logits."""
    ids = torch.tensor([context + response])
    logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    first = max(1, len(context))
    scored_logps = logps[first - 1 : -1].gather(1, ids[0, first:, None])
    return float(scored_logps.mean()) if len(scored_logps) else math.nan


@torch.no_grad()
def test_every_column(tmp_path: Path) -> None:
    step = step_of(tmp_path)
    columns = scored(step).columns
    for place, pair in enumerate(random_pairs(COUNT)):
        expected = {"prompt_length": len(pair.prompt_ids)}
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            logps = by_hand(step.model, pair.prompt_ids, ids)
            prior = by_hand(step.model, [], ids)
            expected |= {
                f"{side}_length": len(ids),
                f"{side}_logps": logps,
                f"{side}_prior_logps": prior,
                f"{side}_pmi": logps - prior,
            }
        gap = expected["chosen_pmi"] - expected["rejected_pmi"]
        gamma = 1.6 if math.isnan(gap) else 0.3 + 1.3 * math.exp(-max(0.0, gap))
        z = 2 * (expected["chosen_logps"] - expected["rejected_logps"]) - gamma
        expected |= {"pmi_gap": gap, "gamma": gamma, "loss": math.log1p(math.exp(-z))}
        expected["weight"] = 1 / (1 + math.exp(z))
        for name, value in expected.items():
            assert columns[name][place] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    assert math.isnan(columns["pmi_gap"][1])  # a pair of one-token responses has no prior
    assert columns["gamma"][1] == np.float32(1.6)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("rmipo", 0.0), ("rmipo", 0.2), ("simpo", 0.0), ("simpo", 0.2), ("hinge", 0), ("simper", 0)],
)
def test_weight_is_the_slope_of_the_loss(tmp_path: Path, loss_type: Any, smoothing: float) -> None:
    args = options(tmp_path, loss_type=loss_type, label_smoothing=smoothing, beta=3.0)
    logps = torch.randn(12, dtype=torch.float64).sub(2).requires_grad_()
    borders = torch.arange(13, dtype=torch.int32)
    prior = (torch.randn(12, dtype=torch.float64) - 3, borders)
    out = pair_loss(
        logps, borders, *prior, loss_type=loss_type, label_smoothing=smoothing, beta=3.0
    )
    (slope,) = torch.autograd.grad(out.loss.sum(), logps)
    weight = loss_weight(PairValues.of(out, borders, (out.loss, out.loss)), args)
    beta = 1.0 if loss_type == "simper" else 3.0
    torch.testing.assert_close(weight, slope[0::2].abs() / beta)


def test_chunks_change_rounding_alone(tmp_path: Path) -> None:
    one, other = scored(step_of(tmp_path)), scored(step_of(tmp_path, 10_000), size=COUNT)
    for name in NUMBERS:
        np.testing.assert_allclose(one.columns[name], other.columns[name], rtol=1e-4, atol=1e-5)


def test_means_are_those_of_an_evaluation(tmp_path: Path) -> None:
    step = step_of(tmp_path)
    parts = [values for _, values in step.evaluate(random_pairs(COUNT))]
    wanted = pair_values.reduce(parts, step.args)
    means = mean_scores(scored(step), step.args)
    assert {name: means[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert means["loss"] == pytest.approx(float(pair_values.concat(parts).loss.mean()), abs=1e-4)
    assert means["rmipo/dropped_pairs"] == 0


def test_mode_and_rows_without_a_pair(tmp_path: Path) -> None:
    step = step_of(tmp_path)
    step.model.train()
    pairs = [pair for pair in random_pairs(COUNT) if pair.row not in (3, 4)]
    scores = score_pairs(step, chunks(pairs), rows(), ScoreFile(None, {}))
    assert step.model.training
    assert np.flatnonzero(~scores.scored).tolist() == [3, 4]
    assert np.isnan(scores.columns["loss"][3:5]).all()


# ---- interruptions --------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for whatever ends a process."""


def killed_after(step: PairStep, parts: int) -> None:
    """Let the step end after so many micro-steps of this call."""
    evaluate, left = step.evaluate, [parts]

    def evaluate_some(pairs: Sequence[TokenizedPair]) -> Iterator[Any]:
        for found in evaluate(pairs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            yield found

    step.evaluate = evaluate_some  # type: ignore[method-assign]


@pytest.mark.parametrize("torn", [0, 30])
def test_goes_on_after_every_micro_step(tmp_path: Path, torn: int) -> None:
    """Killed again after each micro-step, every other time inside a line: the same bits."""
    whole = scored(step_of(tmp_path))
    path = tmp_path / "s" / SCORES_FILE
    calls = 0
    while True:
        step = step_of(tmp_path)
        killed_after(step, 1)
        try:
            scores = scored(step, ScoreFile(tmp_path / "s", {"of": "this"}))
            break
        except Killed:
            calls += 1
        if torn and calls % 2:
            path.write_bytes(path.read_bytes()[:-torn])
        assert calls < 60
    assert calls > 5
    assert same(scores, whole)
    assert 0 < scores.taken_over <= COUNT
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + COUNT
    assert len(set(lines)) == len(lines)


def test_a_finished_file_needs_no_model(tmp_path: Path) -> None:
    first = scored(step_of(tmp_path), ScoreFile(tmp_path, {}))
    step = step_of(tmp_path)
    killed_after(step, 0)
    again = scored(step, ScoreFile(tmp_path, {}))
    assert same(first, again)
    assert (first.taken_over, again.taken_over) == (0, COUNT)


def test_pairs_are_cut_as_in_the_first_call(tmp_path: Path) -> None:
    """The budget of a second call depends on what memory is free then."""
    whole = scored(step_of(tmp_path))
    step = step_of(tmp_path)
    killed_after(step, 3)
    with pytest.raises(Killed):
        scored(step, ScoreFile(tmp_path, {}))
    assert same(scored(step_of(tmp_path, max_tokens=9999), ScoreFile(tmp_path, {})), whole)


def test_pairs_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    step = step_of(tmp_path)
    evaluate = step.evaluate

    def broken(pairs: Sequence[TokenizedPair]) -> Iterator[tuple[list[TokenizedPair], PairValues]]:
        for part, values in evaluate(pairs):
            bad = torch.tensor([pair.row == 5 for pair in part])
            values.loss[bad] = math.nan
            yield part, values

    step.evaluate = broken  # type: ignore[method-assign]
    scores = scored(step)
    assert np.flatnonzero(scores.scored & ~scores.finite).tolist() == [5]
    means = mean_scores(scores, step.args)
    assert means["rmipo/dropped_pairs"] == 1
    assert all(math.isfinite(value) for value in means.values())
    none = PairScores(scores.columns, scores.scored & ~scores.finite, scores.labels)
    assert mean_scores(none, step.args) == {"rmipo/dropped_pairs": 1.0}


def test_progress_says_how_long_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rmipo_lite.inspection.pair_scores._SAY_EVERY", 0.0)
    scored(step_of(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "Scored 23 of 23 rows, about 0 s left"
    done = [int(line.split()[1]) for line in said if line.startswith("Scored")]
    assert done == sorted(done)


# ---- what scores depend on --------------------------------------------------------------------


def header(tmp_path: Path, model: Any = None, **changes: Any) -> dict[str, Any]:
    tokenizer = changes.pop("tokenizer", word_tokenizer())
    some = changes.pop("rows", rows())
    max_length = changes.pop("max_length", 64)
    return identity(
        tiny_model() if model is None else model,
        tokenizer,
        some,
        options(tmp_path, **changes),
        TokenizationOptions(max_length=max_length),
    )


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def adapted(value: float) -> Any:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(value)
    return model


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    base = header(tmp_path)
    assert differing(base, header(tmp_path, learning_rate=1.0, seed=7)) == []
    assert differing(base, header(tmp_path, tiny_model(dtype=torch.float32))) == []
    assert differing(base, header(tmp_path, beta=2.5)) == ["options"]
    assert differing(base, header(tmp_path, max_length=63)) == ["options"]
    assert differing(base, header(tmp_path, rows=rows(22))) == ["dataset"]
    swapped = [Row(row.index, "p", "r", "c") for row in rows()]
    assert differing(base, header(tmp_path, rows=swapped)) == ["dataset"]
    assert differing(base, header(tmp_path, tiny_model().to(torch.bfloat16))) == ["model"]
    template = word_tokenizer()
    template.chat_template = "{{ messages }}"
    assert differing(base, header(tmp_path, tokenizer=template)) == ["tokenizer"]


def test_identity_sees_training(tmp_path: Path) -> None:
    before, after = (header(tmp_path, adapted(value)) for value in (0.0, 1e-3))
    assert differing(before, after) == ["model"]
    assert differing(before, header(tmp_path)) == ["model"]


def test_identity_holds_a_tensor_of_any_kind(tmp_path: Path) -> None:
    model = tiny_model()
    model.register_parameter("odd", torch.nn.Parameter(_transposed(), requires_grad=False))
    model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
    assert len(header(tmp_path, model)["model"]) == 64


def _transposed() -> Tensor:
    return torch.arange(12, dtype=torch.float16).view(3, 4).t()


def test_only_some_micro_steps_are_run_again(tmp_path: Path) -> None:
    step = step_of(tmp_path)
    file = ScoreFile(tmp_path, {})
    step.max_tokens_no_grad, step.packing = file.begin(step.budget_no_grad, step.packing)
    pairs = random_pairs(COUNT)[:CHUNK]
    parts = list(islice(step.evaluate(pairs), 2))
    assert len(parts[1][0]) > 1
    half = [pair.row for pair in parts[0][0]] + [parts[1][0][0].row]
    values = score_pairs(step, iter([(0, pairs)]), rows(), ScoreFile(None, {}))
    numbers = [{n: values.columns[n][r].item() for n in values.columns} for r in half]
    file.add(half, numbers)
    seen: list[int] = []
    evaluate = step.evaluate

    def watched(some: Sequence[TokenizedPair]) -> Iterator[Any]:
        seen.extend(pair.row for pair in some)
        return evaluate(some)

    step.evaluate = watched  # type: ignore[method-assign]
    score_pairs(step, iter([(0, pairs)]), rows(), ScoreFile(tmp_path, {}))
    assert set(seen) == {pair.row for pair in pairs} - {pair.row for pair in parts[0][0]}
