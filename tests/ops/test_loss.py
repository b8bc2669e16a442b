"""The pair loss: golden values, numbers by hand, gradients, refusals; native and reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rmipo_lite.ops import pair_loss, rmipo_loss

REFERENCES = Path(__file__).resolve().parent.parent / "references"
IMPLS = ["torch", "native"]
ROWS = json.loads((REFERENCES / "loss_grid.json").read_text())["rows"]
FINITE = [r for r in ROWS if r["group"] != "nonfinite" and r["beta"] >= 0]


def borders(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def column(key: str, rows: list[dict], *names: str) -> torch.Tensor:
    values = [[float(r[key][n] if key else r[n]) for n in names] for r in rows]
    return torch.tensor(values, dtype=torch.float64).flatten()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
def test_golden_grid(impl: str, loss_type: str) -> None:
    smoothed = loss_type in ("rmipo", "simpo")
    groups: dict[tuple[float, float], list[dict]] = {}
    for row in FINITE:
        groups.setdefault((row["beta"], row["label_smoothing"] if smoothed else 0.0), []).append(
            row
        )
    for (beta, smoothing), rows in groups.items():
        logps = column("", rows, "logp_w", "logp_l").requires_grad_()
        prior = column("", rows, "prior_w", "prior_l")
        each = torch.arange(len(logps) + 1, dtype=torch.int32)
        out = pair_loss(
            logps, each, prior, each, loss_type=loss_type, beta=beta, gamma_scaled_by_beta=True,
            label_smoothing=smoothing, simpo_gamma=0.25 * beta, impl=impl,
        )  # fmt: skip
        out.loss.sum().backward()
        close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(out.loss.detach(), column(loss_type, rows, "loss"), **close)
        grads = column(loss_type, rows, "d_loss_d_logp_w", "d_loss_d_logp_l")
        torch.testing.assert_close(logps.grad, grads, **close)
        if loss_type == "rmipo":
            torch.testing.assert_close(out.gamma, column("rmipo", rows, "gamma"), **close)
            torch.testing.assert_close(out.pmi_gap, column("rmipo", rows, "delta"), **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_logits_to_loss(impl: str) -> None:
    """From the authors' logits through means and priors to their losses and gradient."""
    data = load_file(REFERENCES / "logits_small.safetensors")

    def tokens(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = data[f"{name}_logits"].double().requires_grad_()
        labels = data[f"{name}_labels"][:, 1:]
        logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        order = [0, 2, 1, 3]  # C1 R1 C2 R2; the file has chosen, then rejected
        scored = [logps[i][labels[i] != -100] for i in order]
        return logits, torch.cat(scored), borders(*map(len, scored))

    logits, logps, cu_seqlens = tokens("policy")
    _, prior, prior_cu_seqlens = tokens("prior")
    out = pair_loss(
        logps, cu_seqlens, prior, prior_cu_seqlens, gamma_scaled_by_beta=True, impl=impl
    )
    torch.testing.assert_close(out.loss.detach(), data["f64.losses"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.gamma, data["f64.gamma"], rtol=1e-12, atol=1e-12)
    out.loss.mean().backward()
    torch.testing.assert_close(logits.grad, data["f64.grad_logits"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("gap", "gamma"),
    [(0.0, 1.6), (-1e4, 1.6), (1e4, 0.3), (math.inf, 0.3), (-math.inf, 1.6), (1.0, 0.7782432735)],
)
def test_gamma_by_hand(impl: str, gap: float, gamma: float) -> None:
    """gamma = 0.3 + 1.3 * exp(-max(0, gap)); gap enters through the prior alone."""
    zero = torch.zeros(1, dtype=torch.float64)
    out = rmipo_loss(zero, zero, zero - gap, zero, impl=impl)
    assert out.gamma.item() == pytest.approx(gamma, abs=1e-9)
    assert 0.3 <= out.gamma.item() <= 1.6
    # D = 0, so z = -gamma and the loss is log(1 + e^gamma)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(gamma)), abs=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_undefined_prior_counts_as_gap_zero(impl: str) -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0])
    out = pair_loss(logps, borders(1, 2), torch.tensor([-9.0]), borders(0, 1), impl=impl)
    assert out.pmi_gap.item() == 0.0
    assert out.gamma.item() == pytest.approx(1.6)
    assert out.prior_logps is not None
    assert out.prior_logps.isnan().tolist() == [True, False]
    assert out.loss.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
def test_nan_stays_in_its_pair(impl: str, loss_type: str) -> None:
    logps = torch.tensor([-1.0, math.nan, -1.0, -2.0], requires_grad=True)
    each = torch.arange(5, dtype=torch.int32)
    out = pair_loss(logps, each, torch.zeros(4), each, loss_type=loss_type, impl=impl)
    assert out.loss.isnan().tolist() == [True, False]
    out.loss[1].backward()
    assert logps.grad is not None
    assert logps.grad[2:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
def test_gradcheck(impl: str, loss_type: str) -> None:
    logps = torch.randn(11, dtype=torch.float64, requires_grad=True)
    cu_seqlens, prior = borders(1, 4, 3, 3), torch.randn(7, dtype=torch.float64)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        # The prior moves with the policy, so that the gap and gamma stay what they are: gamma
        # carries no gradient by definition, and finite differences would see one.
        shifted = pair_loss(logps.detach(), cu_seqlens, loss_type="simpo", impl="torch").logps
        each = torch.arange(5, dtype=torch.int32)
        return pair_loss(
            logps, cu_seqlens, shifted + prior[:4], each, loss_type=loss_type, impl=impl
        ).loss

    assert torch.autograd.gradcheck(loss, (logps,))


def test_registration() -> None:
    logps = torch.randn(6, requires_grad=True)
    args = (logps, borders(1, 5), torch.randn(3), borders(1, 2), "rmipo", 2.0, 0.3, 1.6)
    torch.library.opcheck(torch.ops.rmipo_lite.pair_loss, (*args, False, 0.0, 0.5, "torch"))


def test_second_derivative_is_refused() -> None:
    logps = torch.randn(2, requires_grad=True)
    out = rmipo_loss(logps[:1], logps[1:], torch.zeros(1), torch.zeros(1), impl="torch")
    with pytest.raises(RuntimeError, match="pair_loss: second derivatives"):
        torch.autograd.grad(out.loss.sum(), logps, create_graph=True)


def test_no_pairs() -> None:
    empty = torch.zeros(0)
    for impl in IMPLS:
        assert rmipo_loss(empty, empty, empty, empty, impl=impl).loss.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of rmipo, simpo, hinge, simper, got 'dpo'"),
        ({"beta": math.nan}, "beta must be finite and at least 0, got nan"),
        ({"gamma_min": 2.0}, "gamma_min must be at most gamma_max = 1.6, got 2.0"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "0 for loss_type='hinge'"),
        ({"impl": "cuda"}, "impl must be auto, native or torch, got 'cuda'"),
        ({"cu_seqlens": borders(1, 1)}, "cu_seqlens must run from 0 to the number of tokens 3"),
        ({"cu_seqlens": borders(0, 3)}, "the chosen response of pair 0 has none"),
        ({"cu_seqlens": borders(4, -1)}, "cu_seqlens must not descend, got 4 then 3"),
        ({"cu_seqlens": borders(3)}, r"cu_seqlens must have shape \(2 \* num_pairs \+ 1,\)"),
        (
            {"prior_token_logps": None, "prior_cu_seqlens": None},
            "needs prior_token_logps, got None",
        ),
        ({"prior_token_logps": None}, "go together"),
        ({"token_logps": torch.zeros(3, 1)}, r"token_logps must have shape \(num_tokens,\)"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {
        "token_logps": torch.zeros(3), "cu_seqlens": borders(1, 2),
        "prior_token_logps": torch.zeros(2), "prior_cu_seqlens": borders(1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**arguments, **change})


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"token_logps must be float32 or float64, got torch\.bfloat16"
    ):
        pair_loss(torch.zeros(2).bfloat16(), borders(1, 1), loss_type="simpo")
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, got torch\.int64"):
        pair_loss(torch.zeros(2), borders(1, 1).long(), loss_type="simpo")
