"""Other packages on the same inputs: trl's SimPO and chunked head, liger, cut-cross-entropy.

Each function returns a callable that runs one step, or raises `Absent` with the reason why it can't
run here; absence is reported as a row, never skipped without a word.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.authors import IGNORED, PaddedPairs
from benchmarks.rounds import Run
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.ops.reference import accumulate_dtype


class Absent(RuntimeError):
    """A peer can't run here; the message says why."""


def module(name: str) -> Any:
    """Import a peer.

    Raises:
        Absent: it can't be imported here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # a peer's import may fail in any way, and all mean the same
        raise Absent(f"{name}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Of an error's text, which may be empty."""
    return (str(error).splitlines() or [""])[0]


def those_that_run(
    makers: Mapping[str, Callable[[], Run]],
) -> tuple[dict[str, Run], dict[str, str]]:
    """Who could be made and run once, by name; and why the others couldn't."""
    running: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # out of memory, a compiler that is missing, no GPU for Triton
            absent[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            running[name] = run
    return running, absent


# ---- whole steps ----------------------------------------------------------------------------


class TrlChunkedStep:
    """The authors' step with trl's chunked head in place of the logits: padded, nothing shared.

    Only scored positions go through the head, as on a GPU; on the CPU trl itself scores all.
    """

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


def _trainer(home: Any, kind: str, model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    """A trainer of trl's, whose loss alone is wanted."""
    datasets = module("datasets")
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}  # it insists on a dataset
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        args = getattr(home, f"{kind}Config")(
            folder, report_to="none", bf16=False, gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True, **options,
        )  # fmt: skip
        made = getattr(home, f"{kind}Trainer")(
            model=model, args=args, train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )  # fmt: skip
        datasets.enable_progress_bars()
    return made


class TrlSimpoStep:
    """trl's CPOTrainer with its documented SimPO recipe: no prior pass, full logits."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.trainer = _trainer(
            module("trl.experimental.cpo"), "CPO", model, tokenizer,
            loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5,
        )  # fmt: skip
        self.model = model

    def __call__(self, pairs: PaddedPairs) -> Tensor:
        """The mean SimPO loss; the caller runs backward."""
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
        loss: Tensor = self.trainer.compute_loss(self.model, batch)
        return loss


class TrlDpoStep:
    """trl's DPOTrainer: the reference by the adapter switched off in every step, or known."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.trainer = _trainer(module("trl"), "DPO", model, tokenizer)
        self.model = model

    def __call__(self, pairs: PaddedPairs, *, is_known: bool) -> Tensor:
        """The mean DPO loss; the caller runs backward."""
        batch = {
            "input_ids": pairs.input_ids, "attention_mask": pairs.attention_mask,
            "completion_mask": (pairs.labels != IGNORED).long(),
        }  # fmt: skip
        self.trainer.precompute_ref_logps = is_known
        if is_known:
            known = torch.full((len(pairs.input_ids) // 2,), -100.0)
            batch |= {"ref_chosen_logps": known, "ref_rejected_logps": known}
        loss: Tensor = self.trainer.compute_loss(self.model, batch)
        return loss


# ---- the head alone: hidden (N, H), weight (V, H), target_ids (N,) -> log-probs with a gradient --

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """Full logits, in float32 (float64 for float64), and plain autograd."""
    logits = (hidden @ weight.T).to(accumulate_dtype(hidden.dtype))
    return -nn.functional.cross_entropy(logits, target_ids, reduction="none")


def trl_logps() -> Logps:
    """trl's DPO head, which goes over the vocabulary in tiles and recomputes them for backward.

    On a CPU its second product is float32 whatever the input; on a GPU it isn't cast.
    """
    chunked = module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk_size = module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return chunked.apply(
            hidden, weight, None, target_ids, 1.0, chunk_size, None, 1.0, ("log_probs",)
        )[0]

    return logps


def cut_cross_entropy_logps() -> Logps:
    """Apple's cut-cross-entropy; needs Triton and a GPU."""
    function = module("cut_cross_entropy").linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return -function(hidden, weight, target_ids, reduction="none")

    return logps


def liger_simpo(*, compiled: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """liger's chunked SimPO loss: hidden (2P, T, H), weight, labels (2P, T) -> loss ().

    `compiled` is liger's default and right on a GPU. On a CPU it would be inductor's code, which
    takes a minute to make and is not what liger is for.
    """
    loss = module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss
    chunked = loss(beta=2.0, gamma=0.5, compute_nll_loss=False, compiled=compiled)

    def simpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return chunked(weight, hidden, labels)[0]

    return simpo
