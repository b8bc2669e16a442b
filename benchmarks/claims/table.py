"""Tables of the study, from its rows: regret of the untuned default, end rules, shapes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.claims.cells import ANCHOR, LOSSES, SFT

Rows = Sequence[dict[str, str]]
Runs = dict[str, dict[str, str]]  # seed -> row


class Setting(NamedTuple):
    """What one chooses, or doesn't have to: everything of a cell but its task and seed."""

    loss: str
    rate: str
    balance: str = "auto"
    anchor: str = str(ANCHOR)
    sft: str = str(SFT)

    @classmethod
    def of(cls, row: dict[str, str]) -> Setting:
        """That of a row."""
        return cls(*(row[name] for name in cls._fields))

    def __str__(self) -> str:
        """For people."""
        options = {"balance": self.balance == "off", "anchor": self.anchor == "0.0"}
        off = [name for name, is_off in {**options, "sft": self.sft == "0.0"}.items() if is_off]
        return f"{self.loss}, {self.rate}" + (f", {' and '.join(off)} off" if off else "")


DEFAULT = Setting("rmipo", "auto")


class Regret(NamedTuple):
    """Of a setting on a task, against the best cell of the grid; rewards, with standard errors."""

    world: str
    task: str
    reward: float
    error: float
    best: Setting
    best_reward: float
    regret: float
    regret_error: float  # of the differences seed by seed
    seeds: int
    own: tuple[float, float] | None  # likewise against the same with its best rate, if it has any


def grid(rows: Rows, world: str, task: str) -> dict[Setting, Runs]:
    """Setting -> seed -> row, of the runs in the usual shape."""
    found: dict[Setting, Runs] = defaultdict(dict)
    usual = _usual_shape(rows, world)
    for row in rows:
        if (row["world"], row["task"]) == (world, task) and _shape(row) == usual:
            found[Setting.of(row)][row["seed"]] = row
    return dict(found)


def _shape(row: dict[str, str]) -> tuple[str, ...]:
    return row["steps"], row["batch"], row["rank"]


def _usual_shape(rows: Rows, world: str) -> tuple[str, ...]:
    return statistics.mode(_shape(row) for row in rows if row["world"] == world)


def rewards(runs: Runs) -> list[float]:
    """By seed, in order."""
    return [float(runs[seed]["reward"]) for seed in sorted(runs)]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; none of one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def _shown(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def regrets(rows: Rows, setting: Setting = DEFAULT) -> Iterable[Regret]:
    """One for every task that has the setting and a tuned cell."""
    for world, task in dict.fromkeys((row["world"], row["task"]) for row in rows):
        cells = grid(rows, world, task)
        tuned = {s: runs for s, runs in cells.items() if not s.rate.startswith("auto")}
        if setting not in cells or not tuned:
            continue
        mine = cells[setting]
        best, apart = _lost(mine, tuned)
        same = {s: runs for s, runs in tuned.items() if s._replace(rate="auto") == setting}
        yield Regret(
            world, task, *mean_error(rewards(mine)), best, mean_error(rewards(tuned[best]))[0],
            *mean_error(apart), len(apart), mean_error(_lost(mine, same)[1]) if same else None,
        )  # fmt: skip


def _lost(mine: Runs, others: dict[Setting, Runs]) -> tuple[Setting, list[float]]:
    """The best of the others, and how much more it earns, seed by seed."""
    best = max(others, key=lambda s: statistics.mean(rewards(others[s])))
    both = sorted(set(mine) & set(others[best]))
    return best, [float(others[best][s]["reward"]) - float(mine[s]["reward"]) for s in both]


def regret_table(rows: Rows, setting: Setting = DEFAULT) -> str:
    """As Markdown."""
    columns = ("world", "task", "reward", "best tuned cell", "its reward", "regret", "seeds",
               "against its own best rate")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in regrets(rows, setting):
        lines.append(
            f"| {r.world} | {r.task} | {_shown(r.reward, r.error)} | {r.best} | "
            f"{r.best_reward:.3f} | {_shown(r.regret, r.regret_error, '+')} | {r.seeds} | "
            f"{_shown(*r.own, '+') if r.own else ''} |"
        )
    return "\n".join(lines)


def rate_table(rows: Rows, world: str, task: str) -> str:
    """Reward by loss and rate, with every default on."""
    cells = grid(rows, world, task)
    return _by_rate({s: rewards(runs) for s, runs in cells.items() if s == Setting(s.loss, s.rate)})


def bare_table(rows: Rows, world: str, task: str) -> str:
    """Likewise without anchor and likelihood, the better of balance on and off."""
    found: dict[Setting, list[float]] = {}
    for setting, runs in grid(rows, world, task).items():
        if (setting.anchor, setting.sft) == ("0.0", "0.0"):
            loss, values = Setting(setting.loss, setting.rate), rewards(runs)
            found[loss] = max(found.get(loss, values), values, key=statistics.mean)
    return _by_rate(found)


def _by_rate(found: dict[Setting, list[float]]) -> str:
    rates = list(dict.fromkeys(setting.rate for setting in found))
    rates.sort(key=lambda rate: (rate.startswith("auto"), 0 if rate[0] == "a" else float(rate)))
    lines = ["| loss | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for loss in LOSSES:
        runs = [found.get(Setting(loss, rate)) for rate in rates]
        if any(runs):
            texts = [f"{statistics.mean(r):.3f}" if r else "" for r in runs]
            lines.append(f"| {loss} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


_RULES = {
    "nothing": ("off", "0.0", "0.0"),
    "balance": ("auto", "0.0", "0.0"),
    "anchor": ("off", str(ANCHOR), "0.0"),
    "likelihood": ("off", "0.0", str(SFT)),
    "balance, anchor": ("auto", str(ANCHOR), "0.0"),
    "balance, likelihood": ("auto", "0.0", str(SFT)),
    "anchor, likelihood": ("off", str(ANCHOR), str(SFT)),
    "all, the default": ("auto", str(ANCHOR), str(SFT)),
}
_COUNTED = ("reward", "unended", "empty", "garbled", "tokens", "chosen tokens")


def end_rule_table(rows: Rows, world: str, task: str, rate: str) -> str:
    """What each of the three does to the default's answers, alone and together; seeds' means."""
    cells = grid(rows, world, task)
    lines = ["| on | " + " | ".join(_COUNTED) + " |", "|---" * (len(_COUNTED) + 1) + "|"]
    for name, rule in _RULES.items():
        runs = cells.get(Setting(DEFAULT.loss, rate, *rule))
        if runs:
            means = [statistics.mean(float(r[n]) for r in runs.values()) for n in _COUNTED]
            shown = [f"{means[0]:.3f}", *(f"{m:.1%}" for m in means[1:4])]
            shown += [f"{m:.1f}" for m in means[4:]]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def shape_table(rows: Rows, world: str, loss: str = DEFAULT.loss) -> str:
    """The default in other shapes: reward, and the rate that was found, by task."""
    usual = _usual_shape(rows, world)
    found: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for row in rows:
        if row["world"] == world and Setting.of(row) == DEFAULT._replace(loss=loss):
            some = found[_shape(row)].setdefault(row["task"], [])
            some.append((float(row["reward"]), float(row["found rate"])))
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["world"] == world))
    lines = ["| steps, batch, rank | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for shape in sorted(found, key=lambda s: (s != usual, [float(part) for part in s])):
        texts = []
        for task in tasks:
            runs = found[shape].get(task, [])
            texts.append(
                f"{statistics.mean(r for r, _ in runs):.3f} "
                f"({statistics.geometric_mean(rate for _, rate in runs):.1e})" if runs else ""
            )  # fmt: skip
        lines.append(f"| {', '.join(shape)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def start_table(rows: Rows, world: str, loss: str = DEFAULT.loss) -> str:
    """A search that begins elsewhere, minus the usual one, seed by seed."""
    lines = ["| task | begins at | rate found | reward minus the usual |", "|---|---|---|---|"]
    for task in dict.fromkeys(row["task"] for row in rows if row["world"] == world):
        cells = grid(rows, world, task)
        usual = cells.get(DEFAULT._replace(loss=loss), {})
        for setting, runs in cells.items():
            both = sorted(set(runs) & set(usual))
            begun = setting._replace(rate="auto") == DEFAULT._replace(loss=loss)
            if setting.rate.startswith("auto from ") and begun and both:
                apart = [float(runs[s]["reward"]) - float(usual[s]["reward"]) for s in both]
                rate = statistics.geometric_mean(float(r["found rate"]) for r in runs.values())
                start = setting.rate.removeprefix("auto from ")
                shown = _shown(*mean_error(apart), "+")
                lines.append(f"| {task} | {start} | {rate:.1e} | {shown} |")
    return "\n".join(lines)
