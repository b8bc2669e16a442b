"""The paper's figures (arXiv 2604.24804) from one's own run: what it did to the held-out pairs.

Only the paper's captions were at hand, so what an axis holds is ours, and each caption says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rmipo_lite.output import held_out, plots
from rmipo_lite.output.figures import Captioned, Figures
from rmipo_lite.output.uncertainty import wilson
from rmipo_lite.results.run_file import Columns, RunNumbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = dict[Any, float]  # (set, pair) -> value

_BEFORE, _AFTER = "before", "after"
_COLOURS = {_BEFORE: "tab:gray", _AFTER: "tab:blue"}
_SIMPO = (0.3, 1.6)  # constant margins that are usual, and the ends of RMiPO's range
_LOG_PROBS = (
    "Log-probs of responses", "nats per token",
    (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
)  # fmt: skip
_BINS = 4  # of a sorted column, each with about as many pairs
_MOST_BINS = 40
_LEAST = 8  # pairs that a density is drawn of


class _Missing(Exception):
    """Why there is no such figure."""


def figures_of(run: RunNumbers) -> Figures:
    """Every figure that the run's numbers are enough for."""
    named: dict[str, Captioned] = {}
    missing: dict[str, str] = {}
    for name, draw in _FIGURES.items():
        try:
            named[name] = draw(run)
        except _Missing as reason:
            missing[name] = str(reason)
        except Exception as error:  # one that can't be drawn doesn't take the others with it
            missing[name] = f"it can't be drawn: {type(error).__name__}: {error}"
    return Figures(named, missing)


def _column(columns: Columns, metric: str) -> Values:
    """One metric of every held-out pair, of all sets together."""
    return {
        (of_set, case): value
        for name, of_set in held_out.names_of(metric, columns)
        for case, value in columns[name].items()
    }


def _sides(run: RunNumbers, metric: str, what: str) -> dict[str, Values]:
    """The metric before and after, of the pairs that have both.

    Raises:
        _Missing: there are too few.
    """
    before, after = _column(run.before, metric), _column(run.after, metric)
    both = [pair for pair in after if pair in before]
    if len(both) < _LEAST:
        raise _Missing(
            f"{len(both)} held-out pairs have {what} before and after, of {_LEAST} at least"
        )
    return {_BEFORE: {p: before[p] for p in both}, _AFTER: {p: after[p] for p in both}}


def _gamma(run: RunNumbers) -> Captioned:
    """Figure 8."""
    gaps, gammas = (
        _sides(run, f"rmipo/{name}", "a PMI gap (loss_type='rmipo')")
        for name in ("pmi_gap", "gamma")
    )
    drawn = plots.new_figure(9, 3.4)
    by_gap, density = drawn.add_subplot(1, 2, 1), drawn.add_subplot(1, 2, 2)
    shares = by_gap.twinx()
    for side, colour in _COLOURS.items():
        pairs = [pair for pair in gaps[side] if pair in gammas[side]]
        at = [gaps[side][pair] for pair in pairs], [gammas[side][pair] for pair in pairs]
        by_gap.scatter(*at, s=10, color=colour, label=side)
    _densities(shares, gaps)
    _densities(density, gammas, {side: side for side in _COLOURS})
    for axes, line in ((by_gap, by_gap.axhline), (density, density.axvline)):
        for place, constant in enumerate(_SIMPO):
            words = "SimPO, constant 0.3 and 1.6" if place == 0 else None
            line(constant, color="tab:red", linestyle="--", linewidth=1, label=words)
        axes.legend(fontsize="small")
    by_gap.set(title="Gamma by PMI gap", xlabel="PMI gap, nats per token", ylabel="gamma")
    shares.set_ylabel("density of the gap")
    density.set(title="Gamma of the pairs", xlabel="gamma", ylabel="density")
    return Captioned(
        drawn,
        f"Target margin gamma against the PMI gap of {len(gaps[_AFTER])} held-out pairs before and "
        "after training, the density of the gap behind it, and the density of gamma, beside the "
        "constant margins 0.3 and 1.6 of SimPO. After the paper's figure 8; held-out pairs, "
        "histograms and the two times are ours.",
    )


def _rewards(run: RunNumbers) -> Captioned:
    """Figure 6."""
    margins = _sides(run, "rewards/margins", "a reward difference")
    drawn = plots.new_figure(5, 3.4)
    axes = drawn.add_subplot()
    words = {}
    for side, colour in _COLOURS.items():
        values = margins[side].values()
        words[side] = f"{side}: {sum(v > 0 for v in values) / len(values):.0%} above 0"
        axes.axvline(statistics.fmean(values), color=colour, linewidth=1)
    _densities(axes, margins, words)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        title="Reward differences", xlabel="chosen less rejected, reward units", ylabel="density"
    )
    axes.legend(fontsize="small")
    return Captioned(
        drawn,
        f"Density of the reward difference of {len(margins[_AFTER])} held-out pairs before and "
        "after training, by this run's own reward; coloured lines are the means. After the paper's "
        "figure 6; the pairs, the two times and the histograms are ours.",
    )


def _accuracy(run: RunNumbers) -> Captioned:
    """Figure 5."""
    right = _sides(run, "rewards/accuracies", "a verdict")
    chosen, rejected = (_column(run.after, f"lengths/{side}") for side in ("chosen", "rejected"))
    by = {
        "PMI gap before training, nats per token": _column(run.before, "rmipo/pmi_gap"),
        "Chosen less rejected length, tokens": {
            pair: chosen[pair] - rejected[pair] for pair in chosen if pair in rejected
        },
    }
    kept = {words: {p: v for p, v in of.items() if p in right[_AFTER]} for words, of in by.items()}
    panels = [(words, values) for words, values in kept.items() if len(values) >= _LEAST]
    if not panels:
        raise _Missing("no pair has both a verdict and both lengths, as of unpaired rows")
    drawn = plots.new_figure(4.5 * len(panels), 3.4)
    for place, (words, values) in enumerate(panels, start=1):
        axes = drawn.add_subplot(1, len(panels), place)
        _draw_bins(axes, values, right)
        axes.set(xlabel=words, ylabel="share of pairs", ylim=(0, 1.02), title="Reward accuracy")
        axes.legend(fontsize="small")
    return Captioned(
        drawn,
        f"Share of {len(right[_AFTER])} held-out pairs whose chosen response has the higher "
        "reward, before and after training, by quarters of the PMI gap before and of "
        "the difference in length; bars are 95 % intervals (Wilson). After the paper's figure 5, "
        "whose win rates of chosen responses this takes for accuracies; the bins are ours.",
    )


def _draw_bins(axes: Axes, by: Values, right: Mapping[str, Values]) -> None:
    bins = _bins(by)
    for shift, (side, colour) in zip((-0.12, 0.12), _COLOURS.items(), strict=True):
        shares = [statistics.fmean(right[side][pair] for pair in pairs) for pairs in bins]
        spans = [wilson(share, len(pairs)) for share, pairs in zip(shares, bins, strict=True)]
        below = [share - low for share, (low, _) in zip(shares, spans, strict=True)]
        above = [high - share for share, (_, high) in zip(shares, spans, strict=True)]
        at = [place + shift for place in range(len(bins))]
        axes.errorbar(at, shares, yerr=[below, above], fmt="o", color=colour, capsize=3, label=side)
    words = [
        f"{min(by[p] for p in pairs):.3g} to {max(by[p] for p in pairs):.3g}\n({len(pairs)})"
        for pairs in bins
    ]
    axes.set_xticks(range(len(bins)), words, fontsize="small")
    axes.grid(visible=True, axis="y", alpha=0.3)


def _bins(by: Values) -> list[list[Any]]:
    """The pairs in order of their values, cut in quarters; equal values stay together."""
    ordered = sorted(by, key=by.__getitem__)
    size = len(ordered) / _BINS
    bins: list[list[Any]] = []
    for place, pair in enumerate(ordered):
        together = bins and by[bins[-1][-1]] == by[pair]
        if not bins or (place >= size * len(bins) and not together):
            bins.append([])
        bins[-1].append(pair)
    return bins


def _dynamics(run: RunNumbers) -> Captioned:
    """Figure 7, the half that is about training."""
    wanted = ("logps/", "rewards/margins", "rewards/accuracies", "rmipo/gamma", "lengths/")
    logged = dict.fromkeys(name for line in run.history for name in line)
    metrics = {name for name in logged if name.startswith(wanted)} | {"loss", "rmipo/pair_loss"}
    shown = {"step", *metrics}
    shown |= {name for metric in metrics for name, _ in held_out.names_of(metric, logged)}
    lines = [{name: v for name, v in line.items() if name in shown} for line in run.history]
    if not any("loss" in line for line in lines):
        raise _Missing("no training step was logged")
    return Captioned(
        plots.figure(lines, [_LOG_PROBS]),
        "The run over its optimizer steps: loss, reward accuracy and margin, gamma, log-probs of "
        "both sides, lengths. After the paper's figure 7; which curves is ours.",
    )


def _efficiency(run: RunNumbers) -> Captioned:
    """Figure 7, the half that is about time and memory."""
    lines = [line for line in run.history if "rmipo/step_runtime" in line]
    if not lines:
        raise _Missing("no log line has its seconds (the run is of an earlier version)")
    steps = [line["step"] for line in lines]
    spent = [line["rmipo/step_runtime"] for line in lines]
    whole = [sum(spent[: place + 1]) / 60 for place in range(len(spent))]
    drawn = plots.new_figure(12, 3)
    panels = (
        ("Speed", "tokens per second", steps, [line["rmipo/tokens_per_second"] for line in lines]),
        ("Peak memory so far", "GiB", steps, [line["rmipo/peak_memory"] for line in lines]),
        ("Margin by time", "reward units", whole, [_margin(line) for line in lines]),
    )
    for place, (title, unit, at, values) in enumerate(panels, start=1):
        axes = drawn.add_subplot(1, 3, place)
        axes.plot(at, values, marker="o" if len(at) < 3 else "")
        axes.set(title=title, ylabel=unit)
        axes.set_xlabel("minutes in steps" if at is whole else "optimizer step")
        axes.grid(visible=True, alpha=0.3)
        if at is steps:
            axes.set_ylim(0, 1.1 * max(values))
    tokens = sum(a * b for a, b in zip(panels[0][3], spent, strict=True))
    return Captioned(
        drawn,
        f"What the run took: {whole[-1]:.3g} minutes in optimizer steps, {tokens:,.0f} tokens read "
        f"by the policy and the prior pass, {panels[1][3][-1]:.3g} GiB at its peak (of the card, "
        "or of the process on a CPU). After the paper's figure 7; evaluations and saves aren't "
        "counted.",
    )


def _margin(line: Mapping[str, float]) -> float:
    return line.get("rewards/margins", math.nan)


def _densities(
    axes: Axes, sides: Mapping[str, Values], words: Mapping[str, str] | None = None
) -> None:
    """Histograms of area 1 in the same bins, as many as Freedman and Diaconis would take."""
    import numpy as np

    values = [value for side in sides.values() for value in side.values()]
    low, high = np.percentile(values, [25, 75])
    width = 2 * (high - low) / len(values) ** (1 / 3)
    bins = (max(values) - min(values)) / width if width > 0 else math.inf
    # An outlier, or values that are all but one, would ask for millions of bins.
    edges = np.histogram_bin_edges(values, bins=math.ceil(bins) if 2 < bins < _MOST_BINS else 20)
    for side, colour in _COLOURS.items():
        label = None if words is None else words[side]
        axes.hist(
            list(sides[side].values()), bins=[float(edge) for edge in edges], density=True,
            histtype="stepfilled", alpha=0.3, color=colour, label=label,
        )  # fmt: skip


_FIGURES: dict[str, Callable[[RunNumbers], Captioned]] = {
    "gamma": _gamma, "rewards": _rewards, "accuracy": _accuracy, "dynamics": _dynamics,
    "efficiency": _efficiency,
}  # fmt: skip
