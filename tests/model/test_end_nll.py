"""The end of chosen responses as a likelihood: against the model's own logits, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rmipo_lite.model.head import ModelHead, end_nll

END = 2
# Two pairs; the first chosen one ends, the second was cut. Rejected ones end too, and don't count.
CHOSEN = [[5, 7, END], [3, 4, 6, 8]]
REJECTED = [[9, END], [END]]


def _case(dtype: torch.dtype = torch.float64, **head: Any) -> tuple[ModelHead, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(3)
    targets = [t for both in zip(CHOSEN, REJECTED, strict=True) for side in both for t in side]
    hidden = torch.randn(len(targets), 6, generator=generator).to(dtype)
    made: dict[str, Any] = {
        "weight": torch.randn(11, 6, generator=generator).to(dtype),
        "bias": torch.randn(11, generator=generator).to(dtype),
        "logit_softcap": None,
        "logit_scale": 1.0,
    }
    return ModelHead(**{**made, **head}), hidden.requires_grad_(), torch.tensor(targets)


def _logits(head: ModelHead, hidden: torch.Tensor) -> torch.Tensor:
    x = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    x = x * head.logit_scale
    return x if head.logit_softcap is None else head.logit_softcap * (x / head.logit_softcap).tanh()


def _by_hand(head: ModelHead, hidden: torch.Tensor) -> torch.Tensor:
    """From the whole softmax: -log p at the end, -log(1 - p) before it."""
    p = _logits(head, hidden).softmax(-1)[:, END]
    first = -(1 - p[0]).log() - (1 - p[1]).log() - p[2].log()
    return torch.stack([first, -(1 - p[5:9]).log().sum()])


@pytest.mark.parametrize(
    "head", [{}, {"bias": None}, {"logit_scale": 0.25}, {"logit_softcap": 3.0, "logit_scale": 2.0}]
)
def test_values_and_gradient_are_those_of_the_whole_softmax(head: dict[str, Any]) -> None:
    made, hidden, targets = _case(**head)
    lengths = [(len(c), len(r)) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    logps = made.token_logps(hidden, targets, "torch")
    ours = end_nll(made, hidden, logps, targets, lengths, END)
    expected = _by_hand(made, hidden)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(ours.sum(), hidden)[0]
    theirs = torch.autograd.grad(expected.sum(), hidden)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not mine[3:5].any()  # the rejected responses have no part in it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [1.0, 4.0, 5.0, 7.0, 10.0, 20.0, 360.0])
def test_where_the_end_is_likely_too_early_the_push_is_p(logit: float, dtype: torch.dtype) -> None:
    """Also where p is 1 but for rounding: on the end's logit p, on the row's own token less."""
    weight = torch.eye(11)  # a hidden row is its logits
    head = ModelHead(weight.to(dtype), None, None, 1.0)
    row = torch.zeros(1, 11, dtype=dtype)
    row[0, END] = logit
    hidden = row.requires_grad_()
    targets = torch.tensor([5])
    logps = head.token_logps(hidden, targets, "torch")
    nll = end_nll(head, hidden, logps, targets, [(1, 0)], END)
    p = row.detach().double().softmax(-1)[0, END]
    assert float(nll.detach()) == pytest.approx(-math.log1p(-min(float(p), 0.999)), rel=0.05)
    nll.sum().backward()
    assert hidden.grad is not None
    pushed = hidden.grad.double()[0]
    assert float(pushed[END]) == pytest.approx(float(p), rel=0.02)
    assert float(pushed.sum()) == pytest.approx(0.0, abs=0.02)  # softmax moves mass, and no more
    assert float(pushed[5]) < 0


def test_a_fitted_hazard_is_the_share_of_positions_that_end() -> None:
    """With one logit for the end, the optimum is ends over positions: neither never nor at once."""
    lengths = [(3, 0), (4, 0)]
    targets = torch.tensor([5, 7, END, 3, 4, 6, 8])
    bias = nn.Parameter(torch.zeros(11))
    optimizer = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        head = ModelHead(torch.zeros(11, 6), bias, None, 1.0)
        logps = bias.log_softmax(0)[targets]
        loss = end_nll(head, torch.zeros(7, 6), logps, targets, lengths, END).sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    assert float(bias.detach().softmax(0)[END]) == pytest.approx(1 / 7, abs=1e-3)
