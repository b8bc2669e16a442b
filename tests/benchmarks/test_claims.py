"""The study behind docs/claims.md: its grid, its rewards, and that no run is made twice."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.claims import cells, page, prompts, small, stories, table, write_page
from benchmarks.claims.cells import Cell
from benchmarks.claims.runs import KEYS, NUMBERS, read
from rmipo_lite.data.length_balance import fit_length_balance
from rmipo_lite.demo.data import load_tokenizer
from rmipo_lite.demo.scoring import Answer

TASKS = tuple(small.TASKS)


def test_the_grid_holds_every_setting_once_and_spans_the_rates() -> None:
    grid = list(dict.fromkeys(cells.small(TASKS)))
    assert max(cells.RATES) / min(cells.RATES) >= 30
    for task in TASKS:
        balances = ("auto",) if task in cells.UNWEIGHED else ("auto", "off")
        for loss in (*cells.UNTUNED, *cells.TUNED):
            for balance in balances:
                untuned = loss in cells.UNTUNED
                for rate in (*["auto"] * untuned, *map("{:g}".format, cells.RATES)):
                    for seed in range(5 if untuned else 2):
                        cell = Cell("demo", task, loss, rate, seed, balance)
                        assert cell in grid or replace(cell, anchor=0.0, sft=0.0) in grid
        rules = {(c.balance, c.anchor, c.sft) for c in grid if c.task == task}
        guards = itertools.product((0.0, 0.1), (0.0, 0.5))
        assert {(balance, *both) for balance, both in itertools.product(balances, guards)} == rules
        shapes = {(c.rank, c.batch, c.steps) for c in grid if c.task == task and c.rate == "auto"}
        assert {(4, 16, 80), (32, 16, 80), (16, 8, 80), (16, 64, 80), (16, 16, 40)} <= shapes


def test_nothing_is_weighed_where_balance_is_left_out() -> None:
    """There a run without balance is the same run, and the rows stand for both."""
    tokenizer = load_tokenizer()
    for task, rows in small.TASKS.items():
        chosen, rejected = (
            [len(tokenizer(row[side][0]["content"])["input_ids"]) + 1 for row in rows()]
            for side in ("chosen", "rejected")
        )
        found = fit_length_balance(chosen, rejected)
        assert (found is None or not found.is_used) == (task in cells.UNWEIGHED), task


def test_where_longer_is_better_the_labels_follow() -> None:
    rows = small.TASKS["longer is better"]()
    sides = [
        [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in rows
    ]
    longer = sum(chosen > rejected for chosen, rejected in sides)
    assert longer > 1.3 * sum(chosen < rejected for chosen, rejected in sides)


@pytest.mark.slow
def test_no_run_is_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["claims", "--quick", "--output_dir", str(tmp_path)])
    (row,) = read(tmp_path / "quick" / "claims" / "claims.csv")
    assert (row["task"], row["rate"], row["steps"]) == ("clean", "0.001", "2")
    assert all(0 <= float(row[name]) <= 1 for name in ("win rate", "garbled", "accuracy"))
    assert float(row["reward before"]) == pytest.approx(float(row["reward"]), abs=0.1)
    main(["claims", "--quick", "--output_dir", str(tmp_path)])
    assert len(read(tmp_path / "quick" / "claims" / "claims.csv")) == 1
    assert "1 rows are there, 0 runs to make" in capsys.readouterr().out


def test_a_real_models_answers_are_samples_of_the_likeliest() -> None:
    """Chi-squared of 20,000 draws against the likeliest 95 %, and nothing else."""
    from benchmarks.claims.real import SHARE, _Sampled

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 1500, generator=generator)
    wanted, words = logits.softmax(-1)[0].sort(descending=True)
    wanted = wanted[wanted.cumsum(0) - wanted < SHARE]
    torch.manual_seed(1)
    drawn = _Sampled()(torch.empty(0), logits.expand(20000, -1)).argmax(-1)
    found = drawn.bincount(minlength=1500)[words]
    assert found[len(wanted) :].sum() == 0
    expected = 20000 * wanted / wanted.sum()
    chi_squared = ((found[: len(wanted)] - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - len(wanted)) < 4 * (2 * len(wanted)) ** 0.5


def test_a_world_of_stories_labels_what_its_model_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, glad, plain = '"Hi!" he said. "Yes."', "She was happy.", "He sat down. " * 9
    tries = [[talk, plain], [plain, glad], [glad, talk]]
    lines = [
        {"prompt": f"Tom had a {n}.", "answers": [
            {"text": text, "ended": True, "tokens": 5} for text in (*two, *two)]}
        for n, two in enumerate(tries * 20)
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(stories, "MODEL", str(tmp_path))
    clean = stories.TASKS["clean"]()
    assert len(clean) == 120
    kinds = {(row["chosen"], row["rejected"]) for row in clean}
    assert kinds == {(talk, plain), (glad, plain), (talk, glad)}
    noisy = sum(row not in clean for row in stories.TASKS["noisy"]())
    assert 0.05 < noisy / len(clean) < 0.3
    assert (plain, glad) in {
        (row["chosen"], row["rejected"]) for row in stories.TASKS["length-loving"]()
    }
    stories._lexicon.cache_clear()
    broken = Answer("he sat dowwn yess", True, 4)
    assert stories.is_garbled("", broken)
    assert stories.is_garbled("", Answer("he he he sat", True, 4))
    assert not stories.is_garbled("", Answer(plain, True, 4))
    assert stories.reward("clean", "", broken) == stories.true_reward(broken.text) - 0.5
    assert stories.true_reward(talk, ended=False) == pytest.approx(-0.4)
    stories._lexicon.cache_clear()


def test_the_third_world_trains_nothing_on_what_it_asks() -> None:
    assert len(stories.questions()) == 100
    assert not set(stories.questions()) & set(stories._some(held_out=False))
    cut = stories._two_sentences(' "No," he\n said. "Go!" They ran away. And so')
    assert cut == '"No," he said. "Go!"'
    grid = list(cells.stories(tuple(stories.TASKS)))
    assert len(set(grid)) == len(grid)


# ---- what a program can judge of a real model's answers ---------------------------------------


def _prompt(start: str, held_out: bool = False) -> prompts.Prompt:
    return next(p for p in prompts.prompts(held_out) if p.text.startswith(start))


def test_prompts_are_enough_and_the_held_out_ones_apart() -> None:
    used, held = prompts.prompts(False), prompts.prompts(True)
    assert len(used) >= 300
    assert len(held) >= 100
    assert not {p.text for p in used} & {p.text for p in held}
    assert {p.kind for p in used} == {p.kind for p in held} == {"sum", "fact", "instruction"}


@pytest.mark.parametrize(
    ("start", "right", "wrong", "nothing"),
    [
        ("What is the capital of Germany", "It is Berlin.", "Berlin or Paris", " "),
        ('What is the opposite of "big"', "small", "It is big.", ""),
        ("List three things about", "- They purr.\n- They sleep.\n- They eat.", "- One", ""),
        ("Give me JSON", '{"name": "x", "colour": "red"}', '{"name": "x"}', ""),
    ],
)
def test_rewards_of_answers(start: str, right: str, wrong: str, nothing: str) -> None:
    asked = _prompt(start)
    assert prompts.true_reward(asked, right) == 1.0
    assert prompts.true_reward(asked, wrong) == -0.5
    assert prompts.true_reward(asked, nothing) == 0.0
    assert prompts.true_reward(asked, right, ended=False) == 0.5
    long = right + " word" * 60
    assert prompts.true_reward(asked, long) < 1.0


def test_sums_are_judged_by_the_last_number() -> None:
    asked = _prompt("What is", held_out=True)
    asked = next(p for p in prompts.prompts(True) if p.kind == "sum")
    first, second = (int(word.strip("?")) for word in asked.text.split() if word[0].isdigit())
    value = first + second if "plus" in asked.text else first - second
    assert prompts.true_reward(asked, f"{first} and {second} make {value}.") == 1.0
    assert prompts.true_reward(asked, f"It is {value + 1}.") == -0.5
    assert prompts.true_reward(asked, "I do not know.") == 0.0


# ---- tables -----------------------------------------------------------------------------------


def _row(loss: str, rate: str, seed: int, reward: float, **changes: Any) -> dict[str, str]:
    cell = Cell("demo", "clean", loss, rate, seed, **changes)
    row = dict.fromkeys(NUMBERS, "0.001") | dict(zip(KEYS, cell.key, strict=True))
    return row | {"reward": str(reward), "device": "a", "torch": "b", "date": "c"}


def test_regret_is_against_the_best_tuned_cell_seed_by_seed(tmp_path: Path) -> None:
    rows = [_row("rmipo", "auto", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    rows += [_row("rmipo", "0.001", seed, 0.4 + 0.1 * seed) for seed in range(3)]
    rows += [_row("simper", "0.001", seed, 0.7 + 0.1 * seed) for seed in range(3)]
    rows += [_row("simper", "0.003", seed, 0.1) for seed in range(3)]
    rows += [_row("simper", "auto", seed, 0.9) for seed in range(3)]  # not tuned: no best cell
    (regret,) = table.regrets(rows)
    assert regret.best == table.Setting("simper", "0.001")
    assert regret.regret == pytest.approx(0.2)
    assert regret.regret_error == pytest.approx(0.0, abs=1e-9)
    assert regret.own == pytest.approx((-0.1, 0.0), abs=1e-9)
    assert regret.reward == pytest.approx(0.6)
    assert regret.error == pytest.approx(0.1 / 3**0.5)
    assert "| demo | clean | 0.600 ± 0.058 | simper, 0.001 | 0.800 | +0.200" in table.regret_table(
        rows
    )
    with (tmp_path / "claims.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert table.regret_table(read(tmp_path / "claims.csv")) == table.regret_table(rows)


def test_without_guards_the_better_of_both_balances_stands(tmp_path: Path) -> None:
    bare = {"anchor": 0.0, "sft": 0.0}
    rows = [
        _row("dpo 0.1", "0.001", seed, reward, balance=balance, **bare)
        for balance, rewards in (("auto", (0.1, 0.3)), ("off", (0.4, 0.2)))
        for seed, reward in enumerate(rewards)
    ]
    rows += [_row("rmipo", "0.003", 0, 0.9), _row("rmipo", "0.003", 0, 0.5, anchor=0.0)]
    assert table.bare_table(rows, "demo", "clean").splitlines() == [
        "| loss | 0.001 |", "|---|---|", "| dpo 0.1 | 0.300 |",
    ]  # fmt: skip


def test_the_page_has_a_table_of_everything_and_a_picture(tmp_path: Path) -> None:
    rows = [_row("rmipo", rate, seed, 0.5) for rate in ("auto", "0.001") for seed in range(3)]
    rows += [_row("rmipo", "auto", 0, 0.25, balance="off", anchor=0.0, sft=0.0)]
    rows += [_row("rmipo", "0.003", seed, 0.25) for seed in range(3)]
    rows += [_row("rmipo", "auto", 0, 0.75, steps=400)]
    rows += [_row("rmipo", "auto from 1e-07", seed, 0.375) for seed in range(2)]
    folder = tmp_path / "benchmarks"
    (folder / "claims").mkdir(parents=True)
    with (folder / "claims" / "claims.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "docs").mkdir()
    text = tmp_path / "docs" / "claims.md"
    text.write_text(f"before\n{page.BEGIN}old{page.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_page(folder)
        found = text.read_text(encoding="utf-8")
        assert found.startswith("before\n")
        assert found.endswith("\nafter\n")
        assert "old" not in found
        for line in (
            "| demo | clean | 0.500 ± 0.000 | rmipo, 0.001 | 0.500 | +0.000 ± 0.000 | 3 |",
            "| nothing | 0.250 | 0.1% | 0.1% | 0.1% | 0.0 | 0.0 |",
            "| all, the default | 0.500 | 0.1% | 0.1% | 0.1% | 0.0 | 0.0 |",
            "| 80, 16, 16 | 0.500 (1.0e-03) |",
            "| 400, 16, 16 | 0.750 (1.0e-03) |",
            "| clean | 1e-07 | 1.0e-03 | -0.125 ± 0.000 |",
        ):
            assert found.count(line) == 1, line
    assert (tmp_path / "docs" / "claims.png").stat().st_size > 1000
