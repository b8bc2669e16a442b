"""What a QLoRA step takes on cards that nobody had at hand: counted, not measured.

Two layers of the model run forward and backward on no device at all, in the package's own code, and
every operation costs the longer of its products and the bytes it moves, at a share of the card's
speed (`planning/cards.csv`). The rest is arithmetic: the head's two products and row passes, 4-bit
weights read and written once a pass, and micro-steps as `estimate` plans them. Attention's own
products and the optimizer are left out. The peers are written as they are described in their code:
padded rows, peft's LoRA, a head that computes its logits twice.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.records import Record
from rmipo_lite import estimate
from rmipo_lite.adapters.lora import lora_config
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.model.fused_lora import fused_lora
from rmipo_lite.planning.cards import Card, find_card
from rmipo_lite.planning.estimation_view import Fit
from rmipo_lite.planning.footprint import COUNTED_ATTENTION, NF4_BYTES
from rmipo_lite.tokens.pair import TokenizedPair

CARDS = ("RTX 3060 12GB", "RTX 4070 12GB", "RTX 4090 24GB", "T4 16GB", "H100 80GB")
MODELS: dict[str, PretrainedConfig] = {
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    ),
    "0.5B": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
}  # fmt: skip
PROMPT, CHOSEN, REJECTED = 200, 300, 274
LONGEST = 824  # of the set's longest pair, either side
PAIRS = 32  # of an optimizer step
_PRODUCTS, _BYTES = 0.88, 0.9  # of the table's speeds, what long products and copies reach
_LOW_RANK = 64


@dataclass(frozen=True)
class Way:
    """How a step is computed.

    Attributes:
        name: for people.
        copies: peft's own LoRA, with its copies.
        fused: what is one kernel each: "layers", norms and gated units; "all", rotations too.
        padded: both sides as rows of their own, each with its prompt, as long as the longer one.
        prior: of "micro-step", "step" or, where there is none in a step, "none".
        pairs: of a micro-step; 0: as planned.
        again: share of the layers computed again; None: as planned.
        head: products of the head for a scored token, of which plain training needs two.
        reads: of a logit by the row kernel in a pass with gradients; float16 always takes two.
        old: planned as before checkpointing was by the micro-step.
    """

    name: str
    copies: bool = False
    fused: str = ""
    padded: bool = False
    prior: str = "step"
    pairs: int = 0
    again: float | None = None
    head: int = 2
    reads: int = 1
    old: bool = False


WAYS = (
    Way("before", copies=True, prior="micro-step", reads=2, old=True),
    Way("+ LoRA without copies on 4 bits", prior="micro-step", reads=2, old=True),
    Way("+ a step's prior in passes of its own", reads=2, old=True),
    Way("+ checkpointing as needed", reads=2),
    Way("+ logits read once: today"),
    Way("today, simpo (no prior)", prior="none"),
    Way("+ liger-kernel's norms and gated units", fused="layers"),
    Way("the same, simpo (no prior)", prior="none", fused="layers"),
    Way("trl SimPO, 1 pair", copies=True, padded=True, prior="none", pairs=1, again=0, head=3,
        reads=2),
    Way("trl SimPO, 4 pairs, checkpointing", copies=True, padded=True, prior="none", pairs=4,
        again=1, head=3, reads=2),
    Way("Unsloth and trl SimPO, 4 pairs", fused="all", padded=True, prior="none", pairs=4, again=1,
        reads=2),
)  # fmt: skip


class _Costs(TorchDispatchMode):
    """Operations and bytes of everything inside the block, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        written = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        there = {value.untyped_storage()._cdata for value in read}
        changes = func._schema.is_mutable
        is_view = not changes and all(w.untyped_storage()._cdata in there for w in written)
        if not is_view and not name.startswith(("empty", "new_empty", "detach")):
            moved = sum(value.numel() * value.element_size() for value in (*read, *written))
            self._add(name, read, moved)
        return out

    def _add(self, name: str, read: list[Tensor], moved: int) -> None:
        if name not in ("mm", "addmm", "addmm_", "bmm"):
            self.found["elementwise", 0, moved] += 1
            return
        left, right = read[-2:]
        sizes = (left.shape[-2], left.shape[-1], right.shape[-1])
        batches = left.shape[0] if name == "bmm" else 1
        kind = "elementwise" if min(sizes) <= _LOW_RANK else "products"
        self.found[kind, 2 * batches * sizes[0] * sizes[1] * sizes[2], moved] += 1


class _Stand(torch.autograd.Function):
    """A kernel that reads its inputs once and writes one output; and as much the way back."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].clone() if len(inputs) == 1 else inputs[0] + inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        first = grads[0] + saved[0]
        return first if len(saved) == 1 else (first, saved[1].clone())


@contextmanager
def _fused(model: nn.Module, what: str) -> Iterator[None]:
    """Stand-ins for fused parts of a Llama-like model."""
    source = sys.modules[type(model.get_base_model()).__module__]  # type: ignore[operator]
    family = type(model.get_base_model()).__name__.removesuffix("ForCausalLM")  # type: ignore[operator]
    norm, mlp = getattr(source, f"{family}RMSNorm"), getattr(source, f"{family}MLP")
    stands = [
        (norm, "forward", lambda self, x: _Stand.apply(x)),
        (mlp, "forward", lambda self, x: self.down_proj(
            _Stand.apply(self.gate_proj(x), self.up_proj(x)))),
    ]  # fmt: skip
    if what == "all":
        rotate = lambda q, k, *_: (_Stand.apply(q), _Stand.apply(k))  # noqa: E731
        stands.append((source, "apply_rotary_pos_emb", rotate))
    with ExitStack() as stack:
        for owner, name, stand in stands if what else ():
            stack.enter_context(patch.object(owner, name, stand))
        yield


class _Layers:
    """Milliseconds of a model's layers on a card, by tokens."""

    def __init__(self, config: PretrainedConfig, way: Way, card: Card, *, in_4_bits: bool) -> None:
        self.config, self.way, self.card = config, way, card
        self.dtype = torch.bfloat16 if card.has_bf16 else torch.float16
        self.clones = way.copies and in_4_bits  # what peft's forward does to such a layer's output
        # Of 16-bit layers ours never had the copies.
        self.copies = way.copies and (in_4_bits or way.padded)

    def passes(
        self, tokens: int, *, grad: bool = True
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Of one forward and one backward pass, by kind."""
        one, two = (self._traced(tokens, layers, grad) for layers in (1, 2))
        layers = int(self.config.num_hidden_layers)
        forward, backward = (
            {kind: a[kind] + (layers - 1) * (b[kind] - a[kind]) for kind in b}
            for a, b in zip(one, two, strict=True)
        )
        return forward, backward

    def _traced(self, tokens: int, layers: int, grad: bool) -> list[dict[str, float]]:
        model = self._model(layers)
        costs = (_Costs(), _Costs())
        lora = nullcontext() if self.copies else fused_lora(model)
        attention = packed_attention(model, COUNTED_ATTENTION)
        read = batch.policy_input([TokenizedPair(0, [1] * (tokens - 2), [1] * 2, [1] * 2)], True)
        with lora, attention, _fused(model, self.way.fused):
            with costs[0], torch.set_grad_enabled(grad):
                hidden = scored_hidden(model, read.to(torch.device("meta")))
            if grad:
                with costs[1]:
                    hidden.backward(torch.empty_like(hidden))
        found = [self._milliseconds(cost.found) for cost in costs]
        if self.clones:
            moved = sum(2 * 2 * tokens * m.out_features for m in model.modules()
                        if isinstance(m, nn.Linear) and hasattr(m, "lora_A"))  # fmt: skip
            found[0]["elementwise"] += self.moving(moved)
        return found

    def _model(self, layers: int) -> Any:
        config = type(self.config)(**{**self.config.to_dict(), "num_hidden_layers": layers,
                                      "layer_types": None})  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return get_peft_model(model, lora_config(), autocast_adapter_dtype=False).train()

    def _milliseconds(self, found: Counter[tuple[str, int, int]]) -> dict[str, float]:
        taken = dict.fromkeys(("products", "elementwise"), 0.0)
        for (kind, operations, moved), times in found.items():
            taken[kind] += times * max(self.computing(operations), self.moving(moved))
        return taken

    def computing(self, operations: float) -> float:
        """Milliseconds of products."""
        assert self.card.half is not None
        return operations / (_PRODUCTS * self.card.half * 1e9)

    def moving(self, moved: float) -> float:
        """Milliseconds of bytes."""
        assert self.card.bandwidth is not None
        return moved / (_BYTES * self.card.bandwidth * 1e6)


def _head(layers: _Layers, tokens: int, way: Way, *, grad: bool) -> float:
    """Milliseconds of the head on so many scored tokens: float32 logits a chunk at a time.

    Each product, and a write of 4 bytes a logit and a read or two of them by the row kernel, which
    then writes 2 bytes of the derivative.
    """
    config = layers.config
    logits = tokens * int(config.vocab_size)
    product = layers.computing(2 * logits * int(config.hidden_size))
    reads = way.reads if layers.card.has_bf16 else 2
    rows = layers.moving(logits * (4 * reads + 2 if grad else 4))
    products = way.head if grad else 1
    return products * max(product, layers.moving(4 * logits)) + rows


def _plan(name: str, card: str, way: Way) -> Fit:
    """As `estimate` plans it; before, the longest pair decided for all of them."""
    pairs = [TokenizedPair(0, *([1] * n for n in (PROMPT, CHOSEN, REJECTED)))] * 511
    pairs.append(TokenizedPair(0, *([1] * n for n in (PROMPT, LONGEST, LONGEST))))
    fit = estimate(MODELS[name], pairs, gpu=card).fit
    if way.old and fit.checkpointing:
        fit = estimate(MODELS[name], pairs, gpu=card, gradient_checkpointing=True).fit
    return fit


def milliseconds(name: str, card: str, way: Way) -> dict[str, float]:
    """A pair's time by part, and the `pairs` of a micro-step; empty where it doesn't fit."""
    fit, found = _plan(name, card, way), find_card(card)
    if not fit.fits:
        return {}
    policy = PROMPT + CHOSEN + REJECTED - 2
    responses = CHOSEN + REJECTED
    layers = _Layers(MODELS[name], way, found, in_4_bits=fit.weights == "4-bit")
    pairs = way.pairs or min(PAIRS, max(1, fit.max_tokens_planned // policy))
    again = fit.again if way.again is None else way.again
    if way.padded:
        policy = 2 * (PROMPT + max(CHOSEN, REJECTED))
    forward, backward = layers.passes(pairs * policy)
    parts = {
        kind: ((1 + again) * forward[kind] + backward[kind]) / pairs
        for kind in ("products", "elementwise")
    }
    unpacking = 0.0
    if fit.weights == "4-bit":
        weights = fit.parts["weights"]  # of which the layers' are nearly all
        numbers = (weights - 2 * _outside(MODELS[name])) / NF4_BYTES
        unpacking = layers.moving(numbers * (NF4_BYTES + 2))
    parts["dequantise"] = (2 + again) * unpacking / pairs
    parts["head"] = _head(layers, responses, way, grad=True)
    parts["prior"] = 0.0
    if way.prior != "none":
        together = pairs
        if way.prior == "step":
            together = min(PAIRS, max(pairs, fit.max_tokens_no_grad // responses))
        passed, _ = layers.passes(together * responses, grad=False)
        parts["prior"] = (sum(passed.values()) + unpacking) / together
        parts["prior"] += _head(layers, responses, way, grad=False)
    return {**parts, "pairs": pairs}


def _outside(config: PretrainedConfig) -> int:
    """Numbers outside the layers: embeddings and a head of its own."""
    return int(config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2))


def table(found: Sequence[Record]) -> str:
    """The counts in Markdown: a model after the other, a column a card."""
    out = [f"| ms a pair of {PROMPT}+{CHOSEN}+{REJECTED} tokens | {' | '.join(CARDS)} |"]
    out.append("|---|" + "---:|" * len(CARDS))
    at = {(row.shape, row.impl, row.device): row.value for row in found if row.metric == "a pair"}
    for shape in dict.fromkeys(row.shape for row in found):
        for way in WAYS:
            values = [at.get((shape, way.name, f"counted: {card}"), "") for card in CARDS]
            cells = [f"{float(v):.0f}" if str(v)[:1].isdigit() else "-" for v in values]
            out.append(f"| {shape.split(',')[0]}: {way.name} | {' | '.join(cells)} |")
    return "\n".join(out)


def rows(*, quick: bool = False) -> Iterator[Record]:
    """A row for every way, card and model, and of its parts."""
    for name in ("0.5B",) if quick else MODELS:
        for card in CARDS[:1] if quick else CARDS:
            for way in WAYS:
                parts = milliseconds(name, card, way)
                shape = f"{name}, {PROMPT}+{CHOSEN}+{REJECTED} tokens"
                common: dict[str, Any] = {
                    "op": "roofline", "impl": way.name, "shape": shape, "dtype": "16 bits",
                    "device": f"counted: {card}",
                }  # fmt: skip
                if not parts:
                    yield Record(**common, metric="a pair", unit="ms", value="absent: does not fit")
                    continue
                pairs = parts.pop("pairs")
                yield Record(**common, metric="a pair", unit="ms", value=sum(parts.values()))
                for part, taken in parts.items():
                    yield Record(**common, metric=f"of it {part}", unit="ms", value=taken)
                yield Record(**common, metric="micro-step", unit="pairs", value=pairs)
