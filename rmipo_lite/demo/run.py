"""`rmipo-lite demo`: train the shipped model on the shipped pairs and measure what it did.

Everything goes through the package's public `train`; the demo adds the true reward before and
after on questions that stand in no pair. What it shows is that the method runs end to end and
learns from preferences, on one tiny made-up task; it compares no method with another.
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rmipo_lite.demo.data import MODEL, load_rows
from rmipo_lite.demo.scoring import Answer, Score, gamma_by_pair_kind, sample_answers, score_answers
from rmipo_lite.demo.task import (
    ANSWER_SHARES,
    WORDY_SHARE,
    Question,
    held_out_questions,
    make_pairs,
)
from rmipo_lite.output.table import escaped, html_table
from rmipo_lite.results.result import TrainResult
from rmipo_lite.run import train

SAMPLES_SHOWN = 8

_LABELS = {
    "win_rate": "win rate by true reward",
    "full_marks": "right, terse and ended",
    "mean_reward": "mean true reward",
    "generic": "generic answers",
    "garbled": "garbled answers",
    "mean_tokens": "answer length, tokens",
    "unended": "answers without an end",
}
_PLAIN_NUMBERS = ("mean_reward", "mean_tokens")
_NOTE = (
    "Win rate: share of held-out prompts where the sampled answer earns a higher true reward than "
    "a fixed answer of the untrained model, ties half. A program computes the reward from the "
    "answer's text. Every option is the default, the learning rate is found. One tiny made-up "
    "task: it shows that training works end to end, not how the method compares with others."
)


@dataclass(frozen=True)
class DemoResult:
    """What a demo run gives back.

    Attributes:
        result: the package's own result of the run, with model and adapter.
        before, after: scores of the same held-out prompts.
        samples: (question, answer before, answer after).
        gamma: mean (PMI gap, gamma) of each kind of pair, before training.
        prompts: how many held-out prompts the scores are means over.
        seconds: wall time of the demo, without imports and the report.
        report_path: the HTML report, None when none was wanted.
    """

    result: TrainResult
    before: Score
    after: Score
    samples: list[tuple[str, str, str]]
    gamma: dict[str, tuple[float, float]]
    prompts: int
    seconds: float
    report_path: Path | None

    def rows(self) -> list[tuple[str, str, str]]:
        """(measure, before, after) as text."""
        rows = []
        for field in fields(Score):
            values = [getattr(score, field.name) for score in (self.before, self.after)]
            plain = field.name in _PLAIN_NUMBERS
            before, after = (f"{v:.2f}" if plain else f"{v:.1%}" for v in values)
            rows.append((_LABELS[field.name], before, after))
        return rows

    def summary(self) -> str:
        """The result as a small table with samples, for a terminal."""
        lines = [f"{f'{self.prompts} held-out prompts':<26}{'before':>9}{'after':>9}"]
        lines += [f"{name:<26}{before:>9}{after:>9}" for name, before, after in self.rows()]
        lines += ["", "gamma sets itself per pair    PMI gap    gamma  (before training, means)"]
        for kind, (gap, gamma) in self.gamma.items():
            lines.append(f"  {kind:<26}{gap:>9.2f}{gamma:>9.2f}")
        for question, before, after in self.samples:
            lines += ["", f"> {question}", f"  before: {before}", f"  after:  {after}"]
        lines += ["", _NOTE, "", f"Adapter: {self.result.output_dir}"]
        if self.report_path is not None:
            lines.append(f"Report:  {self.report_path}")
        lines.append(f"Time:    {self.seconds:.0f} s")
        return "\n".join(lines)


def run_demo(
    output_dir: str | Path = "rmipo-demo",
    seed: int = 0,
    report: bool = True,
    **config: Any,
) -> DemoResult:
    """Train the shipped tiny model on the shipped pairs and score it before and after.

    Args:
        output_dir: folder for adapter and report; must be new or empty.
        seed: of training (order, adapter) and of the sampled answers.
        report: whether to write `report.html` into the folder.
        **config: options of `RMiPOConfig`.

    Raises:
        FileExistsError: `output_dir` holds another run.
    """
    start = time.perf_counter()
    options = {"save_strategy": "no", "logging_steps": 5, **config}  # neither changes the training
    result = train(str(MODEL), load_rows(), output_dir=output_dir, seed=seed, **options)
    questions = held_out_questions()
    model, tokenizer = result.model, result.tokenizer
    with result.adapter_off():
        opponents = sample_answers(model, tokenizer, questions, seed=10_000 + seed)
        before = sample_answers(model, tokenizer, questions, seed=seed)
        gamma = gamma_by_pair_kind(model.get_base_model(), tokenizer, make_pairs(600))
    after = sample_answers(model, tokenizer, questions, seed=seed)
    samples = _samples(questions, before, after)
    path = result.output_dir / "report.html" if report else None
    demo = DemoResult(
        result=result,
        before=score_answers(questions, before, opponents),
        after=score_answers(questions, after, opponents),
        samples=samples,
        gamma=gamma,
        prompts=len(questions),
        seconds=time.perf_counter() - start,
        report_path=path,
    )
    if path is not None:
        result.report(path, extra_sections=_sections(demo))
    return demo


def _samples(
    questions: list[Question], before: list[Answer], after: list[Answer]
) -> list[tuple[str, str, str]]:
    """Every n-th prompt in order: taken by position, so good and bad ones alike are shown."""
    step = len(questions) // SAMPLES_SHOWN
    places = range(step // 2, step * SAMPLES_SHOWN, step)
    return [(questions[i].text, before[i].text, after[i].text) for i in places]


def _sections(demo: DemoResult) -> list[tuple[str, str]]:
    """The demo's own part of the report: (title, HTML)."""
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in ANSWER_SHARES.items())
    gamma = [(kind, f"{gap:.2f}", f"{value:.2f}") for kind, (gap, value) in demo.gamma.items()]
    return [
        (
            f"True reward on {demo.prompts} held-out prompts",
            html_table(("", "before", "after"), list(demo.rows()))
            + f"<p>{escaped(_NOTE)} The supervised text mixed {shares} answers, "
            f"{WORDY_SHARE:.0%} of each kind wordy.</p>",
        ),
        ("Margin by kind of pair", html_table(("pair", "mean PMI gap", "mean gamma"), list(gamma))),
        ("Samples by position", html_table(("prompt", "before", "after"), list(demo.samples))),
    ]
