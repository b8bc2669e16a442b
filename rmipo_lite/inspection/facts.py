"""`InspectionFacts`: what `inspect` found, in numbers; how it is shown stands in `view`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row
from rmipo_lite.inspection.pair_scores import PairScores, mean_scores
from rmipo_lite.inspection.suspicious import Kind, SuspiciousPair, pairs_of
from rmipo_lite.inspection.text_checks import TextFinding
from rmipo_lite.inspection.token_checks import length_bias

if TYPE_CHECKING:
    import pandas as pd


@dataclass(repr=False)
class InspectionFacts:
    """What `inspect` found.

    Attributes:
        data_report: what became of every row.
        findings: what is wrong with the data, with row numbers and advice.
        near_duplicates: row numbers of every group of near duplicates.
        unit: what lengths are counted in: "tokens" or "words".
        columns: numbers of every row by name, NaN where a row has none; see `to_pandas`.
        scores: what the model thinks of the pairs; None without a model.
        model_name: of the model, empty without one.
        args: the options.
        rows: the usable rows, in the columns' order.
    """

    data_report: DataReport
    findings: list[TextFinding]
    near_duplicates: list[list[int]]
    unit: str
    columns: dict[str, NDArray[Any]]
    scores: PairScores | None
    model_name: str
    args: RMiPOConfig
    rows: Sequence[Row]
    _similarity: dict[int, float]
    _candidates: dict[Kind, list[int]]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each pair: its row number, lengths, and with a model its numbers.

        Logps, priors, PMI and PMI gap are in nats per token, gamma in reward units, lengths in
        `unit`; weight is the share of its full pull that a pair has on the model. NaN where a
        number is undefined or not finite; for the loss a pair without PMI has gap 0.
        """
        import pandas as pd

        numbers = {"row": np.array([row.index for row in self.rows]), **self.columns}
        frame = pd.DataFrame(numbers)
        return frame[self.counted].reset_index(drop=True)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(rows,) whether the row has a pair: some are dropped as they are tokenised."""
        if self.scores is not None:
            return self.scores.scored
        return self.columns["chosen_length"] + self.columns["rejected_length"] > 0

    def lengths_of(self, side: str) -> NDArray[Any]:
        """Lengths of prompts, chosen or rejected responses, of the rows that have a pair.

        Of unpaired rows chosen are the desirable completions, rejected the others.
        """
        counts = self.counted
        if side != "prompt":
            counts = counts & np.array([side in row.responses for row in self.rows], np.bool_)
        return self.columns[f"{side}_length"][counts]

    def length_bias(self) -> tuple[list[tuple[str, str]], TextFinding | None]:
        """How far length alone tells chosen from rejected: facts, and a finding if it does."""
        if self.data_report.is_unpaired:
            return [], None
        return length_bias(self.lengths_of("chosen"), self.lengths_of("rejected"), self.unit)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the finite pairs, by the names of an evaluation; empty without a model.

        Beside them `loss`, `weight`, and `rmipo/dropped_pairs`: scored pairs that are not finite.
        """
        return {} if self.scores is None else mean_scores(self.scores, self.args)

    @property
    def suspicious_counts(self) -> dict[Kind, int]:
        """How many pairs each rule finds."""
        return {kind: len(places) for kind, places in self._candidates.items()}

    def suspicious(self, n: int = 10, kind: Kind | None = None) -> list[SuspiciousPair]:
        """The `n` most suspicious pairs of each kind, or of one; the rules are `RULES`.

        Raises:
            ValueError: no such kind, or `n` is below 0.
        """
        if n < 0:
            raise ValueError(f"n: wanted a whole number >= 0, got {n}")
        if kind is not None and kind not in get_args(Kind):
            raise ValueError(f"kind: wanted one of {', '.join(get_args(Kind))}, got {kind!r}")
        return [
            pair
            for name, places in self._candidates.items()
            if kind in (None, name)
            for pair in pairs_of(name, places[:n], self.rows, self.columns, self._similarity)
        ]
