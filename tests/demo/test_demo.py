"""The embedded default: task, true reward, shipped files, and that training on them helps."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import torch

from rmipo_lite import demo
from rmipo_lite.demo import task
from rmipo_lite.demo.data import ASSETS, load_tokenizer
from rmipo_lite.demo.facts import KINDS, all_facts
from rmipo_lite.demo.run import run_demo
from rmipo_lite.demo.scoring import Answer, score_answers
from scripts.make_demo_model import (
    Corpus,
    Recipe,
    make_model,
    make_tokenizer,
    pretrain,
    training_questions,
    write_pairs,
)


def question(kind: str) -> task.Question:
    fact = next(fact for fact in all_facts() if fact.kind == kind)
    return task.Question(fact, kind)


@pytest.mark.parametrize(
    ("text", "ended", "reward"),
    [
        ("The sum is 2.", True, 1.0),
        ("2.", True, 1.0),
        ("  the SUM is  2", True, 1.0),
        ("The sum is 3.", True, -0.5),
        ("The sum is 2 3.", True, -0.5),
        ("", True, -0.5),
        ("I am not sure.", True, 0.0),
        ("The sum is 2.", False, 0.5),
        ("The sum is 2. The sum is 2. The sum is 2.", True, 1.0 - 4 * 0.05),
        ("The sum is 2. I am not sure.", True, 0.0),
        ("Well. " * 40 + "The sum is 2.", False, 0.0),
    ],
)
def test_reward_by_hand(text: str, ended: bool, reward: float) -> None:
    one_plus_one = question("sum")
    assert one_plus_one.fact.subject == ("1", "1")
    assert task.true_reward(one_plus_one, text, ended) == pytest.approx(reward)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_the_maker_earns_what_it_should(kind: str) -> None:
    rng = random.Random(0)
    for fact in [fact for fact in all_facts() if fact.kind == kind]:
        asked = task.Question(fact, "")
        assert task.true_reward(asked, task.right_answer(fact)) == 1.0
        assert task.true_reward(asked, task.wrong_answer(fact, rng)) == -0.5
        assert 0.0 < task.true_reward(asked, task.wordy_answer(fact, rng)) < 1.0


def test_held_out_questions_stand_nowhere_else() -> None:
    held = task.held_out_questions()
    texts = {asked.text for asked in held}
    pairs = task.make_pairs(1000)
    assert len(texts) == len(held) >= 200
    assert not texts & {asked.text for asked in training_questions()}
    assert not texts & {pair.question.text for pair in pairs}
    groups = {(pair.question.fact.kind, pair.question.fact.group) for pair in pairs}
    assert not groups & {(asked.fact.kind, asked.fact.group) for asked in held}


def test_shipped_pairs_are_those_of_the_script_and_agree_with_the_reward(tmp_path) -> None:
    shipped = (ASSETS / "pairs.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(shipped).splitlines()]
    write_pairs(tmp_path / "pairs.jsonl.gz", Recipe().pairs)
    again = (tmp_path / "pairs.jsonl.gz").read_bytes()
    assert gzip.decompress(again) == gzip.decompress(shipped)
    assert len(rows) == Recipe().pairs
    for pair, row in zip(task.make_pairs(len(rows)), rows, strict=True):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert task.true_reward(pair.question, chosen) > task.true_reward(pair.question, rejected)
    assert {row["pair_kind"] for row in rows} == set(task.PAIR_KINDS)


def test_the_annotator_who_likes_length() -> None:
    """The same questions; every chosen answer right, wordy and longer, and worse by the reward."""
    rows, usual = demo.length_biased_rows(), demo.load_rows()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in usual]
    assert rows == demo.length_biased_rows()
    for pair, row in zip(task.make_pairs(len(rows)), rows, strict=True):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert len(chosen.split()) > len(rejected.split())
        assert task.read_answer(chosen) == pair.question.fact.answer
        if pair.kind == "terse/wordy":
            assert task.true_reward(pair.question, chosen) < task.true_reward(
                pair.question, rejected
            )


def test_assets_are_small_and_the_tokenizer_takes_any_text() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 4 * 2**20
    tokenizer = load_tokenizer()
    for text in ("What is 3 + 4?", "Wie kocht man ein Ei? ö 漢", "tabs\tand\nlines"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s><|user|>Hi<|end|><|assistant|>"


def test_making_the_model_is_deterministic() -> None:
    recipe = Recipe(clean_steps=2, mixed_steps=2, batch_size=8, hidden_size=16, num_layers=1)
    tokenizer = make_tokenizer(recipe.vocab_size)
    assert tokenizer.get_vocab() == load_tokenizer().get_vocab()
    runs = []
    for _ in range(2):
        model = make_model(recipe, tokenizer)
        runs.append((pretrain(model, Corpus(recipe, tokenizer), recipe), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert len(runs[0][0]) == 4
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_score_by_hand() -> None:
    asked = [question("sum")] * 4
    right, wrong = Answer("The sum is 2.", True, 6), Answer("The sum is 3.", True, 6)
    unsure, endless = Answer("I am not sure.", True, 6), Answer("The sum is 2.", False, 64)
    score = score_answers(asked, [right, right, unsure, endless], [right, wrong, right, unsure])
    assert score.win_rate == (0.5 + 1 + 0 + 1) / 4
    assert score.full_marks == 0.5
    assert score.mean_reward == (1 + 1 + 0 + 0.5) / 4
    assert score.generic == 0.25
    assert score.unended == 0.25
    assert score.mean_tokens == (6 + 6 + 6 + 64) / 4


def test_a_short_demo_runs_and_reports(tmp_path) -> None:
    demo = run_demo(tmp_path / "run", max_steps=2)
    assert demo.prompts >= 200
    assert demo.before.win_rate == pytest.approx(0.5, abs=0.1)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "win rate by true reward" in page
    assert "specific/generic" in demo.summary()
    # The generic answer says the same to every question; the right one fits its question alone.
    assert demo.gamma["specific/generic"][0] > demo.gamma["right/wrong"][0] > 0


@pytest.mark.slow
def test_win_rate_rises_by_15_points_over_three_seeds(tmp_path) -> None:
    rises = []
    for seed in range(3):
        demo = run_demo(tmp_path / str(seed), seed=seed, report=False)
        rises.append(demo.after.win_rate - demo.before.win_rate)
        assert demo.after.full_marks - demo.before.full_marks >= 0.15
        assert demo.after.unended <= 0.02
    assert sum(rises) / len(rises) >= 0.15
    assert min(rises) >= 0.1
