"""The model at step 0: what an adapter's weights were when a run began, and what that is good for.

"Before" is the model as it came to the run, whatever the adapter started with. Most adapters start
as nothing and are merely switched off; some (PiSSA, OLoRA, CorDA, LoRA-GA) take a part out of the
base model's weights and put it into the adapter. Such an adapter is only worth anything beside the
base that it left, so it is saved as the difference to its start, on the base as it was, in the
form that peft converts to: LoRA of twice the rank, W + BA - B0A0.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.parallel.sharded import write

Weights = dict[str, Tensor]  # by the names that parameters have in the model

# Where the model itself remembers it: a second train() on the same object has the same base.
START = "_rmipo_lite_start"
_MUTATING = ("pissa", "olora", "corda", "lora_ga")  # of `init_lora_weights`


def changes_base(config: PeftConfig) -> bool:
    """Whether attaching such an adapter changes the base model's weights."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.lower().startswith(_MUTATING)


def trained_weights(model: nn.Module) -> Weights:
    """A copy of every trained weight, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def remember_start(model: PeftModel, own: set[int]) -> None:
    """Keep the start of a new adapter that changed its base, or that trains weights of the base.

    `own` are the ids of the base's parameters from before it got the adapter.
    """
    weights = trained_weights(model)
    if not changes_base(model.active_peft_config):
        is_own = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        weights = {name: weight for name, weight in weights.items() if name in is_own}
    if weights:
        vars(causal_lm(model))[START] = weights


def start_of(model: nn.Module) -> Weights | None:
    """The start of an adapter that changed its base; None for all others."""
    if not isinstance(model, PeftModel) or not changes_base(model.active_peft_config):
        return None
    found: Weights | None = vars(causal_lm(model)).get(START)
    return found


def own_start_of(model: nn.Module) -> Weights:
    """What the base's own weights were (biases) that its adapter trains in place."""
    return vars(causal_lm(model)).get(START) or {}


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model has these weights in place of its own."""
    own = {n: p for n, p in model.named_parameters() if n in weights}
    kept = {name: parameter.detach().clone() for name, parameter in own.items()}
    fill(own, weights)
    try:
        yield
    finally:
        fill(own, kept)


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Write weights into the parameters of their names; LoRA's may have another rank."""
    for name, weight in weights.items():
        parameter = parameters[name]
        if parameter.shape == weight.shape:
            write(parameter, weight)
        else:
            parameter.data = weight.to(parameter)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model as it was before it got the adapter, inside the block."""
    start = start_of(model)
    if start is None:
        with warnings.catch_warnings():
            # peft warns of biases that stay, which `swapped` puts back
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers")
            with model.disable_adapter(), swapped(model, own_start_of(model)):
                yield
    else:  # what is left of the base is the model only together with this
        with swapped(model, start):
            yield


def as_difference(state: Weights, start: Weights) -> Weights:
    """Trained and first LoRA weights (by the names of files) as one LoRA of twice the rank."""
    return {**state, **_summed(state, start, 1.0, -1.0)}


def _is_first(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name


def _is_second(name: str) -> bool:
    return ("lora_B" in name and not name.endswith("bias")) or "lora_embedding_B" in name


def _summed(one: Weights, other: Mapping[str, Tensor], first: float, second: float) -> Weights:
    """The factors of first B1 A1 + second B2 A2, whose ranks add up."""
    found = {}
    for name, tensor in one.items():
        also = other[name].to(tensor) if _is_first(name) or _is_second(name) else tensor
        if _is_first(name):
            found[name] = torch.cat([tensor, also], dim=0)
        elif _is_second(name):
            found[name] = torch.cat([first * tensor, second * also], dim=1)
    return found


def has_averages(model: nn.Module) -> bool:
    """Whether an average of its weights is to be had by `moved_towards`: trained in full, LoRA."""
    if not isinstance(model, PeftModel):
        return True
    config = model.active_peft_config
    return config.peft_type == "LORA" and not getattr(config, "use_dora", False)


@torch.no_grad()
def moved_towards(model: nn.Module, start: Mapping[str, Tensor], share: float) -> Weights:
    """share * (the model's trained weights) + (1 - share) * `start`, as weights, on the CPU.

    Of LoRA it is what the layers add that is averaged, not A and B: exact, at the price of a rank
    that grows by the adapter's own every time. What nothing is left of isn't carried along.
    """
    now = trained_weights(model)
    if share == 1.0:
        return now
    if not any(weight.any() for name, weight in start.items() if _is_second(name)):
        factors = {n: share * w if _is_second(n) else w for n, w in now.items()
                   if _is_first(n) or _is_second(n)}  # fmt: skip
    else:
        factors = _summed(now, start, share, 1 - share)
    rest = {n: w.lerp(start[n].to(w), 1 - share) for n, w in now.items() if n not in factors}
    return {**factors, **rest}


def of_difference(joined: Weights, own: Weights) -> tuple[Weights, Weights]:
    """(trained, first) weights of what `as_difference` gave; `own` has the shapes."""
    state, start = dict(joined), {}
    for name, tensor in joined.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            state[name], start[name] = tensor.split(own[name].shape[0], dim=0)
        elif "lora_B" in name or "lora_embedding_B" in name:
            state[name], negative = tensor.split(own[name].shape[1], dim=1)
            start[name] = -negative
    return state, start


def difference_config(config: Any) -> Any:
    """The config of what `as_difference` gives."""
    joined = copy.deepcopy(config)
    # scaling is alpha / r, with rsLoRA alpha / sqrt(r), and stays what it is
    factor = 2**0.5 if config.use_rslora else 2
    joined.init_lora_weights, joined.r = True, 2 * config.r
    joined.lora_alpha = factor * config.lora_alpha
    joined.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    joined.alpha_pattern = {
        key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()
    }
    return joined


def _delta(layer: Any, name: str) -> Tensor:
    delta: Tensor = layer.get_delta_weight(name)
    return delta


@torch.no_grad()
def rebase(model: PeftModel, start: Weights) -> None:
    """Give base and adapter of this model another start, as if they had been made with it.

    `start` holds the LoRA weights alone.

    Some starts are drawn at random: a resumed run has made another than the one it goes on from.
    """
    everything = start_of(model)
    assert everything is not None
    own = {name: everything[name] for name in start}
    if all(torch.equal(own[name], start[name].to(own[name])) for name in own):
        return
    for weights, sign in ((own, 1.0), (start, -1.0)):
        with swapped(model, weights):
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    for name in layer.active_adapters:
                        if name in layer.lora_A:
                            base = cast(Tensor, layer.get_base_layer().weight)
                            base.add_(_delta(layer, name).to(base.dtype), alpha=sign)
    vars(causal_lm(model))[START] = {**everything, **start}
    fill(dict(model.named_parameters()), start)
