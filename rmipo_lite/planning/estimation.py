"""`estimate(model, dataset, gpu=...)`: memory and time of a run before anything is loaded.

What train() would do on a card is decided by the functions that decide it in a run (`wants_4bit`,
`budget.choose_budget`), with the numbers that the automatic budget takes (footprint.py). Times are
floating-point operations over a share of the card's speed: an order of magnitude, not a promise.
"""

import copy
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.lora import Adapter, adapter_config, lora_config
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.model import names
from rmipo_lite.model.loading import load_config
from rmipo_lite.model.model_files import ADAPTER_CONFIG, existing_folder, named_errors
from rmipo_lite.ops import CPU_BUFFER_BYTES, PLAIN_BUFFER_BYTES, card_buffer_bytes
from rmipo_lite.ops.devices import accelerator, has_native_bf16
from rmipo_lite.planning import quantization
from rmipo_lite.planning.budget import MicroStepPlan, choose_budget
from rmipo_lite.planning.cards import COMMON, Card, find_card
from rmipo_lite.planning.device import free_bytes, name_of, total_bytes
from rmipo_lite.planning.estimation_view import Estimate, Fit
from rmipo_lite.planning.footprint import Setup, Weights, optimizer_width, weights_of
from rmipo_lite.planning.half_range import is_beyond_half
from rmipo_lite.planning.several_cards import ALONE, Layout, layouts_of
from rmipo_lite.planning.workload import Workload, shortened, workload
from rmipo_lite.tokens.options import options_for

CPU = "cpu"
# What a process takes on a card before its first tensor: CUDA's context, kernels, workspaces.
_CONTEXT_BYTES = 2**29
# Of what a product alone reaches on the card (cards.csv), what a whole step does: a layer's forward
# and backward reach 0.23 to 0.48 (GPT-2) and 0.59 to 0.77 (BERT) of it on five cards, by the table
# of mli/transformers-benchmarks; the rest is norms, activations and attention. And on a CPU.
_CARD_UTILISATION, _CPU_UTILISATION = 0.45, 0.7
# Of a card's memory, what tensors may take: the rest is the allocator's fragments.
_USABLE = 0.95
_SHORTER = (1024, 768, 512, 384, 256, 128)
_BEYOND_HALF = "without bf16, weights and hidden states of this family are float32, products fp16"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def estimate(
    model: str | os.PathLike[str] | PretrainedConfig | nn.Module,
    dataset: Any = None,
    *,
    gpu: str | float | None = None,
    num_gpus: int = 1,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    quantization: quantization.Quantization = "auto",
    peft_config: Adapter = "auto",
    **config: Any,
) -> Estimate:
    """What training would take: memory by part, time per epoch, and which cards it fits.

    Args:
        model: a name or folder (its config is read, no weight), a config, or a model.
        dataset: as for `train`, or a list of `TokenizedPair`; None assumes 10,000 pairs of 200 +
            300 + 274 tokens, the longest of them with both sides as long as `max_length` allows,
            and says so.
        gpu: a card ("RTX 3060 12GB", "T4", "M2 Max 64GB"), a memory ("12GB"), memory, speed in 16
            bits and bandwidth ("24GB 165TFLOPS 1TB/s"), or "cpu"; None is this machine's card, or
            its CPU.
        num_gpus: such cards, which share every step; from 2 on both layouts are told of: each the
            whole model, and FSDP2. A card must be named for it.
        split: which split of the dataset, as for `train`.
        tokenizer: of the dataset, itself or its folder; None loads the model's.
        quantization: "auto", "none" or "4bit", as for `train`.
        peft_config, **config: as for `train`.

    Returns:
        Estimate: prints as text, shows as tables; `.to_pandas()`, `.plot()`, and `.settings`, the
        options of `train` that make it fit. Bytes are those of the tensors in use at the fullest
        moment.

    Raises:
        ValueError: an unknown card, model, dataset or option; the message says which.
    """
    if quantization not in ("auto", "none", "4bit"):
        raise ValueError(f"quantization: wanted 'auto', 'none' or '4bit', got {quantization!r}")
    if not isinstance(num_gpus, int) or num_gpus < 1:
        raise ValueError(f"num_gpus must be a whole number >= 1, got {num_gpus!r}")
    precision = {name: bool(config.pop(name, False)) for name in ("bf16", "fp16")}
    if all(precision.values()):
        raise ValueError("bf16, fp16: wanted one of them, got both")
    if isinstance(peft_config, str) and peft_config not in ("auto", "new"):
        raise ValueError(
            f"peft_config must be 'auto', 'new', None or a peft config, got {peft_config[:80]!r}"
        )
    for name in ("use_cpu", "output_dir"):  # of a run, and a run's options may come as they are
        config.pop(name, None)
    args = RMiPOConfig("rmipo-estimate", use_cpu=True, **config)
    if split is not None:
        dataset = load_rows(dataset, split=split, unpaired=args.loss.unpaired)
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    shape = _config_of(model)
    name = model if isinstance(model, str) else str(shape.name_or_path or type(shape).__name__)
    adapter = _adapter_of(model, peft_config, args)
    case = _Case(
        shape,
        args,
        adapter,
        quantization,
        precision,
        workload(name, shape, dataset, tokenizer, args),
    )
    card = _card_of(gpu)
    if num_gpus > 1 and card.kind == CPU:
        raise ValueError(f"num_gpus={num_gpus} needs a card: gpu='RTX 4090', for example")
    return Estimate(
        model=names.short_name(name) if isinstance(model, str) else name,
        note=case.work.note,
        pairs=case.work.pairs,
        pairs_per_step=args.pairs_per_step,
        tokens=case.work.policy * (1 + args.loss.needs_reference + 2 * args.loss.needs_logits)
        + (case.work.prior if args.uses_prior else 0),
        fit=case.on(card),
        cards=[case.on(find_card(common)) for common in COMMON],
        num_gpus=num_gpus,
        layouts=[case.on(card, layout) for layout in layouts_of(num_gpus) if num_gpus > 1],
    )


def _config_of(model: str | PretrainedConfig | nn.Module) -> PretrainedConfig:
    if isinstance(model, PretrainedConfig):
        return model
    return load_config(model) if isinstance(model, str) else causal_lm(model).config


def _adapter_of(
    model: str | PretrainedConfig | nn.Module, peft_config: Adapter, args: RMiPOConfig
) -> PeftConfig | None:
    """The adapter that `train` would go on with, or attach."""
    config = adapter_config(peft_config, args)
    if peft_config == "auto" and isinstance(model, PeftModel):
        own: PeftConfig = model.active_peft_config
        return own
    folder = existing_folder(model) if isinstance(model, str) else None
    if peft_config == "auto" and folder is not None and (folder / ADAPTER_CONFIG).is_file():
        with named_errors("adapter", str(model), "Wanted a folder that holds an adapter"):
            return PeftConfig.from_pretrained(str(folder))
    return lora_config() if isinstance(config, str) else config


def _card_of(gpu: str | float | None) -> Card:
    kind = accelerator() if gpu is None else None
    if kind == "cuda":
        real = torch.cuda.get_device_properties(torch.cuda.current_device())
        capability = real.major + real.minor / 10
        if torch.version.hip:  # AMD counts otherwise
            capability = 8.0 if has_native_bf16(kind) else 7.0
        return replace(
            _known(real.name, real.total_memory),
            memory=real.total_memory, cache=real.L2_cache_size, capability=capability,
        )  # fmt: skip
    if kind is not None:
        device, bf16 = torch.device(kind), has_native_bf16(kind)
        known = _known(name_of(device), total_bytes(device))
        return replace(
            known,
            name=name_of(device),
            memory=total_bytes(device),
            capability=8.0 if bf16 else 0.0,
            kind=kind,
        )
    if gpu is None or str(gpu).lower() == CPU:
        return Card(CPU, free_bytes(torch.device(CPU)), None, None, None, 0, 0.0, CPU)
    return find_card(gpu)


def _known(name: str, memory: int) -> Card:
    """The card of the table; one that isn't in it has no known speed."""
    try:
        return find_card(name, memory)
    except ValueError:
        return Card(name, memory, None, None, None, 0, 0)


@dataclass
class _Case:
    """A run, to be put on one card after another."""

    shape: PretrainedConfig
    args: RMiPOConfig
    adapter: PeftConfig | None
    quantization: str
    precision: dict[str, bool]  # bf16 or fp16, where the caller asked for it
    work: Workload

    def on(self, card: Card, layout: Layout = ALONE) -> Fit:
        """What `train` would do on this card, or on several of it, and whether it fits."""
        setup = self._setup(card, layout)
        fit = self._fit(card, setup, self.args, self.work, layout)
        return fit if fit.fits else replace(fit, way_out=self._way_out(card, setup, layout))

    def is_beyond_half(self, card: Card) -> bool:
        """Whether the card would take float16, and the model's numbers don't fit it."""
        no_bf16 = card.kind == "cuda" and not card.has_bf16
        return no_bf16 and is_beyond_half(self.shape) and not any(self.precision.values())

    def _setup(self, card: Card, layout: Layout) -> Setup:
        on_cuda = card.kind == "cuda"
        dtype = torch.float16 if on_cuda else torch.float32
        if card.has_bf16:
            dtype = torch.bfloat16
        elif self.is_beyond_half(card) or layout.shards:  # FSDP2 isn't done in float16
            dtype = torch.float32
        if self.precision["bf16"]:
            dtype = torch.bfloat16
        elif self.precision["fp16"]:
            dtype = torch.float16
        setup = Setup(dtype, self.adapter)
        if self.quantization == "auto" and on_cuda and self.adapter is not None:
            shared_by = layout.cards if layout.shards else 1
            weights = weights_of(self.shape, setup).loaded_bytes(setup, shared_by)
            free = card.memory - _CONTEXT_BYTES
            return replace(setup, quantized=quantization.wants_4bit(weights, free))
        return replace(setup, quantized=self.quantization == "4bit")

    def _fit(
        self, card: Card, setup: Setup, args: RMiPOConfig, work: Workload, layout: Layout
    ) -> Fit:
        weights, work = weights_of(self.shape, setup), layout.share(work)
        layers = int(self.shape.get_text_config().num_hidden_layers)
        parts = layout.parts(self._parts(card, setup, weights), weights, setup, layers)
        taken = sum(parts.values())
        plan = choose_budget(
            self.shape,
            setup,
            card.kind,
            free=card.memory - taken,
            longest=work.longest,
            args=args,
            is_sharded=layout.shards,
        )
        checkpointing = plan.checkpointing
        least = int(taken + checkpointing.least.bytes_of(work.longest))
        tokens = min(plan.max_tokens, work.step)
        room = _USABLE * card.memory - taken
        if checkpointing.bytes_of(tokens) > room:  # a run would halve its micro-steps
            tokens = max(1, min(tokens, checkpointing.least.tokens_in(room)))
        activations = max(map(checkpointing.bytes_of, (tokens, work.longest)))
        micro_steps, again = _micro_steps(plan, work, tokens)
        steps = math.ceil(work.pairs / args.pairs_per_step)
        prior_passes = max(steps, work.prior / plan.max_tokens_no_grad) if args.uses_prior else 0
        passes = (2 + again) * micro_steps + prior_passes
        seconds = _seconds(card, setup, weights, self, again, passes, tokens)
        sent = layout.seconds_sent(card, setup, weights, work, steps, tokens)
        return Fit(
            card=card.name,
            memory=card.memory,
            weights="4-bit" if setup.quantized else _NAMES[setup.dtype],
            checkpointing=again > 0,
            again=again,
            max_tokens=max(work.longest, tokens),
            max_tokens_planned=tokens,
            max_tokens_no_grad=plan.max_tokens_no_grad,
            parts={**parts, "activations": int(activations)},
            least=least,
            fits=least <= _USABLE * card.memory,
            seconds=None if seconds is None else seconds / layout.cards + sent,
            counted=checkpointing.kept.counted,
            note=_BEYOND_HALF if self.is_beyond_half(card) else "",
            layout=layout.name,
            sent=sent,
        )

    def _parts(self, card: Card, setup: Setup, weights: Weights) -> dict[str, int]:
        """Bytes that are there whatever the tokens."""
        width = optimizer_width(str(getattr(self.args.optim, "value", self.args.optim)))
        vocab_size = int(self.shape.get_text_config().vocab_size)
        if card.kind == "cuda":
            head = card_buffer_bytes(vocab_size, card.cache, card.memory)
        else:
            head = CPU_BUFFER_BYTES if card.kind == CPU else PLAIN_BUFFER_BYTES
        # Trained in full, the start is kept on the CPU, and the model's own weights beside the
        # reference's while these are in their place.
        is_kept = setup.peft_config is None and self.args.reference_goes_on
        copies = (2 if card.kind == CPU else 1) * is_kept
        return {
            "weights": weights.loaded_bytes(setup),
            "adapter": weights.adapter_bytes(setup),
            "gradients": weights.gradient_bytes(setup),
            "optimizer": width * weights.trained,
            "reference": copies * weights.trained * setup.dtype.itemsize,
            "head": head,
            "dequantisation": weights.dequantised_bytes(setup),
            "context": 0 if card.kind == CPU else _CONTEXT_BYTES,
        }

    def _way_out(self, card: Card, setup: Setup, layout: Layout) -> dict[str, Any] | None:
        """The least that has to be changed for it to fit; None where nothing helps."""
        found: dict[str, Any] = {}
        if not setup.quantized and card.kind == "cuda":
            setup, found = replace(setup, quantized=True), {"quantization": "4bit"}
        elif card.kind not in (CPU, "cuda") and setup.dtype == torch.float32:
            setup, found = replace(setup, dtype=torch.bfloat16), {"bf16": True}
        args = self.args
        if not args.wants_checkpointing and not args.checkpointing_is_open:
            args, found = copy.copy(args), {**found, "gradient_checkpointing": True}
            args.gradient_checkpointing = True
        if found and self._fit(card, setup, args, self.work, layout).fits:
            return found
        longest = options_for(args, self.shape).max_length or self.work.longest
        shorter_ones = [length for length in _SHORTER if length < longest and self.work.lengths]
        for shorter in shorter_ones:
            work = shortened(self.work, shorter, args)
            if self._fit(card, setup, args, work, layout).fits:
                return {**found, "max_length": shorter}
        return None


def _micro_steps(plan: MicroStepPlan, work: Workload, tokens: int) -> tuple[float, float]:
    """Micro-steps of an epoch, and of their passes the share that is computed again.

    A pair of more than `tokens` has one of its own.
    """
    checkpointing = plan.checkpointing
    alone = [length for length in work.each if length > tokens]
    together = sum(work.each) - sum(alone)
    again = sum(length * checkpointing.layers_of(length) for length in alone)
    again += together * checkpointing.layers_of(tokens)
    return len(alone) + together / tokens, again / checkpointing.layers / sum(work.each)


def _seconds(
    card: Card,
    setup: Setup,
    weights: Weights,
    case: _Case,
    again: float,
    passes: float,
    tokens: int,
) -> float | None:
    """Seconds of an epoch, from operations and, of 4-bit weights, bytes moved.

    Of so many passes through the layers; `again` is the share of the forward ones made twice.
    """
    if card.name == CPU:
        speed = _CPU_UTILISATION * _cpu_speed(setup.dtype)
    else:
        in_hardware = card.has_bf16 if setup.dtype == torch.bfloat16 else True
        in_16_bits = setup.dtype.itemsize == 2 or case.is_beyond_half(card)
        tflops = card.half if in_16_bits and in_hardware else card.single
        if tflops is None:
            return None
        speed = _CARD_UTILISATION * tflops * 1e12
    work = case.work
    prior = work.prior if case.args.uses_prior else 0
    forward = 2 * weights.layers
    # Backward: of the inputs, and of the weights where they are trained; again where checkpointed.
    backward = forward * (1 if setup.peft_config is not None else 2) + forward * again
    adapter = 0 if setup.peft_config is None else 2 * weights.trained
    operations = work.policy * (forward + backward + 3 * adapter) + prior * (forward + adapter)
    operations += 2 * weights.head * (2 * work.scored + prior)  # logits, and their derivative
    # Without gradients: the reference, and a step's pairs together where micro-steps cut them.
    loss = case.args.loss
    asks = loss.needs_logits
    more = loss.needs_reference + asks + (loss.of_the_step and (asks or work.step > tokens))
    operations += more * (work.policy * (forward + adapter) + 2 * weights.head * work.scored)
    seconds = operations / speed
    if setup.quantized and card.bandwidth:
        moved = weights.layers * (0.5 + 2 * setup.dtype.itemsize)  # read, written, read again
        seconds += passes * moved / (card.bandwidth * 1e9)
    return float(seconds)


def _cpu_speed(dtype: torch.dtype) -> float:
    """Operations a second of one product of medium size, measured now."""
    a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    torch.mm(a, b)
    runs, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < 0.05:
        torch.mm(a, b)
        runs += 1
    return runs * 2 * 512 * 1024 * 1024 / taken
