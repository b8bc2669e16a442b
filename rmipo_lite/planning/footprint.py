"""What a run takes, counted from a model's config: bytes by part, and floating-point operations.

Nothing is loaded. A copy of the model with two or three layers is built on no device at all
(`meta`), reads a pair and runs backward in the package's own code, and every tensor that lives
meanwhile is counted. What a layer and a token take is the difference between such passes, so it
holds for any architecture, and the automatic budget and `estimate` share it.

Attention is stood in for by one that keeps what a fused kernel keeps (query, key, value, output and
a number a row). Counted are tensors: what a kernel takes inside, and what an allocator keeps, is
not among them.
"""

import copy
import json
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention, segment_attention
from rmipo_lite.model.backbone import disable_dropout, enable_checkpointing, scored_hidden
from rmipo_lite.model.fused_lora import fused_lora
from rmipo_lite.tokens.pair import TokenizedPair

# NF4: half a byte, and for every 64 numbers a scale of one byte, itself scaled in blocks of 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# The pair of a counted pass: lengths that no model has, so that no activation has a weight's shape.
_PAIR = TokenizedPair(0, [1] * 127, [1] * 191, [1] * 193)
_PAIRS = 1  # of a counted pass, and twice as many
# Where an architecture can't be counted: activations a block keeps, in multiples of hidden size
# (norms, q, k, v, attention output, residuals) and of the MLP's inner size (gate, up, product).
_HIDDEN_COPIES, _INNER_COPIES = 16, 5
COUNTED_ATTENTION = "rmipo_counted"
_META = torch.device("meta")
_CACHED = 64


@dataclass(frozen=True)
class Setup:
    """What a footprint depends on beside the config.

    Attributes:
        dtype: what the run computes in.
        peft_config: the adapter's; None trains every weight.
        quantized: whether the layers' weights are in 4 bits.
    """

    dtype: torch.dtype
    peft_config: PeftConfig | None
    quantized: bool = False


@dataclass(frozen=True)
class Activations:
    """Peak bytes of a micro-step's passes: `fixed + per_token * tokens`, results included."""

    fixed: float
    per_token: float
    counted: bool  # False: the architecture could not be counted, a formula stands in

    def bytes_of(self, tokens: float) -> float:
        """Peak bytes of a micro-step of so many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens_in(self, room: float) -> int:
        """The most tokens whose passes take no more than `room` bytes."""
        return max(0, int((room - self.fixed) / self.per_token))


@dataclass(frozen=True)
class Weights:
    """Numbers of a model: `layers` in its linear layers without the head, and the others."""

    layers: int
    others: int  # embeddings, head, norms; a tied head once
    head: int  # of the others: read by the head's products
    largest: int  # of a linear layer
    trained: int

    def loaded_bytes(self, setup: Setup, shared_by: int = 1) -> int:
        """Bytes of the model's own weights as a run holds them, the adapter's not among them.

        `shared_by`: processes of which each holds a part of every layer.
        """
        of_layers = self.layers * (NF4_BYTES if setup.quantized else setup.dtype.itemsize)
        return int(of_layers / shared_by + self.others * setup.dtype.itemsize)

    def adapter_bytes(self, setup: Setup) -> int:
        """Bytes of the adapter's weights, in float32; 0 where the model itself is trained."""
        return 0 if setup.peft_config is None else 4 * self.trained

    def gradient_bytes(self, setup: Setup) -> int:
        """Bytes of the gradients of what is trained."""
        return self.trained * (4 if setup.peft_config is not None else setup.dtype.itemsize)

    def dequantised_bytes(self, setup: Setup) -> int:
        """Bytes of the largest 4-bit layer while its product is computed."""
        return self.largest * setup.dtype.itemsize if setup.quantized else 0


def weights_of(config: PretrainedConfig, setup: Setup) -> Weights:
    """Count the numbers of a model and its adapter from the config."""
    return _remembered("weights", config, setup, False, _count_weights)


def _count_weights(config: PretrainedConfig, setup: Setup, _: bool) -> Weights:
    model = _shell(config, setup, layers=None)
    base = causal_lm(model)
    head = base.get_output_embeddings()
    adapter = sum(p.numel() for name, p in base.named_parameters() if "lora_" in name)
    frozen = sum(p.numel() for p in base.parameters()) - adapter
    sizes = [
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and "lora_" not in name
    ]
    layers = sum(sizes)
    head_weight = getattr(head, "weight", None)
    return Weights(
        layers=layers,
        others=frozen - layers,
        head=0 if head_weight is None else head_weight.numel(),
        largest=max(sizes, default=0),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _shell(config: PretrainedConfig, setup: Setup, layers: int | None) -> nn.Module:
    """The model on no device, with its adapter; `layers` of its blocks, or all."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    if layers is not None:
        total = text.num_hidden_layers
        text.num_hidden_layers = layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == total:  # one entry a layer
                setattr(text, name, value[:layers])
    with warnings.catch_warnings(), kept_random_state():
        warnings.simplefilter("ignore")
        with _META:
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=setup.dtype, trust_remote_code=False
            )
        if setup.peft_config is not None:
            # In the run's precision, which is what autocast makes of an adapter in a pass.
            adapter = copy.deepcopy(setup.peft_config)
            adapter.inference_mode = False  # a saved one is frozen until it goes on
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    disable_dropout(model)
    return model.train()


def activations_of(config: PretrainedConfig, setup: Setup, checkpointing: bool) -> Activations:
    """Peak bytes of a micro-step, by tokens; `checkpointing` computes activations again."""
    return _remembered("activations", config, setup, checkpointing, _count_activations)


def activations_without_gradient(config: PretrainedConfig, setup: Setup) -> Activations:
    """The same of a pass that keeps nothing: the prior's, the reference's, an evaluation's."""
    return _remembered("no gradient", config, setup, False, partial(_count_activations, grad=False))


def score_bytes(config: PretrainedConfig, longest: int, checkpointing: bool) -> float:
    """Bytes a token more where attention keeps the score of every key, of at most `longest`.

    In float32, one of every layer that keeps its activations and two in the layer at work.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or text.hidden_size // 64
    layers = 1 if checkpointing else int(text.num_hidden_layers)
    return 4.0 * int(heads) * longest * (layers + 2)


def _count_activations(
    config: PretrainedConfig, setup: Setup, checkpointing: bool, *, grad: bool = True
) -> Activations:
    layers = int(config.get_text_config().num_hidden_layers)
    few, more = (2, 3) if layers > 3 else (layers, layers)
    peak = partial(_peak, config, setup, checkpointing=checkpointing, grad=grad)
    try:
        small, longer = peak(few, _PAIRS), peak(few, 2 * _PAIRS)
        deeper = small if more == few else peak(more, _PAIRS)
        both = longer if more == few else peak(more, 2 * _PAIRS)
    except Exception:
        # Whatever a strange architecture fails with, it must not fail a run: the formula stands in.
        return _by_formula(config, setup, checkpointing, grad)
    # a + b * layers + (c + d * layers) * tokens, through the four points
    tokens = _PAIRS * batch.packed_length(_PAIR)
    slope = [(longer - small) / tokens, (both - deeper) / tokens]
    start = [small - slope[0] * tokens, deeper - slope[1] * tokens]
    beyond = layers - few
    return Activations(
        fixed=max(0.0, start[0] + (start[1] - start[0]) * beyond),
        per_token=slope[0] + (slope[1] - slope[0]) * beyond,
        counted=True,
    )


def _by_formula(
    config: PretrainedConfig, setup: Setup, checkpointing: bool, grad: bool
) -> Activations:
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    block = (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner) * setup.dtype.itemsize
    # Checkpointed, every block's input is kept, and one block's activations at a time.
    kept = layers * hidden * setup.dtype.itemsize + block if checkpointing else layers * block
    kept = kept if grad else block
    return Activations(fixed=0.0, per_token=kept + 4 * hidden, counted=False)


def _peak(
    config: PretrainedConfig,
    setup: Setup,
    layers: int,
    pairs: int,
    *,
    checkpointing: bool,
    grad: bool = True,
) -> int:
    """The most bytes that live at once, weights and their gradients not counted."""
    part = [_PAIR] * pairs
    model = _shell(config, setup, layers)
    if checkpointing:
        enable_checkpointing(model)
    live = _LiveBytes(list(model.parameters()))
    with live, packed_attention(model, COUNTED_ATTENTION), fused_lora(model):
        policy = batch.policy_input(part, packing=True).to(_META)
        if not grad:
            with torch.no_grad():
                scored_hidden(model, policy)
            return live.peak
        hidden = scored_hidden(model, policy)
        # What the head's forward pass leaves for its backward pass.
        direction = torch.empty_like(hidden, dtype=torch.float32)
        with torch.no_grad():
            scored_hidden(model, batch.prior_input(part, packing=True).to(_META))
        hidden.backward(torch.empty_like(hidden))
        del direction
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block that still live; no weight, no gradient of one."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {w.untyped_storage()._cdata: w for w in weights}
        shapes = {tuple(weight.shape) for weight in weights if weight.requires_grad}
        self._shapes = shapes | {shape[::-1] for shape in shapes}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tuple(tensor.shape) in self._shapes:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        self._known.pop(key, None)


class _StandIn(torch.autograd.Function):
    """Attention's memory without its numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any) -> Tensor:
    out: Tensor = _StandIn.apply(query, key, value)
    return out


AttentionInterface.register(COUNTED_ATTENTION, partial(segment_attention, attend=_attend))


_memory: OrderedDict[tuple[str, ...], Any] = OrderedDict()


def _remembered(
    what: str, config: PretrainedConfig, setup: Setup, checkpointing: bool, count: Any
) -> Any:
    """The outcome of a count, made once for the same config and options."""
    peft = setup.peft_config
    key = (
        what,
        type(config).__name__,
        json.dumps(config.to_dict(), sort_keys=True, default=str),
        str(setup.dtype.itemsize),
        "" if peft is None else json.dumps(peft.to_dict(), sort_keys=True, default=sorted_text),
        str((setup.quantized, checkpointing)),
    )
    if key not in _memory:
        _memory[key] = count(config, setup, checkpointing)
        while len(_memory) > _CACHED:
            _memory.popitem(last=False)
    return _memory[key]


def sorted_text(value: Any) -> Any:
    """A set as a sorted list, anything else as text; for a key that stays the same."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def optimizer_width(optimizer: str) -> int:
    """Bytes that an optimizer keeps for every trained number."""
    if "8bit" in optimizer:
        return 2
    if optimizer in ("sgd", "adafactor"):
        return 0
    return 8


def setup_of(model: nn.Module, dtype: torch.dtype) -> Setup:
    """The setup of a loaded model that a run computes in `dtype`."""
    peft = model.active_peft_config if isinstance(model, PeftModel) else None
    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return Setup(dtype, peft, quantized)
