"""Gradients by finite differences, and registration with torch.

A list of cases, each once: every operator in every mode. gamma is a target the method sets and has
no gradient, so finite differences are taken where it doesn't move: at a gap below 0, or with
gamma_min = gamma_max.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import library, linear_logps, pair_loss, rmipo_loss
from rmipo_lite.ops.reference import IGNORED
from tests.trials.numbers.operands import kernel_impl, seeded
from tests.trials.scorecard import Check, Trials

_ROWS, _WIDTH, _VOCAB = 5, 4, 13
_BORDERS = torch.tensor([0, 1, 4, 6, 7], dtype=torch.int32)  # two pairs, ragged
_PRIOR_BORDERS = torch.tensor([0, 2, 3, 3, 4], dtype=torch.int32)  # one response without a prior
# Every loss with the options it has: (loss type, a prior is given, gamma scaled, smoothing).
_LOSSES = (
    *(("rmipo", True, scaled, e) for scaled in (False, True) for e in (0.0, 0.1)),
    *(("simpo", prior, False, e) for prior in (False, True) for e in (0.0, 0.1)),
    *((name, prior, False, 0.0) for name in ("hinge", "simper") for prior in (False, True)),
)
_IMPLS = ("native", "torch")
_UTILITIES = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip
Case = tuple[str, Callable[[torch.Generator], None]]


def gradients_and_registration(trials: Trials) -> None:
    """Check 22: the case of each index."""
    cases = all_cases()
    for trial in trials:
        with trial:
            trial.tried, run = cases[trial.index]
            run(seeded(trial.rng))


def all_cases() -> list[Case]:
    """Every operator in every mode: gradcheck, then opcheck with its four utilities."""
    cases: list[Case] = []
    for impl, trained, bias, softcap in itertools.product(
        _IMPLS, (False, True), (False, True), (None, 3.0)
    ):
        text = f"gradcheck linear_logps {impl}, trained head {trained}, bias {bias}, cap {softcap}"
        cases.append((text, partial(_gradcheck_head, impl, trained, bias, softcap)))
    for impl, loss in itertools.product(_IMPLS, _LOSSES):
        cases.append((f"gradcheck pair_loss {impl} {loss}", partial(_gradcheck_pairs, impl, loss)))
        cases.append((f"opcheck pair_loss {impl} {loss}", partial(_opcheck_pairs, impl, loss)))
    for impl, scaled, smoothing in itertools.product(_IMPLS, (False, True), (0.0, 0.1)):
        text = f"gradcheck rmipo_loss {impl}, scaled {scaled}, smoothing {smoothing}"
        cases.append((text, partial(_gradcheck_means, impl, scaled, smoothing)))
    for impl, mode, bias in itertools.product(_IMPLS, range(3), (False, True)):
        text = f"opcheck linear_logps {impl}, mode {mode}, bias {bias}"
        cases.append((text, partial(_opcheck_head, impl, mode, bias)))
    for impl, bias in itertools.product(_IMPLS, (False, True)):
        text = f"opcheck linear_logps_backward {impl}, bias {bias}"
        cases.append((text, partial(_opcheck_head_backward, impl, bias)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases.append((f"opcheck scale_directions {dtype}", partial(_opcheck_scale, dtype)))
    cases.append(("opcheck pair_loss_backward", _opcheck_pairs_backward))
    for name in ("row_logps", "fold_logits", "pair_losses"):
        cases.append((f"what {name} says that it writes", partial(_opcheck_kernel, name)))
    return cases


def _usable(impl: str) -> Any:
    """Where there are no kernels, plain PyTorch stands in for them."""
    return impl if impl == "torch" else kernel_impl()


def _head_arguments(
    generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.randint(0, _VOCAB, (_ROWS,), generator=generator)
    ids[2] = IGNORED
    shapes = ((_ROWS, _WIDTH), (_VOCAB, _WIDTH), (_VOCAB,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes
    )
    return hidden, weight, ids, bias


def _gradcheck_head(
    impl: str, trained: bool, has_bias: bool, softcap: float | None, generator: torch.Generator
) -> None:
    hidden, weight, ids, bias = _head_arguments(generator, torch.float64)

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        used = b if has_bias else None
        return linear_logps(
            h, w, ids, bias=used, logit_softcap=softcap, logit_scale=0.7, impl=_usable(impl)
        )

    leaves = (hidden, weight, bias) if trained else (hidden,)
    for leaf in leaves if has_bias else leaves[:2]:
        leaf.requires_grad_()
    torch.autograd.gradcheck(run, (hidden, weight, bias))


def _pair_arguments(
    generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_logps = -torch.rand(int(_BORDERS[-1]), generator=generator, dtype=dtype)
    prior = -torch.rand(int(_PRIOR_BORDERS[-1]), generator=generator, dtype=dtype)
    # A chosen response that the prior knows better: the first pair's gap is below 0.
    prior[:2] += 3.0
    return token_logps, _BORDERS, prior, _PRIOR_BORDERS


def _gradcheck_pairs(
    impl: str, loss: tuple[str, bool, bool, float], generator: torch.Generator
) -> None:
    loss_type, has_prior, scaled, smoothing = loss
    token_logps, borders, prior, prior_borders = _pair_arguments(generator, torch.float64)
    torch.autograd.gradcheck(
        lambda logps: (
            pair_loss(
                logps,
                borders,
                prior if has_prior else None,
                prior_borders if has_prior else None,
                loss_type=loss_type,
                gamma_scaled_by_beta=scaled,
                label_smoothing=smoothing,
                impl=_usable(impl),
            ).loss
        ),
        (token_logps.requires_grad_(),),
    )


def _gradcheck_means(impl: str, scaled: bool, smoothing: float, generator: torch.Generator) -> None:
    means = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    chosen, rejected, chosen_prior, rejected_prior = means
    leaves = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
    for low, shift in ((0.7, 0.0), (0.3, 5.0)):  # gamma a constant; gaps far below 0

        def run(w: Tensor, l: Tensor, low: float = low, shift: float = shift) -> Tensor:  # noqa: E741
            return rmipo_loss(
                w, l, chosen_prior + shift, rejected_prior, impl=_usable(impl),
                gamma_min=low, gamma_max=0.7, gamma_scaled_by_beta=scaled,
                label_smoothing=smoothing,
            ).loss  # fmt: skip

        torch.autograd.gradcheck(run, leaves)


def _opcheck_head(impl: str, mode: int, has_bias: bool, generator: torch.Generator) -> None:
    hidden, weight, ids, bias = _head_arguments(generator, torch.float32)
    hidden.requires_grad_(mode > 0)
    weight.requires_grad_(mode == 2)
    arguments = (
        hidden, weight, ids, bias if has_bias else None, 5.0, 1.0, mode, _usable(impl),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rmipo_lite.linear_logps, arguments)


def _opcheck_head_backward(impl: str, has_bias: bool, generator: torch.Generator) -> None:
    hidden, weight, ids, bias = _head_arguments(generator, torch.float32)
    upstream = torch.randn(_ROWS, generator=generator)
    arguments = (
        upstream, hidden, weight, ids, bias if has_bias else None, None, 1.0, _usable(impl),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rmipo_lite.linear_logps_backward, arguments)


def _opcheck_scale(dtype: torch.dtype, generator: torch.Generator) -> None:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    directions = torch.randn(_ROWS, _WIDTH, generator=generator, dtype=exact)
    upstream = torch.randn(_ROWS, generator=generator, dtype=exact)
    torch.library.opcheck(torch.ops.rmipo_lite.scale_directions, (directions, upstream, dtype))


def _opcheck_pairs(
    impl: str, loss: tuple[str, bool, bool, float], generator: torch.Generator
) -> None:
    loss_type, has_prior, scaled, smoothing = loss
    token_logps, borders, prior, _ = _pair_arguments(generator, torch.float32)
    # Every response has a prior here: a mean of no token is NaN, which opcheck finds unequal to
    # itself. So without a prior, where all of them are, its comparison of traced runs is left out.
    priors = (prior, torch.arange(5, dtype=torch.int32)) if has_prior else (None, None)
    utilities = _UTILITIES if has_prior else _UTILITIES[:3]
    constants = (loss_type, 2.0, 0.3, 1.6, scaled, smoothing, 0.5, _usable(impl))
    arguments = (token_logps.requires_grad_(), borders, *priors, *constants)
    torch.library.opcheck(torch.ops.rmipo_lite.pair_loss, arguments, test_utils=utilities)


def _opcheck_pairs_backward(generator: torch.Generator) -> None:
    arguments = (
        torch.randn(2, generator=generator),
        torch.randn(4, generator=generator),
        _BORDERS,
        int(_BORDERS[-1]),
    )
    torch.library.opcheck(torch.ops.rmipo_lite.pair_loss_backward, arguments)


def _opcheck_kernel(name: str, generator: torch.Generator) -> None:
    """The kernels write into their arguments, and into none but those that the schema names."""
    if not library.status("cpu").available:
        return
    logits = torch.randn(_ROWS, _VOCAB, generator=generator)
    ids = torch.randint(0, _VOCAB, (_ROWS,), generator=generator)
    bias, per_row = torch.randn(_VOCAB, generator=generator), torch.zeros(_ROWS)
    flag = torch.zeros(1, dtype=torch.int32)
    token_logps, borders, prior, prior_borders = _pair_arguments(generator, torch.float32)
    arguments: tuple[Any, ...] = {
        "row_logps": (logits, ids, bias, 1.0, 5.0, None, per_row, None, flag),
        "fold_logits": (
            logits, ids, 0, bias, 1.0, 5.0, torch.full((_ROWS,), -torch.inf),
            per_row.double(), per_row.clone(), torch.randn(_ROWS, _WIDTH, generator=generator),
        ),
        "pair_losses": (
            token_logps, borders, prior, prior_borders, 0, 2.0, 0.3, 1.6, False, 0.0, 0.5,
            *(torch.zeros(size) for size in (2, 2, 2, 4, 4, 4)), flag,
        ),
    }[name]  # fmt: skip
    operator = getattr(torch.ops.rmipo_lite, name)
    torch.library.opcheck(operator, arguments, test_utils="test_schema")


CHECKS = [
    Check(22, "gradcheck and opcheck of every operator and mode", len(all_cases()),
          gradients_and_registration, least=24),
]  # fmt: skip
