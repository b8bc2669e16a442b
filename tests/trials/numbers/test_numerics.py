"""Numerics, extremes, gradients, determinism: the checks hold, and find what is planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmipo_lite.ops import head_blocks, head_rows, native
from rmipo_lite.ops.reference import PairParts
from rmipo_lite.step import pair_step
from tests.trials.numbers import extremes


def test_every_operator_is_in_the_list_of_gradients() -> None:
    from tests.trials.numbers.autograd import all_cases

    texts = " ".join(text for text, _ in all_cases())
    for name in ("linear_logps", "pair_loss", "rmipo_loss", "scale_directions", "fold_logits"):
        assert name in texts
    assert len({text for text, _ in all_cases()}) == len(all_cases())


def _logps_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_blocks._Sums.logps
    monkeypatch.setattr(head_blocks._Sums, "logps", lambda self: real(self) + 1e-4)


def _target_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self, out, weight, transform):
        out.mul_((-transform.scale / self.total).to(out.dtype)[:, None])

    monkeypatch.setattr(head_blocks._Sums, "finish", finish)


def _loss_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.pair_losses

    def pair_losses(*arguments):
        parts = real(*arguments)
        return parts._replace(loss=parts.loss * 1.00001)

    monkeypatch.setattr(native, "pair_losses", pair_losses)


@pytest.mark.parametrize("plant", [_logps_off, _target_left_out, _loss_off])
def test_another_value_or_gradient_is_found(
    plant, try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert try_check(4, *range(0, 120, 2)).lost > 3


def test_the_other_place_of_gamma_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_step.losses

    def losses(token_logps, cu_seqlens, prior, args, *others):
        swapped = replace(args, gamma_scaled_by_beta=not args.gamma_scaled_by_beta)
        return real(token_logps, cu_seqlens, prior, swapped, *others)

    monkeypatch.setattr(pair_step, "losses", losses)
    outcome = try_check(12, 1, 2, 3)
    assert outcome.lost == 3
    assert "loss is" in outcome.losses[0].message


def test_ignored_rows_that_are_multiplied_by_zero_are_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_weight_grad(self, grads, rows, target_ids, out):
        out.addmm_(grads.T, self.hidden[rows].to(self.exact))

    monkeypatch.setattr(head_rows.HeadProducts, "add_weight_grad", add_weight_grad)
    assert try_check(20, *range(0, 60, 3)).lost > 2


def test_scoring_the_row_beside_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of those rows are not scored, and hold garbage."""
    scored_hidden = extremes.scored_hidden

    def beside(model, inputs):
        moved = (inputs.logit_rows + 1) % inputs.input_ids.numel()
        return scored_hidden(model, replace(inputs, logit_rows=moved))

    monkeypatch.setattr(extremes, "scored_hidden", beside)
    assert try_check(20, 1, 2, 4, 5).lost > 0


def test_nan_that_is_swallowed_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extremes.rmipo_loss

    def rmipo_loss(*arguments, **options):
        out = real(*arguments, **options)
        return out._replace(gamma=out.gamma.nan_to_num(1.6))

    monkeypatch.setattr(extremes, "rmipo_loss", rmipo_loss)
    assert try_check(21, 2, 5).lost == 2


def test_a_gradient_of_another_size_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.pair_losses

    def pair_losses(*arguments):
        parts: PairParts = real(*arguments)
        return parts._replace(mean_grads=parts.mean_grads * 1.1)

    monkeypatch.setattr(native, "pair_losses", pair_losses)
    assert try_check(22, 16, 18).lost == 2


def test_another_result_each_time_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.row_logps
    monkeypatch.setattr(
        native, "row_logps", lambda *arguments: real(*arguments) + 1e-6 * torch.rand(1)
    )
    assert try_check(24, 1).lost == 1
