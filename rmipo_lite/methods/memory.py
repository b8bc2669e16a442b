"""Methods that remember: running means, a queue of gaps, a beta that moves.

What such a method says of the pairs of a step are numbers without a gradient (`Terms`), from the
pairs and from what it remembers:

    loss of a pair = weight * [(1 - e) sp(-z) + e sp(z)]        z = scale * gap - margin

An optimizer step is one update, over all its pairs, whatever its micro-steps were; a step that is
thrown away is none, and neither is an evaluation, whose pairs stand each for itself (`at_rest`).
The authors' code updates with every micro-batch, in evaluations too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmipo_lite.methods.formulas import MethodOptions, logistic
from rmipo_lite.methods.sums import PairSums

Values = dict[str, Any]  # plain numbers, as a checkpoint keeps them

_DECAY = 0.9  # of the running means
_ROUNDING = 1e-6  # nats: a smaller spread is the rounding of equal numbers
_LEAST_BETA = 1e-3  # of beta_dpo
# Of gamma_*: gaps that are remembered, that a step's margins are found from, drawn at the start,
# and steps of the exponentiated gradient (of their 20 the last one changes nothing that is used).
_QUEUE, _SOLVED, _FIRST, _ITERATIONS = 2048, 256, 8, 19


class Terms(NamedTuple):
    """What a step says of each of its P pairs, no gradient; float64."""

    scale: Tensor  # (P,)
    margin: Tensor  # (P,)
    weight: Tensor  # (P,)

    def loss(self, gap: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """(P,) from the gap that the method takes."""
        return self.weight * logistic(self.scale * gap - self.margin, label_smoothing)


def _terms(like: Tensor, scale: Any, margin: Any = 0.0, weight: Any = 1.0) -> Terms:
    return Terms(*(torch.zeros_like(like) + value for value in (scale, margin, weight)))


class Remembers(NamedTuple):
    """What a method remembers, as its entry in the table names it."""

    begin: Callable[[MethodOptions, torch.Generator], Values]
    advance: Callable[[PairSums, MethodOptions, Values, torch.Generator], tuple[Values, Terms]]
    at_rest: Callable[[PairSums, MethodOptions, Values], Terms]
    least_pairs: int = 1  # of a step: what is a spread wants two


@dataclass
class Memory:
    """What a run's method remembers. `now` isn't written to: a copy is kept by keeping it."""

    method: Remembers
    options: MethodOptions
    seed: int
    now: Values = field(default_factory=dict)
    _next: Values | None = None

    def __post_init__(self) -> None:
        self.now = {"steps": 0, **self.method.begin(self.options, self._generator(0))}

    def _generator(self, draw: int) -> torch.Generator:
        """The same numbers for the same step, however often it is computed."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + draw) % 2**63)

    def terms(self, pairs: PairSums) -> Terms:
        """Of all pairs of a training step; `commit` makes it count."""
        steps = self.now["steps"] + 1
        pairs = pairs.detached()
        after, terms = self.method.advance(pairs, self.options, self.now, self._generator(steps))
        self._next = {**after, "steps": steps}
        return terms

    def at_rest(self, pairs: PairSums) -> Terms:
        """Of any pairs, each for itself; nothing is remembered of them."""
        return self.method.at_rest(pairs.detached(), self.options, self.now)

    def commit(self) -> None:
        """The step of the last `terms` was taken."""
        if self._next is not None:
            self.now, self._next = self._next, None

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Steps inside the block are forgotten."""
        now = self.now
        try:
            yield
        finally:
            self.now, self._next = now, None


def _running(x: Tensor, values: Values) -> Values:
    """Mean and spread moved towards a step's; a single pair has no spread and moves nothing."""
    if len(x) < 2:
        return {"mean": values["mean"], "std": values["std"]}
    return {
        "mean": _DECAY * values["mean"] + (1 - _DECAY) * x.mean().item(),
        "std": _DECAY * values["std"] + (1 - _DECAY) * x.std().item(),
    }


def _standard(x: Tensor, values: Values) -> Tensor:
    """How many spreads from the mean; 0 while there is no spread, as before the first step."""
    if values["std"] < _ROUNDING:
        return torch.zeros_like(x)
    return (x - values["mean"]) / values["std"]


def _no_spread(o: MethodOptions, draw: torch.Generator) -> Values:
    return {"mean": 0.0, "std": 0.0}


def _alpha_at_rest(pairs: PairSums, o: MethodOptions, values: Values) -> Terms:
    margin = o.simpo_gamma + o.beta * o.alpha * _standard(pairs.mean_gap, values)
    return _terms(margin, o.beta, margin)


def _alpha_step(
    pairs: PairSums, o: MethodOptions, values: Values, draw: torch.Generator
) -> tuple[Values, Terms]:
    values = _running(pairs.mean_gap, values)
    return values, _alpha_at_rest(pairs, o, values)


def beta_step(gap: Tensor, o: MethodOptions, values: Values, chosen: Tensor) -> Terms:
    """beta_dpo's terms where these pairs, (k,) indices, are the ones that count."""
    moved = o.alpha * (gap[chosen].mean().item() - values["mean"])
    weight = torch.zeros_like(gap)
    weight[chosen] = len(gap) / len(chosen)
    return _terms(gap, max(_LEAST_BETA, o.beta * (1 + moved)), weight=weight)


def _beta_step(
    pairs: PairSums, o: MethodOptions, values: Values, draw: torch.Generator
) -> tuple[Values, Terms]:
    gap, values = pairs.gap, _running(pairs.gap, values)
    count = max(1, int(len(gap) * (1 - o.beta_dpo_rho)))
    # Without replacement, by weights exp(-z^2 / 2): the largest of log weight + Gumbel noise, which
    # no weight that underflows can stop.
    noise = torch.rand(len(gap), dtype=torch.float64, generator=draw).to(gap.device)
    score = -0.5 * _standard(gap, values).square() - (-noise.log()).log()
    return values, beta_step(gap, o, values, score.topk(count).indices)


def _plain(pairs: PairSums, o: MethodOptions, values: Values) -> Terms:
    """DPO's: every pair counts, with the beta that is in force."""
    return _terms(pairs.chosen, values.get("beta", o.beta))


def _first_gaps(o: MethodOptions, draw: torch.Generator) -> Values:
    return {"gaps": torch.randn(_FIRST, dtype=torch.float64, generator=draw).tolist()}


def margins(gaps: Tensor, gamma: float, tau: float) -> Tensor:
    """gamma-PO's margins of n gaps, (n,): mean gamma, larger where the gap is larger.

    Exponentiated-gradient steps on tau KL(p, uniform) + mean sp(-(gap - gamma n p)), over p.
    """
    n = len(gaps)
    rate = min(0.5 / tau, 1.0)
    p = torch.full_like(gaps, 1 / n)
    for _ in range(_ITERATIONS):
        slope = tau * (1 + (n * (p + 1e-10)).log()) + gamma * torch.sigmoid(gamma * n * p - gaps)
        p = (p.log() - rate * slope).softmax(0)
    return gamma * n * p


def _gamma_step(gap: Callable[[PairSums, MethodOptions], Tensor], kept: float) -> Any:
    def step(
        pairs: PairSums, o: MethodOptions, values: Values, draw: torch.Generator
    ) -> tuple[Values, Terms]:
        own, known = o.beta * gap(pairs, o), values["gaps"]
        places = torch.randperm(len(known), generator=draw)[: max(0, _SOLVED - len(own))]
        others = own.new_tensor([known[place] for place in places.tolist()])
        found = margins(torch.cat([others, own]), o.simpo_gamma, o.gamma_po_tau)[len(others) :]
        after = {"gaps": [*known, *own.tolist()][-_QUEUE:]}
        return after, _terms(own, o.beta, found - (1 - kept) * o.simpo_gamma)

    return step


def mean_difference(pairs: PairSums, o: MethodOptions) -> Tensor:
    """m_w - m_l, (P,)."""
    chosen, rejected = pairs.means
    return chosen - rejected


def gap_or_mean_gap(pairs: PairSums, o: MethodOptions) -> Tensor:
    """G or h, by `length_norm`, (P,)."""
    return pairs.mean_gap if o.length_norm else pairs.gap


def _first_beta(o: MethodOptions, draw: torch.Generator) -> Values:
    return {"beta": o.beta}


def _epsilon_step(
    pairs: PairSums, o: MethodOptions, values: Values, draw: torch.Generator
) -> tuple[Values, Terms]:
    assert pairs.signs is not None
    after = {"beta": values["beta"] / (1 + o.epsilon * pairs.signs.mean().item())}
    return after, _terms(pairs.chosen, values["beta"] / (1 + o.epsilon * pairs.signs))


def _mean_margin(kept: float) -> Any:
    def at_rest(pairs: PairSums, o: MethodOptions, values: Values) -> Terms:
        return _terms(pairs.chosen, o.beta, kept * o.simpo_gamma)

    return at_rest


ALPHA_DPO = Remembers(_no_spread, _alpha_step, _alpha_at_rest, least_pairs=2)
BETA_DPO = Remembers(_no_spread, _beta_step, _plain, least_pairs=2)
EPSILON_DPO = Remembers(_first_beta, _epsilon_step, _plain)
GAMMA_SIMPO = Remembers(_first_gaps, _gamma_step(mean_difference, 1.0), _mean_margin(1.0))
GAMMA_DPO = Remembers(_first_gaps, _gamma_step(gap_or_mean_gap, 0.0), _mean_margin(0.0))


def of_means(pairs: PairSums, o: MethodOptions, terms: Terms) -> Tensor:
    """On SimPO's difference of means: alpha-DPO (arXiv 2410.10148), gamma-PO (arXiv 2506.03690)."""
    return terms.loss(mean_difference(pairs, o), o.label_smoothing)


def of_gaps(pairs: PairSums, o: MethodOptions, terms: Terms) -> Tensor:
    """On DPO's gap: beta-DPO (arXiv 2407.08639), epsilon-DPO (arXiv 2502.13177), gamma-PO."""
    return terms.loss(gap_or_mean_gap(pairs, o), o.label_smoothing)
