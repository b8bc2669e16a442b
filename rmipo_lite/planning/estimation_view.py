"""What `estimate` found, and how it is shown: text, tables, figure, DataFrame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rmipo_lite.output import plots
from rmipo_lite.output.console import duration, gib, printable
from rmipo_lite.output.table import escaped, html_table, labelled, text_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_GIB = 2**30
_TIME_NOTE = (
    "counted: operations over a share of the card's speed (planning/cards.csv), not measured"
)


@dataclass(frozen=True)
class Fit:
    """A run on one card.

    Attributes:
        card: its name.
        memory: bytes there are; on a CPU those that are free.
        weights: what the weights are held in: "4-bit", "bf16", "fp16" or "fp32".
        checkpointing: whether activations of some pairs are computed again in the backward pass.
        again: of the layers' forward passes, the share that is.
        max_tokens: of the largest micro-step.
        max_tokens_planned: of one of several pairs; a longer pair has one of its own.
        max_tokens_no_grad: of a pass without gradients.
        parts: bytes by part, which add up to `peak`.
        least: peak bytes with the longest pair alone in a micro-step.
        fits: whether `least` does.
        seconds: of an epoch; None where the card's speed isn't known.
        way_out: options of `train` that make it fit where it doesn't; None where none is known.
        note: what else there is to say.
        layout: how several such cards share it; empty for one.
        sent: of `seconds`, those in which something is sent between cards.
        counted: False where the architecture could not be counted and a formula stood in.
    """

    card: str
    memory: int
    weights: str
    checkpointing: bool
    again: float
    max_tokens: int
    max_tokens_planned: int
    max_tokens_no_grad: int
    parts: dict[str, int]
    least: int
    fits: bool
    seconds: float | None
    way_out: dict[str, Any] | None = field(default_factory=dict)
    counted: bool = True
    note: str = ""
    layout: str = ""
    sent: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())

    @property
    def verdict(self) -> str:
        """Whether it fits, and what to do where not."""
        if self.fits:
            return "fits"
        if self.way_out is None:
            return "no: take a smaller model"
        return "with " + ", ".join(f"{name}={value!r}" for name, value in self.way_out.items())

    @property
    def computed_again(self) -> str:
        """How much is checkpointed, in words."""
        if not 0 < self.again < 1:
            return "on" if self.again else "off"
        return f"{max(self.again, 0.01):.0%}"

    @property
    def time(self) -> str:
        return "?" if self.seconds is None else duration(self.seconds)

    def layout_row(self) -> tuple[str, ...]:
        """Texts of the table of layouts."""
        sending = "?" if self.seconds is None else f"{self.sent / self.seconds:.0%}"
        return self.layout, *self.row()[2:7], sending, self.verdict

    def row(self) -> tuple[str, ...]:
        """Texts of the table of cards."""
        return (
            self.card, gib(self.memory), self.weights, self.computed_again,
            f"{self.max_tokens}", gib(self.peak), self.time, self.verdict,
        )  # fmt: skip


_HEAD = (
    "card",
    "GiB",
    "weights",
    "checkpointing",
    "tokens",
    "peak GiB",
    "epoch, counted",
    "verdict",
)


_LAYOUT_HEAD = (
    "layout", "weights", "checkpointing", "tokens", "peak GiB", "epoch, counted", "sending",
    "verdict",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Estimate:
    """Memory and time of a run that has not begun.

    Attributes:
        model: its name.
        note: where the lengths of the pairs come from.
        pairs, pairs_per_step: in an epoch and in an optimizer step.
        tokens: read in an epoch, with and without prompts.
        fit: on the card that was asked for.
        cards: on common cards.
        num_gpus: how many of the card there are.
        layouts: on all of them, each with the whole model and each with a part; memory is a card's.
    """

    model: str
    note: str
    pairs: int
    pairs_per_step: int
    tokens: int
    fit: Fit
    cards: list[Fit]
    num_gpus: int = 1
    layouts: list[Fit] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Options that make it fit: `train(model, dataset, **estimate.settings)`. Often none.

        Raises:
            ValueError: none is known; the model is too large for the card.
        """
        if self.fit.fits:
            return {}
        if self.fit.way_out is None:
            raise ValueError(
                f"gpu: {self.model} fits {self.fit.card} with no setting: it takes "
                f"{gib(self.fit.least)} GiB of {gib(self.fit.memory)}; take a smaller model"
            )
        return dict(self.fit.way_out)

    @property
    def steps(self) -> int:
        return -(-self.pairs // self.pairs_per_step)

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) lines of the card that was asked for."""
        fit = self.fit
        lines = [
            ("pairs", self.note),
            (
                "epoch",
                f"{self.pairs:,} pairs, {self.steps:,} steps of {self.pairs_per_step}, "
                f"{self.tokens / 1e6:,.1f} million tokens read, about {fit.time} (counted)",
            ),
            (
                "settings",
                f"{fit.weights} weights, checkpointing {fit.computed_again}, "
                f"micro-steps of up to {fit.max_tokens} tokens",
            ),
        ]
        lines += [(name, f"{gib(size)} GiB") for name, size in fit.parts.items() if size]
        lines.append(("peak", f"{gib(fit.peak)} of {gib(fit.memory)} GiB: {fit.verdict}"))
        if fit.least < fit.peak:
            lines.append(("at least", f"{gib(fit.least)} GiB, one pair at a time"))
        if fit.card == "cpu":
            lines.append(("note", "the system's allocator may hold up to 1.7 times as much"))
        if fit.note:
            lines.append(("note", fit.note))
        if not fit.counted:
            lines.append(("note", "this architecture could not be counted: a formula stands in"))
        return lines

    @property
    def title(self) -> str:
        return f"Estimate: {self.model} on {self.fit.card} (nothing was loaded)"

    def __str__(self) -> str:
        lines = [printable(self.title), *labelled(self.facts(), 22, indent="  "), ""]
        if self.layouts:
            lines += [f"{self._several}:", *text_table(_LAYOUT_HEAD, self._layout_rows()), ""]
        return "\n".join([*lines, *text_table(_HEAD, self._rows(), right=(1, 4, 5)), _TIME_NOTE])

    __repr__ = __str__

    def _rows(self) -> list[tuple[str, ...]]:
        return [fit.row() for fit in self.cards]

    @property
    def _several(self) -> str:
        return f"On {self.num_gpus} x {self.fit.card}, memory a card (docs/scale.md)"

    def _layout_rows(self) -> list[tuple[str, ...]]:
        return [fit.layout_row() for fit in self.layouts]

    def _repr_html_(self) -> str:
        table = html_table(_LAYOUT_HEAD, self._layout_rows()) if self.layouts else ""
        several = f"<p>{escaped(self._several)}:</p>{table}" if self.layouts else ""
        return (
            f"<p><b>{escaped(self.title)}</b></p>"
            f"{html_table(('part', 'takes'), self.facts())}{several}<p>On common cards:</p>"
            f"{html_table(_HEAD, self._rows())}<p>{_TIME_NOTE}</p>"
        )

    def to_pandas(self) -> pd.DataFrame:
        """The table of cards with numbers: a row a card, bytes by part, seconds."""
        import pandas as pd

        rows = [
            {
                "card": fit.card, "memory": fit.memory, "weights": fit.weights,
                "checkpointing": fit.checkpointing, "again": fit.again,
                "max_tokens": fit.max_tokens,
                "peak": fit.peak, "least": fit.least, "fits": fit.fits,
                "seconds_per_epoch": fit.seconds, "verdict": fit.verdict, **fit.parts,
            }
            for fit in self.cards
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Memory by part on every card, beside what the card has, as bars in GiB."""
        fits = [self.fit, *(fit for fit in self.cards if fit.card != self.fit.card)]
        drawn = plots.new_figure(8, 0.8 + 0.32 * len(fits))
        axes = drawn.add_subplot()
        places = range(len(fits))
        start = [0.0] * len(fits)
        for name in self.fit.parts:
            sizes = [fit.parts[name] / _GIB for fit in fits]
            if any(sizes):
                axes.barh(places, sizes, left=start, label=name, height=0.6)
            start = [a + b for a, b in zip(start, sizes, strict=True)]
        for place, fit in zip(places, fits, strict=True):
            has = fit.memory / _GIB
            axes.plot([has, has], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.set_yticks(places, [f"{fit.card}{'' if fit.fits else ' *'}" for fit in fits])
        axes.invert_yaxis()
        axes.set_xlabel("GiB; the mark is what the card has, * does not fit")
        axes.set_title(printable(self.model), parse_math=False)
        axes.legend(fontsize="small")
        return drawn
