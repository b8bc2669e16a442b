"""One optimizer step's forward and backward passes over a list of pairs.

A step's pairs are cut into micro-steps by a token budget, and every micro-step is weighted by its
share of the pairs: the gradient is that of the mean over the step's pairs whatever the cut. A step
that isn't finite is thrown away as a whole and its pairs are run one by one to find the culprit:
masking it would not do, since 0 * NaN is NaN in the adapter's gradient. Where memory runs out, what
was accumulated is thrown away and the pairs start again (`micro_steps`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rmipo_lite.checkpoints.random_state import random_state, set_random_state
from rmipo_lite.methods.memory import Memory
from rmipo_lite.methods.sums import sequence_sums
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import (
    device_of,
    evaluating,
    scored_hidden,
)
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead, end_nll, read_head
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import is_sharded
from rmipo_lite.step.gradients import clear_gradients, is_finite, void_gradients
from rmipo_lite.step.losses import (
    SideMeans,
    cached_prior,
    chosen_token_nll,
    labels_of,
    losses,
    side_means,
)
from rmipo_lite.step.micro_steps import MicroSteps
from rmipo_lite.step.neftune import embedding_noise
from rmipo_lite.step.pair_values import PairValues, StepOutcome
from rmipo_lite.step.reference import Reference
from rmipo_lite.step.together import Sums, evaluated_by_all, outcome_of_all, solved_of, sums_of
from rmipo_lite.tokens.pair import TokenizedPair

T = TypeVar("T")
Backward = Callable[[Tensor], None]
PriorOf = Callable[[Sequence[TokenizedPair]], tuple[Tensor, Tensor]]
# By row, of pairs, the hidden rows (N, H) that predict their scored tokens, head and input.
Reader = Callable[[Sequence[TokenizedPair], Tensor, ModelHead, ModelInput], Mapping[int, T]]
Sides = tuple[Tensor, Tensor]  # token log-probs of a pair's chosen and rejected response


@dataclass
class PairStep(MicroSteps):
    """Runs pairs through model, head and loss."""

    prior_front: Sequence[int] = ()  # ids before a bare response, by `prior_context`
    pad_id: int = 0
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    prior_cache: SideMeans | None = None  # prior="cached": used by training steps only
    weights: Mapping[int, float] | None = None  # of pairs by row, in training; None: all alike
    reference: Reference | None = None  # of methods that measure from one
    memory: Memory | None = None  # of methods that have one
    end_id: int | None = None  # the token that ends an answer, for `end_anchor`
    _solved: Mapping[int, Tensor] | None = None  # by row, of methods whose pairs aren't apart
    _noise_seed: int | None = None  # of the training step in progress, with NEFTune
    _step_prior: Mapping[int, Sides] | None = None  # of the same step, by row

    def train(self, pairs: Sequence[TokenizedPair], backward: Backward) -> StepOutcome:
        """Accumulate the gradient of the mean loss over the pairs that are finite.

        Where none is, every gradient is left as None, which makes the optimizer's step do nothing.
        """
        drawn = random_state()  # a step repeated draws the same dropout
        outcome = self._accumulate(pairs, backward)
        if self._is_finite(outcome):
            return self._kept(outcome)
        good: list[TokenizedPair] = []
        dropped: list[TokenizedPair] = []
        for pair in pairs:
            clear_gradients(self.model)
            finite = self._is_finite(self._accumulate([pair], backward))
            (good if finite else dropped).append(pair)
        clear_gradients(self.model)
        if good:  # all of them, if what went wrong was no pair's fault and is over
            set_random_state(drawn)
            outcome = self._accumulate(good, backward)
        if not good or not self._is_finite(outcome):
            # Finite one by one and not together, or nothing left: the step as a whole is dropped.
            void_gradients(self.model, bool(self.args.fp16))
            nothing = torch.zeros((), device=device_of(self.model))
            return StepOutcome(loss=nothing, dropped=list(pairs))
        outcome.dropped = dropped
        return self._kept(outcome)

    def _kept(self, outcome: StepOutcome) -> StepOutcome:
        """This step counts: the method remembers it."""
        if self.memory is not None:
            self.memory.commit()
        return outcome

    def put_back(self) -> AbstractContextManager[None]:
        """Steps inside the block are tries, which the method doesn't remember."""
        return nullcontext() if self.memory is None else self.memory.put_back()

    @torch.no_grad()
    def evaluate(
        self, pairs: Sequence[TokenizedPair]
    ) -> Iterator[tuple[list[TokenizedPair], PairValues]]:
        """Pairs and their values without a gradient, micro-step by micro-step, longest first."""
        self._know_reference(pairs)
        with self._solved_for(pairs):
            found = self._in_parts(pairs, lambda part: self._forward(part, self._live_prior)[0])
            if self.group.size == 1:
                yield from found
                return
            own = self._agreed(lambda: list(found))
            like = torch.zeros((), device=device_of(self.model))
            yield list(pairs), evaluated_by_all(self.group, own, pairs, like)

    @torch.no_grad()
    def prior_means(self, pairs: Sequence[TokenizedPair]) -> SideMeans:
        """Mean prior log-prob of both sides of every pair, for `prior="cached"`."""

        def own() -> SideMeans:
            means: SideMeans = {}
            for part, scored in self._in_parts(pairs, self._live_prior, batch.bare):
                means |= side_means(part, *scored)
            return means

        return self.group.merged(self._agreed(own))

    @torch.no_grad()
    def of_responses(self, pairs: Sequence[TokenizedPair], read: Reader[T]) -> dict[int, T]:
        """What `read` makes, by row, of the states of all pairs; nothing random is drawn."""

        def own() -> dict[int, T]:
            parts = self._in_parts(pairs, lambda part: read(part, *self._passed(part)))
            return {row: made for _, found in parts for row, made in found.items()}

        with evaluating(self.model):
            return self.group.merged(self._agreed(own))

    @torch.no_grad()
    def response_sums(
        self, pairs: Sequence[TokenizedPair]
    ) -> list[tuple[TokenizedPair, tuple[float, float]]]:
        """Pairs with both sides' log-probs, summed as the run's method sums them."""
        place = {id(pair): number for number, pair in enumerate(pairs)}  # rows of two sets can meet

        def own() -> dict[int, tuple[float, float]]:
            found: dict[int, tuple[float, float]] = {}
            for part, (logps, borders) in self._in_parts(pairs, self._scored):
                sums = sequence_sums(logps, borders, self.args.ld_alpha).tolist()
                sides = zip(sums[0::2], sums[1::2], strict=True)
                found |= {place[id(pair)]: both for pair, both in zip(part, sides, strict=True)}
            return found

        with evaluating(self.model):
            found = self.group.merged(self._agreed(own))
        return [(pairs[number], sides) for number, sides in found.items()]

    def _know_reference(self, pairs: Sequence[TokenizedPair]) -> None:
        if self.reference is not None:
            self.reference.know(pairs)

    def _accumulate(self, pairs: Sequence[TokenizedPair], backward: Backward) -> StepOutcome:
        """Forward and backward over all pairs, each process its share; the outcome of all."""
        self._know_reference(pairs)  # not between the micro-steps: it has other weights
        if self.args.neftune_noise_alpha:
            self._noise_seed = int(torch.randint(2**31, ()))
        try:
            cached = self.prior_cache or {}
            if self.args.uses_prior and any(pair.row not in cached for pair in pairs):
                self._step_prior = self._prior_of_step(pairs)
            with self._solved_for(pairs):
                outcome = self._agreed(
                    lambda: self._retried(lambda: self._accumulate_once(pairs, backward))
                )
        finally:
            self._noise_seed = self._step_prior = None
        return outcome_of_all(self.group, self.model, outcome, pairs, self.weights)

    def _accumulate_once(self, pairs: Sequence[TokenizedPair], backward: Backward) -> StepOutcome:
        outcome = StepOutcome(
            loss=torch.zeros((), device=device_of(self.model)), num_pairs=len(pairs)
        )
        with self._solved_for(pairs):  # micro-steps may have become several since
            self._backward_over(pairs, backward, outcome)
        return outcome

    def _backward_over(
        self,
        pairs: Sequence[TokenizedPair],
        backward: Backward,
        outcome: StepOutcome,
    ) -> None:
        num_chosen = sum(batch.scored_lengths(pair)[0] for pair in pairs)
        own = self._shared(pairs)
        fillers = self._fillers(pairs, len(own))
        for number, part in enumerate((*own, *fillers)):
            self._running, is_filler = part, number >= len(own)
            # The backward pass inside the block: checkpointing runs the forward pass again.
            prior_of = self._no_prior if is_filler else self._prior
            with self._engaged(part):
                values, pair_losses, chosen_nll, num_tokens, ends = self._forward(part, prior_of)
                weights = torch.tensor(self._weights_of(part), dtype=pair_losses.dtype)
                weighted = weights.to(pair_losses.device) * pair_losses
                # Not by the step's own weights: of a single pair its weight would drop out.
                micro_loss = weighted.sum() / len(pairs)
                if self.args.sft_weight:
                    micro_loss = micro_loss + self.args.sft_weight * chosen_nll / num_chosen
                backward(0.0 * micro_loss if is_filler else micro_loss)
            if is_filler:
                continue
            outcome.loss += micro_loss.detach().to(outcome.loss.dtype)
            outcome.values.append(values)
            outcome.rows += [pair.row for pair in part]
            outcome.weights += self._weights_of(part)
            outcome.end_nll += [] if ends is None else [ends]
            outcome.num_tokens += num_tokens

    def _forward(
        self, pairs: Sequence[TokenizedPair], prior_of: PriorOf
    ) -> tuple[PairValues, Tensor, Tensor, int, Tensor | None]:
        """(values, loss per pair (P,), summed chosen nll (), tokens read, the ends' nll (P,)).

        The loss holds the anchor of the end where a gradient is wanted: an evaluation's is bare.
        """
        with self._noise(pairs):
            hidden, head, policy = self._passed(pairs)
        token_logps = head.token_logps(hidden, policy.target_ids, self.args.kernel_impl)
        prior = None
        num_tokens = policy.num_tokens
        if self.args.uses_prior:
            prior = prior_of(pairs)
            is_cached = self._step_prior is None and self.prior_cache is not None
            num_tokens += 0 if is_cached else prior[0].shape[0]
        reference = None if self.reference is None else self.reference.sums(pairs)
        solved = None if self._solved is None else torch.stack([self._solved[p.row] for p in pairs])
        out, rewards = losses(
            token_logps, policy.cu_seqlens, prior, self.args, reference, solved, self.memory,
            labels := labels_of(pairs),
        )  # fmt: skip
        nll = chosen_token_nll(token_logps, policy.cu_seqlens)
        pair_losses, ends, c = out.loss, None, self.args.end_anchor
        if c and self.end_id is not None and torch.is_grad_enabled():
            lengths = [batch.scored_lengths(pair) for pair in pairs]
            ends = end_nll(head, hidden, token_logps, policy.target_ids, lengths, self.end_id)
            pair_losses, ends = pair_losses + c * ends, ends.detach()
        values = PairValues.of(out, policy.cu_seqlens, rewards, labels)
        return values, pair_losses, nll, num_tokens, ends

    @contextmanager
    def _solved_for(self, pairs: Sequence[TokenizedPair]) -> Iterator[None]:
        """A step's pairs solved together, where the method asks for it and micro-steps cut them.

        A forward pass more: what each pair pulls at is known when all are. In an evaluation the
        pairs of a method that remembers stand for themselves.
        """
        method, known = self.args.loss, self._solved
        stand_apart = self.memory is not None and not torch.is_grad_enabled()
        is_cut = self.group.size > 1 or len(self._split(pairs)) > 1 or method.needs_logits
        if known is None and method.of_the_step and not stand_apart and is_cut:
            self._solved = self._solve(pairs)
        try:
            yield
        finally:
            self._solved = known

    def _solve(self, pairs: Sequence[TokenizedPair]) -> Mapping[int, Tensor]:
        states = partial(self.states, in_training=True)
        drawn = random_state()  # both passes draw the same dropout

        def own() -> Sums:
            parts = self._shared(pairs)
            parts += self._fillers(pairs, len(parts))
            return sums_of(parts, states, self.args, self.reference)

        found = self._agreed(lambda: self._retried(own))
        set_random_state(drawn)
        reference = None if self.reference is None else self.reference.sums(pairs)
        return solved_of(pairs, self.group.merged(found), self.args, reference, self.memory)

    @torch.no_grad()
    def states(
        self, pairs: Sequence[TokenizedPair], *, in_training: bool = False
    ) -> tuple[Tensor, ModelHead, ModelInput]:
        """Hidden rows (N, H) that predict the scored tokens, the head, and what was passed.

        In training with the noise that the micro-step will have too.
        """
        if in_training:
            self._running = pairs
        with self._engaged(pairs), self._noise(pairs) if in_training else nullcontext():
            return self._passed(pairs)

    def _passed(
        self, pairs: Sequence[TokenizedPair]
    ) -> tuple[Tensor, ModelHead, ModelInput]:  # (N, H), as in `states`
        policy = self._policy(pairs)
        return self._hidden(policy), read_head(self.model), policy

    def _weights_of(self, pairs: Sequence[TokenizedPair]) -> list[float]:
        return [1.0 if self.weights is None else self.weights[pair.row] for pair in pairs]

    def _prior(self, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
        """The prior of a training step: from the cache where there is one."""
        if self._step_prior is not None:
            sides = [side for pair in pairs for side in self._step_prior[pair.row]]
            borders, device = batch.borders(len(side) for side in sides), sides[0].device
            return torch.cat(sides), borders.to(device, non_blocking=device.type == "cuda")
        assert self.prior_cache is not None
        rows = [pair.row for pair in pairs]
        return cached_prior(rows, self.prior_cache, device_of(self.model))

    def _no_prior(self, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
        """Of pairs that count for nothing: as of responses that have none."""
        device = device_of(self.model)
        borders = torch.zeros(2 * len(pairs) + 1, dtype=torch.int32, device=device)
        return torch.zeros(0, device=device), borders

    @torch.no_grad()
    def _prior_of_step(self, pairs: Sequence[TokenizedPair]) -> dict[int, Sides]:
        """The live prior of this process's share of a training step, ahead of its micro-steps.

        Its passes keep nothing and may be longer than those: the weights are read less often.
        """

        def own() -> dict[int, Sides]:
            found: dict[int, Sides] = {}
            for part, (logps, _) in self._in_parts(pairs, self._live_prior, batch.bare):
                lengths = [n for pair in part for n in batch.prior_lengths(pair, self.prior_front)]
                sides = iter(logps.split(lengths))
                found |= {pair.row: (next(sides), next(sides)) for pair in part}
            return found

        return self._agreed(own)

    @torch.no_grad()
    def _live_prior(self, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
        inputs = batch.prior_input(pairs, self.packing, self.prior_front, self.pad_id)
        inputs = inputs.to(device_of(self.model))
        if not len(inputs.target_ids):  # only responses of one token: nothing to score
            if is_sharded(self.model):  # and as many passes as the others' all the same
                one = batch.prior_input(pairs, self.packing, [self.pad_id], self.pad_id)
                self._hidden(one.to(device_of(self.model)))
            return torch.zeros(0, device=inputs.target_ids.device), inputs.cu_seqlens
        return self._score(inputs), inputs.cu_seqlens

    def _policy(self, pairs: Sequence[TokenizedPair]) -> ModelInput:
        return batch.policy_input(pairs, self.packing, self.pad_id).to(device_of(self.model))

    def _scored(self, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
        policy = self._policy(pairs)
        return self._score(policy), policy.cu_seqlens

    def _hidden(self, inputs: ModelInput) -> Tensor:  # (N, H)
        with self.autocast():
            return scored_hidden(self.model, inputs)

    def _score(self, inputs: ModelInput) -> Tensor:  # (N,)
        head = read_head(self.model)
        return head.token_logps(self._hidden(inputs), inputs.target_ids, self.args.kernel_impl)

    def _is_finite(self, outcome: StepOutcome) -> bool:
        fp16 = bool(self.args.fp16)
        return self._agreed(lambda: is_finite(self.model, outcome.loss, fp16))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block this process computes whole steps by itself, as do the others."""
        steps = {id(step): step for step in (self, self.reference and self.reference.step)}
        groups = [(step, step.group) for step in steps.values() if isinstance(step, PairStep)]
        for step, _ in groups:
            step.group = Group()
        try:
            yield
        finally:
            for step, group in groups:
                step.group = group

    def _noise(self, pairs: Sequence[TokenizedPair]) -> AbstractContextManager[None]:
        if self._noise_seed is None or not self.args.neftune_noise_alpha:
            return nullcontext()
        alpha = self.args.neftune_noise_alpha
        return embedding_noise(self.model, alpha, self._noise_seed, pairs, self.packing)
