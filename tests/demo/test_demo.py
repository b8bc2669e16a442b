"""The embedded default: task, true reward, shipped files, and that training on them helps."""

from __future__ import annotations

import json
import random

import pytest
import torch

from rmipo_lite import demo
from rmipo_lite.demo import task
from rmipo_lite.demo.data import ASSETS, load_tokenizer, swapped
from rmipo_lite.demo.facts import ANSWERS, KINDS, all_facts
from rmipo_lite.demo.run import run_demo
from rmipo_lite.demo.scoring import Answer, score_answers
from scripts.make_demo_model import (
    Corpus,
    Recipe,
    make_model,
    make_tokenizer,
    pair_questions,
    pretrain,
    sampled_pairs,
    training_questions,
)


def question(kind: str) -> task.Question:
    fact = next(fact for fact in all_facts() if fact.kind == kind)
    return task.Question(fact, kind)


@pytest.mark.parametrize(
    ("text", "ended", "reward"),
    [
        ("The sum is 2.", True, 1.0),
        ("That makes 2.", True, 1.0),
        ("  The  sum is 2. ", True, 1.0),
        ("The sum is 3.", True, -0.5),
        ("The opposite is big.", True, -0.5),
        ("In order it is a c a.", True, -0.5),
        ("I am not sure.", True, 0.0),
        ("Well, that is a good question. It is hard to say.", True, -0.15),
        ("The sum is 2.", False, 0.5),
        ("Well, that is a good question. The sum is 2.", True, 1.0 - 2 * 0.05),
        ("2.", True, -1.0),
        ("", True, -1.0),
        ("The sum is 2 3.", True, -1.0),
        ("The sum isor 2.", True, -1.0),
        ("the sum is 2.", True, -1.0),
        ("The sum is 2. I am not sure.", True, -1.0),
        ("The sum is 2. The sum is 2.", True, -1.0),
        ("Well. " * 40 + "The sum is 2.", False, -2.0),
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
        for wording in ANSWERS[kind]:
            assert task.true_reward(asked, wording.format(fact.answer)) == 1.0
        assert task.true_reward(asked, task.wrong_answer(fact, rng)) == -0.5
        wordy = task.wordy(task.right_answer(fact, rng), rng)
        assert 0.5 <= task.true_reward(asked, wordy) < 1.0
        assert task.length_lovers_reward(asked, wordy) > task.length_lovers_reward(
            asked, task.right_answer(fact, rng)
        )


def test_held_out_questions_stand_nowhere_else() -> None:
    held = task.held_out_questions()
    texts = {asked.text for asked in held}
    pairs = task.make_pairs(1000)
    assert len(texts) == len(held) >= 200
    assert not texts & {asked.text for asked in training_questions()}
    assert not texts & {pair.question.text for pair in pairs}
    groups = {(pair.question.fact.kind, pair.question.fact.group) for pair in pairs}
    assert not groups & {(asked.fact.kind, asked.fact.group) for asked in held}


def test_shipped_pairs_agree_with_the_reward() -> None:
    """Two answers to one question, none of them about a held-out fact, the better one chosen."""
    rows = demo.load_rows()
    questions = {asked.text: asked for asked in pair_questions(Recipe().prompts)}
    assert len(rows) >= 2000
    assert {row["prompt"][0]["content"] for row in rows} <= set(questions)
    for row in rows:
        asked = questions[row["prompt"][0]["content"]]
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert task.true_reward(asked, chosen) > task.true_reward(asked, rejected)
    held = {(asked.fact.kind, asked.fact.group) for asked in task.held_out_questions()}
    assert not held & {(asked.fact.kind, asked.fact.group) for asked in questions.values()}


def test_other_annotators_see_the_same_pairs() -> None:
    usual = demo.load_rows()
    noisy, wordy, easy = demo.noisy_rows(), demo.length_biased_rows(), demo.easy_rows()
    assert (noisy, wordy, easy) == (demo.noisy_rows(), demo.length_biased_rows(), demo.easy_rows())
    turned = [swapped(row) for row in usual]
    assert all(row in (a, b) for row, a, b in zip(noisy, usual, turned, strict=True))
    assert sum(row == b for row, b in zip(noisy, turned, strict=True)) / len(usual) == (
        pytest.approx(0.15, abs=0.02)
    )
    both = {json.dumps(row) for row in (*usual, *turned)}
    assert all(json.dumps(row) in both for row in wordy)
    longer = [
        len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in wordy
    ]
    assert sum(longer) > 0.6 * len(longer)
    assert len(easy) == len({json.dumps(row) for row in easy}) == 1600


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
    few = Recipe(prompts=4, answers=2)
    assert sampled_pairs(model, tokenizer, few) == sampled_pairs(model, tokenizer, few)


def test_score_by_hand() -> None:
    asked = [question("sum")] * 5
    right, wrong = Answer("The sum is 2.", True, 6), Answer("The sum is 3.", True, 6)
    unsure, endless = Answer("I am not sure.", True, 6), Answer("The sum is 2.", False, 64)
    broken = Answer("The sumis 2.", True, 6)
    score = score_answers(
        asked, [right, right, unsure, endless, broken], [right, wrong, right, unsure, broken]
    )
    assert score.win_rate == (0.5 + 1 + 0 + 1 + 0.5) / 5
    assert score.full_marks == 0.4
    assert score.mean_reward == pytest.approx((1 + 1 + 0 + 0.5 - 1) / 5)
    assert score.generic == score.garbled == score.unended == 0.2
    assert score.mean_tokens == (6 + 6 + 6 + 64 + 6) / 5


@pytest.mark.slow
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


@pytest.mark.measured
@pytest.mark.slow
def test_defaults_alone_over_three_seeds(tmp_path) -> None:
    """What docs/demo.md says, with room for other processors."""
    accuracy, wins = [], []
    for seed in range(3):
        demo = run_demo(tmp_path / str(seed), seed=seed, report=False)
        before, after = (
            metrics["eval_rewards/accuracies"]
            for metrics in (demo.result.metrics_before, demo.result.metrics)
        )
        assert 0.5 < before < 0.75
        accuracy.append(after - before)
        wins.append(demo.after.win_rate - demo.before.win_rate)
        assert demo.after.unended == 0
        assert demo.after.garbled < 0.1
    assert sum(accuracy) / 3 >= 0.12
    assert sum(wins) / 3 >= 0.2
