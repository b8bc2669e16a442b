"""What a run scores before its first step and keeps: cached priors, the reference's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from rmipo_lite.adapters.start import Weights, has_averages, trained_weights
from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.unpaired import weights_advice
from rmipo_lite.methods.table import method_named
from rmipo_lite.model import batch, loading
from rmipo_lite.output.console import say
from rmipo_lite.step.losses import memory_of, pairs_digest
from rmipo_lite.step.make import make_step
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.reference import Reference
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.refusals import refuse_other_vocabulary
from rmipo_lite.watch.progress import phase

_AT_ONCE = 256  # pairs between two lines of progress

RefModel = str | PreTrainedModel | None


class _MoveReference(TrainerCallback):
    """`ref_sync_steps`: after an optimizer step, before its evaluation and its save, as trl's."""

    def __init__(self, step: PairStep) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reference = self._step.reference
        if reference is not None and state.global_step % args.ref_sync_steps == 0:
            reference.move(args.ref_sync_alpha)


def say_uneven_labels(pairs: Sequence[TokenizedPair], args: RMiPOConfig) -> None:
    """Of unpaired rows: say where one label outweighs the other, and what would even them out."""
    if not (args.loss.unpaired and pairs):
        return
    labels = [bool(pair.label) for pair in pairs]
    weights = args.desirable_weight or 0.0, args.undesirable_weight or 0.0
    advice = weights_advice(labels, *weights)
    if advice is not None:
        say(f"WARNING: {advice}")


class KnowsBefore(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases."""

    pair_step: PairStep
    start: Weights | None
    train_dataset: Any
    eval_dataset: Any
    _prior_front: Sequence[int]
    _tokenizer: Any

    def make_reference(self, ref_model: RefModel, pairs: Sequence[TokenizedPair]) -> None:
        """Give the step its reference, where the method measures from one.

        Raises:
            ValueError: a model is given and the method has no use for it, or its vocabulary is
                another one.
        """
        args: RMiPOConfig = self.args
        step, is_live, moves = self.pair_step, args.reference == "live", bool(args.ref_sync_steps)
        if not args.loss.needs_reference:
            if ref_model is not None:
                raise ValueError(
                    f"ref_model: loss_type={args.loss_type!r} measures from no reference model"
                )
            return
        if ref_model is not None:
            if moves:
                raise ValueError("ref_sync_steps moves the model's own start; leave ref_model out")
            step.reference = Reference(self._as_reference(ref_model, pairs), {})
            return
        if moves and args.ref_sync_alpha < 1 and not has_averages(self.model):
            raise ValueError(
                f"ref_sync_alpha={args.ref_sync_alpha} averages weights, which this adapter's "
                "aren't made for; 1.0, LoRA without DoRA or full training are"
            )
        start = self.start
        if start is None and args.reference_goes_on:
            start = trained_weights(self.model)  # trained in full: a copy, on the CPU
        step.reference = Reference(step, start, is_live=is_live)
        if moves:
            cast(Any, self).add_callback(_MoveReference(step))

    def _as_reference(self, ref_model: str | PreTrainedModel, pairs: Any) -> PairStep:
        loaded: nn.Module = (
            loading.load_model(ref_model, self.args, None)
            if isinstance(ref_model, str)
            else ref_model
        )
        if loaded is self.model:
            raise ValueError(
                "ref_model is the model that is trained; leave it out: the reference then is that "
                "model as it came to the run"
            )
        refuse_other_vocabulary(pairs, loaded, self._tokenizer)
        if not isinstance(getattr(loaded, "hf_device_map", None), dict):
            loaded.to(self.args.device)
        return make_step(
            loaded, self.args, pairs, tokenizer=self._tokenizer, autocast=self.pair_step.autocast
        )

    def know_reference(self) -> None:
        """Score every pair of training and evaluation by the reference, once."""
        reference = self.pair_step.reference
        if reference is None or self.args.reference == "live" or self.args.ref_sync_steps:
            return
        named = (
            self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        )
        pairs = [pair for part in (self.train_dataset, *named.values()) for pair in part or []]
        missing = reference.missing(pairs)
        if not missing:
            return
        with phase(cast(Any, self), "scoring by the reference", len(missing), "pairs") as advance:
            for begin in range(0, len(missing), _AT_ONCE):
                reference.know(missing[begin : begin + _AT_ONCE])
                advance(min(begin + _AT_ONCE, len(missing)))

    def forget(self) -> None:
        """A new run has no cached priors and remembers no step, unless a checkpoint says so."""
        self.pair_step.memory = memory_of(self.args)
        self.pair_step.prior_cache = None
        self._priors_of = ""  # digest of the pairs they are of; empty where nobody knows
        self._priors_are_ready = False
        self._scored_at: dict[int, int] = {}  # row -> step, of prior="refresh:K"

    def fill_prior_cache(self, coming: Sequence[TokenizedPair]) -> int:
        """Ahead of a step: what the cache lacks. Returns the tokens scored for this step.

        Before the first step that is the prior of every training pair under the untrained policy,
        which no step counts; with `prior="refresh:K"` that of the coming pairs of which nothing
        newer is known.
        """
        if not self._priors_are_ready:
            self._look_at_cached_priors()
        step, every = self.pair_step, self.args.prior_refresh
        if every is None:
            if step.prior_cache is None:
                pairs = cast(list[TokenizedPair], self.train_dataset)
                step.prior_cache = step.prior_means(pairs)
            return 0
        now, at = int(self.state.global_step), self._scored_at
        old = [pair for pair in coming if pair.row not in at or now - at[pair.row] >= every]
        if step.prior_cache is None:
            step.prior_cache = {}
        if old:
            step.prior_cache |= step.prior_means(old)
            at |= {pair.row: now for pair in old}
        return sum(sum(batch.prior_lengths(pair, self._prior_front)) for pair in old)

    def refuse_later_prior(self, name: str, state: dict[str, Any]) -> None:
        """Before a run goes on from a checkpoint with `prior="cached"`.

        That is the prior of the model before training, which is there in the checkpoint or nowhere.

        Raises:
            CheckpointError: it has none, or one of another `prior_context`.
        """
        options, args = state.get("options", {}), self.args  # no options in those of 0.1.0
        was, context = options.get("prior"), options.get("prior_context")
        loss_type = options.get("loss_type", args.loss_type)
        if state["prior_cache"] is not None and not state.get("priors_scored_at"):
            if state.get("priors_of", "") in ("", self._digest_of_priors()):
                return
            there = f"prior_context was {context!r} there and is {args.prior_context!r} here, and"
        elif not method_named(loss_type).needs_prior:
            there = f"loss_type was {loss_type!r}, which has no prior, there and prior is 'cached'"
            there += " here,"
        elif was is None or was == "cached":
            there = "no prior was cached there and prior is 'cached' here,"
        else:
            there = f"prior was {was!r} there and is 'cached' here,"
        raise CheckpointError(
            f"{name}: {there} a cached prior is that of the model before training; go on with "
            f"prior={'live' if was in (None, 'cached') else was!r}"
        )

    def _digest_of_priors(self) -> str:
        digest = pairs_digest(cast(list[TokenizedPair], self.train_dataset))
        return f"{digest} behind {list(self._prior_front)}" if self._prior_front else digest

    def _look_at_cached_priors(self) -> None:
        """Forget a checkpoint's that are of other pairs."""
        digest = self._digest_of_priors()
        known = self.pair_step.prior_cache is not None
        if known and self._priors_of not in ("", digest):
            say("The checkpoint's cached priors are of other pairs or another prior_context: anew")
            self.pair_step.prior_cache, self._scored_at = None, {}
        self._priors_of, self._priors_are_ready = digest, True

    def known_state(self) -> dict[str, Any]:
        """Of a checkpoint, as JSON."""
        cache, reference = self.pair_step.prior_cache, self.pair_step.reference
        memory = self.pair_step.memory
        return {
            "priors_of": self._priors_of,
            "prior_cache": None if cache is None else [[row, *cache[row]] for row in sorted(cache)],
            "priors_scored_at": sorted(self._scored_at.items()),
            "reference": {} if reference is None else dict(sorted(reference.known.items())),
            "reference_start": reference.start if reference and self.args.ref_sync_steps else None,
            "memory": None if memory is None else [self.args.loss_type, memory.now],
        }

    def load_known_state(self, state: dict[str, Any]) -> None:
        """Go on with what the checkpoint knows: its run's reference is this one's."""
        cache = state["prior_cache"]
        self._priors_of = state.get("priors_of", "")  # absent in checkpoints of version 0.1.0
        if cache is not None and self.args.prior != "live":
            self.pair_step.prior_cache = {
                int(row): (side_w, side_l) for row, side_w, side_l in cache
            }
            at = state.get("priors_scored_at", [])  # likewise
            self._scored_at = {int(row): int(step) for row, step in at}
        method, values = state.get("memory") or ("", {})  # absent in older checkpoints
        if self.pair_step.memory is not None and method == self.args.loss_type:
            self.pair_step.memory.now = values
        moved = state.get("reference_start")  # likewise
        if moved is not None and self.pair_step.reference is not None:
            self.pair_step.reference.start = moved
        self.load_reference(state)

    def load_reference(self, state: dict[str, Any]) -> None:
        """Likewise of the reference alone; nothing where the checkpoint has none."""
        reference = self.pair_step.reference
        if reference is not None and self.args.reference == "cached":
            known = state.get("reference", {})  # absent in older checkpoints
            reference.known |= {
                key: (chosen, rejected) for key, (chosen, rejected) in known.items()
            }
