"""Norms and gated units in one kernel each: liger-kernel's, where it is installed.

transformers computes them in five to ten passes over memory, which on a card take longer than what
they compute. Nothing is patched on a class, and liger's losses aren't used: a layer's own `forward`
is another one while a step runs. Which one is found on the run's own pairs: what the layer made of
its input, and the gradient of that, is compared with what each of liger's forms makes of it, of
larger and smaller inputs too. A layer that none of them equals up to rounding stays as it is, and
one line says so; of gated units, only what multiplies and nothing else is looked at.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.model.fused_lora import fused_lora, has_hooks
from rmipo_lite.output.console import say

Forward = Callable[[Tensor], Tensor]
Layers = Sequence[tuple[nn.Module, Forward]]  # each with its other forward

_OLDEST, _BEYOND = (0, 5), (0, 9)  # versions whose functions take what is passed here
_LEAST_CAPABILITY = (7, 0)  # of NVIDIA's cards, for Triton
# What is added to the weight, and what is cast.
_NORMS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (0.0, "none"))
_ROUNDING = 1e-5  # of the norm, in float32
_OTHER_SCALES = (30.0, 1e-3)  # a norm's epsilon shows in small inputs


def find_fused(model: nn.Module, device: torch.device, run: Callable[[], object]) -> Layers:
    """The layers that liger's kernels may compute, none where they aren't to be had.

    Args:
        model: as it will run.
        device: of its layers.
        run: passes some pairs through it; nothing random is drawn.
    """
    if not _is_available(device):
        return []
    try:
        norm, *gates = _functions()
    except (ImportError, AttributeError, RuntimeError) as error:
        say(f"liger-kernel is not used: {_first_line(error)}")
        return []
    search = _Search(norm, gates)
    layers = [module for module in causal_lm(model).modules() if search.knows(module)]
    hooks = [layer.register_forward_hook(search) for layer in layers]
    try:
        with evaluating(model), torch.no_grad(), fused_lora(model):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    search.tell()
    return search.found


@contextmanager
def replaced(layers: Layers) -> Iterator[None]:
    """Inside the block the layers run their other forward; the backward pass belongs inside.

    Not those that somebody has changed since.
    """
    free = [(module, forward) for module, forward in layers if not _is_changed(module)]
    for module, forward in free:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, _ in free:
            del vars(module)["forward"]


def _is_changed(module: nn.Module) -> bool:
    """Whether a forward of somebody's own, or hooks on what a kernel passes by, are there."""
    activation = getattr(module, "act_fn", None)
    return "forward" in vars(module) or (
        isinstance(activation, nn.Module) and has_hooks(activation)
    )


def _functions() -> tuple[Any, Any, Any]:
    """liger's autograd functions: RMSNorm, and SiLU and GELU's tanh form times the other half."""
    return (
        importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction,
        importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction,
        importlib.import_module("liger_kernel.ops.geglu").LigerGELUMulFunction,
    )


def _is_available(device: torch.device) -> bool:
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run on a CPU
    if device.type == "cuda":
        if torch.version.hip is None and (
            torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY
        ):
            return False
    elif not (device.type == "cpu" and interpreted):
        return False
    try:
        there = version("liger-kernel")
    except PackageNotFoundError:
        return False
    number = tuple(int(part) for part in there.split(".")[:2] if part.isdigit())
    if _OLDEST <= number < _BEYOND:
        return True
    say(
        f"liger-kernel {there} is not used: 0.5 to 0.8 are known here. fused_layers='off' says "
        "nothing of it"
    )
    return False


class _Search:
    """A forward hook: compares a layer's output with what the fused forms make of its input."""

    def __init__(self, norm: Any, gates: Sequence[Any]) -> None:
        self._norm, self._gates = norm, gates
        self.found: list[tuple[nn.Module, Forward]] = []
        self._left: dict[str, list[str]] = {}  # what is wrong with the layers of a class
        self._first: dict[type, int] = {}  # the form that an earlier layer of the class has

    def knows(self, module: nn.Module) -> bool:
        """Whether a layer is of a kind that there is a kernel for, and nobody changed it."""
        return bool(self._forms(module)) and not (has_hooks(module) or _is_changed(module))

    def _forms(self, module: Any) -> list[Forward]:
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("RMSNorm") and weight is not None and weight.dim() == 1:
            own = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
            eps = next((value for value in own if isinstance(value, float)), None)
            if eps is None:
                return []
            return [partial(_norm, self._norm, module, eps, *form) for form in _NORMS]
        if _is_plain_gate(module):
            return [partial(_gated, gate, module) for gate in self._gates]
        return []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """What torch calls after a layer's forward."""
        if len(inputs) != 1 or not isinstance(output, Tensor) or any(
            module is known for known, _ in self.found
        ):  # fmt: skip
            return
        forms = self._forms(module)
        first = self._first.get(type(module), 0)
        nearest = ""
        for number in (first, *(n for n in range(len(forms)) if n != first)):
            problem = _problem(module, forms[number], inputs[0])
            if not problem:
                self.found.append((module, forms[number]))
                self._first[type(module)] = number
                return
            nearest = nearest or problem
        self._left.setdefault(type(module).__name__, []).append(nearest)

    def tell(self) -> None:
        """One line: how many layers are fused, and which are not."""
        if not (self.found or self._left):
            return
        text = f"{len(self.found)} norms and gated units run in liger-kernel's kernels"
        if self._left:
            left = (f"{len(told)} {name} ({told[0]})" for name, told in self._left.items())
            text += f"; as they are: {', '.join(left)}"
        say(text)


def _is_plain_gate(module: nn.Module) -> bool:
    """Whether a layer is `down(act(gate(x)) * up(x))` and nothing else, by its source.

    Others clamp, scale or drop, which a few inputs need not show.
    """
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    x = function.args.args[1].arg
    product = f"self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"
    lines = [ast.unparse(line) for line in function.body]
    if len(lines) == 2 and " = " in lines[0]:
        name, _, value = lines[0].partition(" = ")
        return value == product and lines[1] == f"return {name}"
    return lines == [f"return {product}"]


def _norm(function: Any, module: Any, eps: float, offset: float, casting: str, x: Tensor) -> Tensor:
    # Not in place: a residual may hold the gradient that comes in.
    out: Tensor = function.apply(x, module.weight, eps, offset, casting, False)
    return out


def _gated(function: Any, module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(function.apply(module.gate_proj(x), module.up_proj(x)))
    return out


def _problem(module: nn.Module, form: Forward, x: Tensor) -> str:
    """What is wrong with a form on this input; "" where it equals the layer up to rounding."""
    if not x.isfinite().all():
        return "its input isn't finite"
    scaled = (x, *(scale * x for scale in _OTHER_SCALES))
    return next(filter(None, (_problem_at(module, form, one) for one in scaled)), "")


def _problem_at(module: nn.Module, form: Forward, x: Tensor) -> str:
    try:
        theirs, ours = (
            _passed(forward, x) for forward in (partial(type(module).forward, module), form)
        )
    except Exception as error:  # whatever a kernel that doesn't fit raises, the layer still runs
        return _first_line(error)
    rounding = max(_ROUNDING, torch.finfo(x.dtype).eps)
    for what, a, b in zip(("values", "gradients"), theirs, ours, strict=True):
        if a.dtype != b.dtype:
            return f"{what} in {b.dtype} for {a.dtype}"
        reached = a.isfinite()  # float16 doesn't reach as far as every scale
        if not reached.any() or not torch.equal(reached, b.isfinite()):
            return f"{what} aren't finite, or not in the same places"
        a, b = a.where(reached, 0), b.where(reached, 0)
        gap = float((a - b).float().norm() / a.float().norm().clamp(min=1e-30))
        if not gap <= rounding:
            return f"{what} differ by {gap:.1g}"
    return ""


def _passed(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input under a fixed gradient of the output."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        out = forward(leaf)
        down = torch.arange(out.numel(), device=out.device).remainder(7).sub(3).view_as(out)
        (gradient,) = torch.autograd.grad(out, leaf, down.to(out.dtype))
    return out.detach(), gradient


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:80]
