"""`Comparison`: methods side by side, with what a difference between them is worth."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmipo_lite.comparing.outcome import COMPARABLE, MEASURES, RunOutcome
from rmipo_lite.comparing.sensitivity import sensitivity, with_defaults
from rmipo_lite.comparing.worth import Estimated, difference, estimated
from rmipo_lite.model.generation import Prompt, prompt_text
from rmipo_lite.output import page, plots
from rmipo_lite.output.console import duration, say
from rmipo_lite.output.figures import Figures
from rmipo_lite.output.table import escaped, html_table, text_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NO_DIFFERENCE = "no difference shown"
_ANSWERS_SHOWN = 5  # prompts, in a report
_DIGITS = {"length": 1, "margin": 2, "win_rate": 3, "accuracy": 3}
_NOTE = (
    "+- is one standard error, of the pairs or prompts and of the seeds together. Accuracy "
    "and margin are by each method's own reward, and margins have its own unit. A difference is "
    "paired by seed and by pair or prompt, and shown where it is past 1.96 of its standard errors; "
    "of many differences one in twenty is so by chance."
)


@dataclass(repr=False)
class Comparison:
    """Several methods on the same held-out pairs and prompts.

    Attributes:
        methods: the contenders' names, in the order they were given.
        results: a `RunOutcome` a run, those that failed with their `error`.
        prompts: what every run answered.
        before: seed -> the answers of the model as it came.
        output_dir: a folder a run, and this comparison's.
        planned: how many runs it has in all; fewer are there where it was stopped.
    """

    methods: list[str]
    results: list[RunOutcome]
    prompts: list[Prompt]
    before: dict[int, list[str]]
    output_dir: Path
    planned: int = 0
    _measures: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._measures = [m for m in MEASURES if any(m in one.cases for one in self.results)]

    @property
    def failed(self) -> list[RunOutcome]:
        """Runs that ended with an error."""
        return [one for one in self.results if one.error is not None]

    def of(self, method: str) -> list[RunOutcome]:
        """The runs of a method that there are, by seed.

        Raises:
            KeyError: there is no such method.
        """
        if method not in self.methods:
            raise KeyError(f"{method!r} is none of {', '.join(self.methods)}")
        return [one for one in self.results if one.method == method and one.error is None]

    def mean(self, method: str, measure: str) -> Estimated:
        """(mean, standard error) of a measure: win_rate, accuracy, margin, chosen_moved, ..."""
        return estimated(self.of(method), _known(measure))

    def difference(self, method: str, other: str, measure: str) -> Estimated:
        """(mean, standard error) of the first method less the other, paired; NaN: no pairs."""
        return difference(self.of(method), self.of(other), _known(measure))

    def best(self, measure: str | None = None) -> RunOutcome:
        """A run of the method that is best by a measure, and in one line how sure that is.

        Args:
            measure: None takes the win rate where there is a judge, else the accuracy.

        Raises:
            ValueError: no run is there, or more of the measure is neither better nor worse.
        """
        measure = _known(measure or self._main)
        more = MEASURES[measure][2]
        if more is None:
            raise ValueError(f"measure: more or less {measure} is neither better nor worse")
        made = [m for m in self.methods if not math.isnan(self.mean(m, measure).mean)]
        if not made:
            raise ValueError(f"best: no run has a {measure}")
        ranked = sorted(made, key=lambda m: self.mean(m, measure).mean, reverse=more)
        alike = [m for m in ranked[1:] if not self.difference(ranked[0], m, measure).is_sure]
        unsure = f"; {NO_DIFFERENCE} to {', '.join(alike)}" if alike else ""
        say(f"Best by {MEASURES[measure][0]}: {ranked[0]}{unsure}")
        return self.of(ranked[0])[0]

    @property
    def _main(self) -> str:
        return "win_rate" if "win_rate" in self._measures else "accuracy"

    def to_pandas(self) -> pd.DataFrame:
        """A row a run: method, seed, rate, every measure's mean, seconds, error."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "method": one.method, "seed": one.seed, "learning_rate": one.learning_rate,
                    **{measure: one.mean(measure) for measure in self._measures},
                    "steps": one.steps, "seconds": one.seconds, "error": one.error,
                    "folder": str(one.folder),
                }
                for one in self.results
            ]
        )  # fmt: skip

    # -- shown ------------------------------------------------------------------------------

    @property
    def headline(self) -> str:
        """What was compared, in one line."""
        made = len(self.results) - len(self.failed)
        seeds = len({one.seed for one in self.results})
        parts = [f"{made} of {max(self.planned, len(self.results))} runs", f"{seeds} seeds"]
        if seeds == 1:
            parts[1] = "one seed"
        if self.prompts:
            parts.append(f"{len(self.prompts)} prompts")
        if self.failed:
            parts.append(f"{len(self.failed)} FAILED")
        return f"Comparison of {len(self.methods)} methods: {', '.join(parts)}"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                method,
                _rates(self.of(method)),
                *(_shown(self.mean(method, m), m) for m in self._measures),
                duration(sum(one.seconds for one in self.of(method))),
            )
            for method in self.methods
        ]

    def _head(self) -> tuple[str, ...]:
        words = (MEASURES[measure][0] for measure in self._measures)
        return ("method", "learning rate", *words, "took")

    def _differences(self) -> list[tuple[str, ...]]:
        """Of every other method to the first: where it is shown, how large."""
        first, *others = self.methods
        rows = []
        for other in others:
            found = {m: self.difference(other, first, m) for m in self._compared}
            rows.append((other, *(_worth(found[m], m) for m in self._compared)))
        return rows

    @property
    def _compared(self) -> list[str]:
        return [measure for measure in self._measures if measure in COMPARABLE]

    def _difference_head(self) -> tuple[str, ...]:
        return (f"less {self.methods[0]}", *(MEASURES[m][0] for m in self._compared))

    def _failures(self) -> list[str]:
        return [f"{one.method}, seed {one.seed}: {one.error}" for one in self.failed]

    def __str__(self) -> str:
        right = list(range(1, len(self._measures) + 3))
        lines = [self.headline, "", *text_table(self._head(), self._rows(), right)]
        if len(self.methods) > 1 and self._compared:
            lines += ["", *text_table(self._difference_head(), self._differences(), right)]
        lines += ["", *(f"FAILED: {failure}" for failure in self._failures())]
        return "\n".join([*lines, _NOTE, f"Runs: {self.output_dir}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            [f"<p><b>{escaped(self.headline)}</b></p>", *(text for _, text in self._sections())]
        )

    def _sections(self) -> list[tuple[str, str]]:
        sections = [("Methods", html_table(self._head(), self._rows()))]
        if len(self.methods) > 1 and self._compared:
            table = html_table(self._difference_head(), self._differences())
            sections.append((f"Differences to {self.methods[0]}", table))
        if self.failed:
            items = "".join(f"<li>{escaped(text)}</li>" for text in self._failures())
            sections.append(("Failed", f"<ul>{items}</ul>"))
        return [*sections, ("What the numbers are", f"<p>{html.escape(_NOTE)}</p>")]

    def plot(self) -> Figure:
        """Every measure's mean and 95 % interval by method, in one figure of matplotlib's."""
        measures = self._compared or ["accuracy"]
        columns = min(3, len(measures))
        rows = -(-len(measures) // columns)
        height = 0.9 + 0.28 * len(self.methods)
        drawn = plots.new_figure(3.6 * columns + 0.6, height * rows)
        for place, measure in enumerate(measures):
            axes = drawn.add_subplot(rows, columns, place + 1)
            self._draw(axes, measure)
            if place % columns:
                axes.set_yticklabels([])
        return drawn

    def _draw(self, axes: Any, measure: str) -> None:
        found = [self.mean(method, measure) for method in self.methods]
        words, unit, _ = MEASURES[measure]
        spread = [1.96 * e.error if math.isfinite(e.error) else 0.0 for e in found]
        places = range(len(found))
        axes.errorbar([e.mean for e in found], places, xerr=spread, fmt="o", ms=4, capsize=2)
        axes.set_yticks(list(places), self.methods)
        axes.invert_yaxis()
        axes.set(title=words, xlabel=unit)
        axes.grid(visible=True, alpha=0.3)

    def figures(self, measure: str | None = None) -> Figures:
        """The paper's figure 2 from these runs: a measure over the values of the options swept.

        Args:
            measure: None takes the win rate where there is a judge, else the accuracy.
        """
        measure = _known(measure or self._main)
        options = with_defaults(
            {m: (runs[0].options, runs[0].folder) for m in self.methods if (runs := self.of(m))}
        )
        means = {method: self.mean(method, measure) for method in options}
        return sensitivity(options, means, *MEASURES[measure][:2])

    def report(self, path: str | Path | None = None) -> Path:
        """Write one self-contained HTML file; None writes `comparison.html` into `output_dir`."""
        sections = [*self._sections(), ("By measure", plots.svg(self.plot()))]
        if swept := self.figures():
            sections.append(("Sensitivity", swept._repr_html_()))
        if self.prompts:
            sections.append(("Answers", self._answers()))
        whole = page.html_page("Comparison", self.headline, sections)
        target = page.write_report(
            self.output_dir / "comparison.html" if path is None else path, whole
        )
        say(f"Report: {target}")
        return target

    def _answers(self) -> str:
        """The first prompts' answers of every method, at its first seed."""
        made = [(method, runs[0]) for method in self.methods if (runs := self.of(method))]
        seed = made[0][1].seed if made else 0
        parts = []
        for place, prompt in enumerate(self.prompts[:_ANSWERS_SHOWN]):
            before = self.before.get(seed, [])
            rows = [("before", before[place])] if place < len(before) else []
            rows += [(method, one.answers[place]) for method, one in made]
            parts.append(f"<p><b>{escaped(prompt_text(prompt))}</b></p>")
            parts.append(html_table(("", ""), rows, ("20%", "80%")))
        return "".join(parts)


def _known(measure: str) -> str:
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    return measure


def _number(value: float, measure: str, sign: str = "") -> str:
    return f"{value:{sign}.{_DIGITS.get(measure, 3)}f}"


def _shown(found: Estimated, measure: str) -> str:
    if math.isnan(found.mean):
        return "-"
    error = f" +- {_number(found.error, measure)}" if math.isfinite(found.error) else ""
    return _number(found.mean, measure) + error


def _worth(found: Estimated, measure: str) -> str:
    if math.isnan(found.mean):
        return "-"
    if not found.is_sure:
        return NO_DIFFERENCE
    return f"{_number(found.mean, measure, '+')} +- {_number(found.error, measure)}"


def _rates(outcomes: Sequence[RunOutcome]) -> str:
    """One, or from the least to the most."""
    rates = sorted({one.learning_rate for one in outcomes if one.learning_rate is not None})
    if not rates:
        return "-"
    least, most = f"{rates[0]:.2g}", f"{rates[-1]:.2g}"
    return least if least == most else f"{least} to {most}"
