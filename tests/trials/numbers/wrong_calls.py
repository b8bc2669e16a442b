"""Wrong and odd calls of the operators, each with what is to come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmipo_lite.ops import library, linear_logps, pair_loss, rmipo_loss
from rmipo_lite.ops.reference import IGNORED
from tests.trials.numbers.operands import LAYOUTS, kernel_impl, laid_out
from tests.trials.scorecard import expect

Call = tuple[str, Callable[[], None]]  # what is called, and a function that raises if it went wrong
_ROWS, _WIDTH, _VOCAB = 4, 8, 11
_REFUSALS = (TypeError, ValueError, RuntimeError)
_FAR = (-1, _VOCAB, 2**40, -101, -(2**63), 2**63 - 1)  # targets that are no token


def all_calls() -> list[Call]:
    """Every wrong or odd call there is."""
    return [*_head_calls(), *_pair_calls(), *_mean_calls(), *_kernel_calls()]


def _refused(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        function(**arguments)
    except _REFUSALS as error:
        expect(str(error).strip(), "refused without a word")
        return
    raise AssertionError("not refused")


def _survived(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        function(**arguments)
    except _REFUSALS:
        return


# ---- the head ---------------------------------------------------------------------------------


def _head_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(_ROWS, _WIDTH, generator=generator),
        "weight": torch.randn(_VOCAB, _WIDTH, generator=generator),
        "target_ids": torch.tensor([0, 3, _VOCAB - 1, IGNORED]),
        "bias": torch.randn(_VOCAB, generator=generator),
        "impl": kernel_impl(),
    }


def _head_calls() -> Iterator[Call]:
    good = _head_arguments()
    for name, text, value in _bad_head_arguments(good):
        yield f"linear_logps, {name}: {text}", partial(_refused, linear_logps, good | {name: value})
    for layout in LAYOUTS:
        for name in ("hidden", "weight", "target_ids", "bias"):
            value = laid_out(good[name], layout)
            yield f"linear_logps, {name}: {layout}", partial(_right_head, good | {name: value})
    for text, changes in _odd_head_arguments(good).items():
        yield f"linear_logps, {text}", partial(_right_head, good | changes)
    yield "linear_logps, inference mode", partial(_in_inference_mode, good)
    second = {"leaf": good["hidden"].clone().requires_grad_(), "good": good}
    yield "linear_logps, second derivative", partial(_refused, _second_derivative, second)


def _bad_head_arguments(good: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    tensors = ("hidden", "weight", "target_ids", "bias")
    for name in tensors:
        value = good[name]
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.uint8):
            yield name, str(dtype), value.to(dtype)
        yield name, "on meta", value.to("meta")
        yield name, "one dimension more", value[None]
        yield name, "a number", value.flatten()[0]
        yield name, "one row short", value[:-1] if name != "weight" else value[:, :-1]
        yield name, "sparse", value.to_sparse()
        yield name, "memory freed", _freed(value)
        for wrong in ("text", value.tolist(), *([None] if name != "bias" else [])):
            yield name, f"a {type(wrong).__name__}", wrong
    for dtype in (torch.bfloat16, torch.float64):
        yield "weight", f"{dtype}, hidden float32", good["weight"].to(dtype)
        yield "bias", f"{dtype}, hidden float32", good["bias"].to(dtype)
    yield "weight", "no token", good["weight"][:0]
    for far in _FAR:
        for place in range(3):
            ids = good["target_ids"].clone()
            ids[place] = far
            yield "target_ids", f"{far} in row {place}", ids
    for cap in (0.0, -1.0, float("nan"), float("inf"), "30"):
        yield "logit_softcap", repr(cap), cap
    for scale in (float("nan"), float("inf"), None, "1"):
        yield "logit_scale", repr(scale), scale
    yield "impl", "cuda", "cuda"


def _freed(value: Tensor) -> Tensor:
    freed = value.clone()
    freed.untyped_storage().resize_(0)
    return freed


def _odd_head_arguments(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Odd and good: the right result is asked for."""
    hidden, weight, ids, bias = (good[n] for n in ("hidden", "weight", "target_ids", "bias"))
    flat = torch.arange(64.0)
    return {
        "no row": {"hidden": hidden[:0], "target_ids": ids[:0]},
        "no width": {"hidden": hidden[:, :0], "weight": weight[:, :0]},
        "one token": {"weight": weight[:1], "bias": bias[:1], "target_ids": ids.clamp(max=0)},
        "every row ignored": {"target_ids": torch.full_like(ids, IGNORED)},
        "overlapping rows": {"hidden": flat.as_strided((_ROWS, _WIDTH), (1, 1), 5) / 9},
        "one weight row for all": {"weight": weight[:1].expand(_VOCAB, _WIDTH)},
        "one bias for all": {"bias": bias[:1].expand(_VOCAB)},
        "one id for all": {"target_ids": ids[:1].expand(_ROWS)},
        "a negated view": {"hidden": torch._neg_view(hidden)},
        "scale 0": {"logit_scale": 0.0},
        "a negative scale": {"logit_scale": -3.0},
        "a tiny softcap": {"logit_softcap": 1e-6},
        "float16": {n: good[n].half() for n in ("hidden", "weight", "bias")},
    }


def _right_head(arguments: dict[str, Any]) -> None:
    """Against plain torch, with a gradient for hidden and with one for the head too."""
    cap, scale = arguments.get("logit_softcap"), arguments.get("logit_scale", 1.0)
    for trained in (False, True):
        wants = {"hidden": True, "weight": trained, "bias": trained}
        plain = {n: arguments[n].clone().double().requires_grad_(w) for n, w in wants.items()}
        leaves = {n: arguments[n].detach().requires_grad_(w) for n, w in wants.items()}
        logits = (plain["hidden"] @ plain["weight"].T + plain["bias"]) * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        want = -F.cross_entropy(logits, arguments["target_ids"], reduction="none")
        got = linear_logps(**(arguments | leaves))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        names = [name for name, wanted in wants.items() if wanted]
        grads = torch.autograd.grad(got.sum(), [leaves[n] for n in names])
        right = torch.autograd.grad(want.sum(), [plain[n] for n in names])
        tolerance = 1e-2 if leaves["hidden"].dtype == torch.float16 else 1e-4
        for a, b in zip(grads, right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def _in_inference_mode(arguments: dict[str, Any]) -> None:
    want = linear_logps(**arguments)
    with torch.inference_mode():
        got = linear_logps(**(arguments | {"hidden": arguments["hidden"].clone()}))
    expect(torch.equal(got, want), "another result in inference mode")


def _second_derivative(leaf: Tensor, good: dict[str, Any]) -> None:
    logps = linear_logps(**(good | {"hidden": leaf}))
    torch.autograd.grad(logps.sum(), leaf, create_graph=True)


# ---- the loss ---------------------------------------------------------------------------------


def _pair_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "token_logps": -torch.rand(9, generator=generator),
        "cu_seqlens": torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32),
        "prior_token_logps": -torch.rand(5, generator=generator),
        "prior_cu_seqlens": torch.tensor([0, 1, 1, 3, 5], dtype=torch.int32),
        "impl": kernel_impl(),
    }


def _pair_calls() -> Iterator[Call]:
    good = _pair_arguments()
    for name, text, value in _bad_pair_arguments(good):
        yield f"pair_loss, {name}: {text}", partial(_refused, pair_loss, good | {name: value})
    tensors = [name for name in good if name != "impl"]
    for name in tensors:
        for layout in ("offset", "padded rows", "every second column"):
            call = partial(_same_pairs, good, {name: laid_out(good[name], layout)})
            yield f"pair_loss, {name}: {layout}", call
    repeated = good["token_logps"][:1].expand(9)
    copied = good | {"token_logps": repeated.clone()}
    yield "pair_loss, stride 0", partial(_same_pairs, copied, {"token_logps": repeated})
    nothing = {name: good[name][: 1 if "cu_" in name else 0] for name in tensors}
    yield "pair_loss, no pair", partial(_same_pairs, good | nothing, {})


def _bad_pair_arguments(good: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name in (name for name in good if name != "impl"):
        value = good[name]
        for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.complex64):
            yield name, str(dtype), value.to(dtype)
        yield name, "on meta", value.to("meta")
        yield name, "two dimensions", value[None]
        yield name, "a number", value[0]
        yield name, "empty", value[:0]
        yield name, "one short", value[:-1]
        yield name, "one long", torch.cat([value, value[-1:]])
        yield name, "sparse", value.to_sparse()
        yield name, "memory freed", _freed(value)
        yield name, "a list", value.tolist()
        if "prior" in name:
            yield name, "missing", None
    for borders in (
        [1, 2, 3, 7, 9], [0, 3, 2, 7, 9], [0, 2, 3, 7, 10], [0, 2, 3, 7, 8], [-1, 2, 3, 7, 9],
        [0, 2, 2, 7, 9], [0, 2, 3, 2**31 - 1, 9], [0, -(2**31), 3, 7, 9], [0, 2, 3, 9, 9],
    ):  # fmt: skip
        yield "cu_seqlens", str(borders), torch.tensor(borders, dtype=torch.int32)
    for name, value in (
        ("loss_type", "dpo"), ("beta", -1.0), ("beta", float("nan")), ("gamma_min", 2.0),
        ("gamma_max", float("inf")), ("label_smoothing", 2.0), ("simpo_gamma", float("inf")),
        ("impl", None),
    ):  # fmt: skip
        yield name, repr(value), value


def _same_pairs(good: dict[str, Any], changes: dict[str, Any]) -> None:
    """The same as plain PyTorch on plain memory."""
    got = pair_loss(**(good | changes))
    want = pair_loss(**(good | {"impl": "torch"}))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def _mean_calls() -> Iterator[Call]:
    names = ("chosen_logps", "rejected_logps", "chosen_prior_logps", "rejected_prior_logps")
    good: dict[str, Any] = {name: -torch.arange(1.0, 4.0) for name in names}
    for name in names:
        value = good[name]
        for text, wrong in (
            ("int64", value.long()), ("complex64", value.to(torch.complex64)),
            ("on meta", value.to("meta")), ("two dimensions", value[None]), ("a number", value[0]),
            ("one short", value[:-1]), ("sparse", value.to_sparse()), ("a list", value.tolist()),
        ):  # fmt: skip
            arguments = good | {name: wrong}
            yield f"rmipo_loss, {name}: {text}", partial(_refused, rmipo_loss, arguments)


# ---- the kernels themselves -------------------------------------------------------------------


def _kernel_calls() -> Iterator[Call]:
    """The registered kernels, which nobody is to call: what they are given is checked all the same.

    None where there are no kernels; the calls above then go to plain PyTorch.
    """
    if not library.status("cpu").available:
        return
    for kernel, good in _kernel_arguments().items():
        function = partial(_by_position, kernel)
        for name in (name for name, value in good.items() if isinstance(value, Tensor)):
            value = good[name]
            for text, wrong in (
                ("int8", value.to(torch.int8)), ("on meta", value.to("meta")),
                ("one dimension more", value[None]), ("a number", value.flatten()[0]),
                ("stride 2", value.repeat_interleave(2, -1)[..., ::2]),
                ("one long", torch.cat([value, value[:1]])),
            ):  # fmt: skip
                # A vector of one element has no stride to speak of, and some sizes are free.
                free = text in ("stride 2", "one long") and name in _FREE[kernel]
                outcome = _survived if free or value.numel() == 1 else _refused
                call = partial(outcome, function, {"arguments": good | {name: wrong}})
                yield f"{kernel}, {name}: {text}", call
    for far in _FAR:
        call = partial(_far_row, _kernel_arguments()["row_logps"], far)
        yield f"row_logps, target_ids: {far}", call


# The first argument sets the shape that the others are held to; so does a lone second dimension.
_FREE = {
    "row_logps": (),
    "fold_logits": (),
    "pair_losses": ("token_logps", "prior_token_logps"),
}


def _by_position(kernel: str, arguments: dict[str, Any]) -> None:
    getattr(torch.ops.rmipo_lite, kernel)(*arguments.values())


def _kernel_arguments() -> dict[str, dict[str, Any]]:
    head, pairs = _head_arguments(), _pair_arguments()
    flag = torch.zeros(1, dtype=torch.int32)
    vector = torch.zeros(_ROWS)
    del pairs["impl"]
    return {
        "row_logps": {
            "logits": torch.zeros(_ROWS, _VOCAB), "target_ids": head["target_ids"],
            "bias": head["bias"], "scale": 1.0, "cap": 0.0, "row_scale": vector.clone(),
            "logps": vector.clone(), "grads": None, "flag": flag,
        },
        "fold_logits": {
            "logits": torch.zeros(_ROWS, _VOCAB), "target_ids": head["target_ids"], "first_id": 0,
            "bias": head["bias"], "scale": 1.0, "cap": 0.0, "row_max": vector.clone(),
            "row_sum": vector.double(), "target_logits": vector.clone(),
            "directions": torch.zeros(_ROWS, _WIDTH),
        },
        "pair_losses": {
            **pairs, "loss_type": 0, "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6,
            "scaled": False, "smoothing": 0.0, "simpo_gamma": 0.5,
            **{f"out{i}": torch.zeros(size) for i, size in enumerate((2, 2, 2, 4, 4, 4))},
            "flag": flag,
        },
    }  # fmt: skip


def _far_row(good: dict[str, Any], far: int) -> None:
    """A target that is no token: NaN in its row, the flag, and the other rows as they were."""
    ids = good["target_ids"].clone()
    ids[1] = far
    _by_position("row_logps", good | {"target_ids": ids})
    expect(good["logps"][1].isnan(), "the row isn't NaN")
    expect(good["logps"][[0, 2]].isfinite().all(), "another row is")
    expect(int(good["flag"]) == 1, "the flag isn't set")
