"""Other packages on the same inputs: trl's SimPO and chunked head, liger, cut-cross-entropy.

Each function returns a callable that runs one step, or raises `Absent` with the reason why it can't
run here; absence is reported as a row, never skipped without a word.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rmipo_lite.bench.authors import IGNORED, PaddedPairs
from rmipo_lite.model import causal_lm

Step = Callable[[], None]


class Absent(RuntimeError):
    """A peer can't run here; the message says why."""


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # a peer's import may fail in any way, and all mean the same
        raise Absent(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---- whole steps ----------------------------------------------------------------------------


class TrlChunkedStep:
    """The authors' step with trl's chunked head in place of the logits: padded, nothing shared."""

    def __init__(self, model: nn.Module) -> None:
        self._logps = trl_logps()
        self.model = model

    def __call__(self, pairs: PaddedPairs, beta: float = 2.0) -> Tensor:
        """The mean RMiPO loss; the caller runs backward."""
        logps = self._means(pairs.input_ids, pairs.attention_mask, pairs.labels)
        with torch.no_grad():
            prior = self._means(pairs.response_ids, pairs.response_mask, pairs.response_labels)
        chosen, rejected = logps.chunk(2)
        pmi_chosen, pmi_rejected = (logps.detach() - prior).chunk(2)
        gamma = 0.3 + 1.3 * torch.exp(-(pmi_chosen - pmi_rejected).clamp(min=0))
        return -logsigmoid(beta * (chosen - rejected) - gamma).mean()

    def _means(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        base = causal_lm(self.model)
        hidden = base.model(input_ids, attention_mask=attention_mask, use_cache=False)[0][:, :-1]
        mask = labels[:, 1:] != IGNORED
        logps = self._logps(hidden[mask], base.lm_head.weight, labels[:, 1:][mask])
        out = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
        return out.masked_scatter(mask, logps).sum(-1) / mask.sum(-1)


def trl_simpo_step(model: nn.Module, pairs: PaddedPairs, tokenizer: Any) -> Step:
    """trl's CPOTrainer with its documented SimPO recipe, fed our padded batch; no prior pass."""
    cpo = _module("trl.experimental.cpo")
    datasets = _module("datasets")
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        args = cpo.CPOConfig(
            folder,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.0,
            simpo_gamma=0.5,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        trainer = cpo.CPOTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )
    half = len(pairs.input_ids) // 2
    batch = {
        f"{side}_{name}": value[rows]
        for side, rows in (("chosen", slice(None, half)), ("rejected", slice(half, None)))
        for name, value in (
            ("input_ids", pairs.input_ids),
            ("attention_mask", pairs.attention_mask),
            ("labels", pairs.labels),
        )
    }

    def step() -> None:
        trainer.compute_loss(model, batch).backward()

    return step


# ---- the head alone: hidden (N, H), weight (V, H), target_ids (N,) -> log-probs with a gradient --

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """Full logits and plain autograd."""
    logits = (hidden @ weight.T).float()
    return -nn.functional.cross_entropy(logits, target_ids, reduction="none")


def trl_logps() -> Logps:
    """trl's DPO head, which goes over the vocabulary in tiles and recomputes them for backward."""
    chunked = _module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk_size = 4096  # vocabulary columns; trl's own call chooses 4096 without Triton

    def logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return chunked.apply(
            hidden, weight, None, target_ids, 1.0, chunk_size, None, 1.0, ("log_probs",)
        )[0]

    return logps


def cut_cross_entropy_logps() -> Logps:
    """Apple's cut-cross-entropy; needs Triton and a GPU."""
    function = _module("cut_cross_entropy").linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return -function(hidden, weight, target_ids, reduction="none")

    return logps


def liger_simpo(compiled: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """liger's chunked SimPO loss: hidden (2P, T, H), weight, labels (2P, T) -> loss ()."""
    loss = _module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss
    module = loss(beta=2.0, gamma=0.5, compute_nll_loss=False, compiled=compiled)

    def simpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return module(weight, hidden, labels)[0]

    return simpo


