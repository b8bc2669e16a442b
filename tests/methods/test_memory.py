"""Methods that remember, against recorded runs of their own code, step by step."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rmipo_lite.methods.formulas import MethodOptions
from rmipo_lite.methods.memory import Memory, Terms, beta_step
from rmipo_lite.methods.sums import PairSums, pair_sums
from rmipo_lite.methods.table import SumLoss, defaults_of, method_named, methods
from rmipo_lite.model.head import ModelHead
from rmipo_lite.step.perturbed import perturbed_signs
from tests.methods.golden import Opts, close, golden, needs_golden, numbers, recorded, sums

REMEMBERING = [
    name for name, m in methods().items() if isinstance(m, SumLoss) and m.remembers is not None
]


def _options(name: str, **given: Any) -> MethodOptions:
    constants = {**defaults_of(name), **given}
    return MethodOptions(**{f: constants.get(f) or 0.0 for f in MethodOptions._fields})


def _translated(sequence: Opts) -> Opts:
    """Their constants by our names."""
    theirs = sequence["opts"]
    ours = {"beta": theirs["beta"], "length_norm": sequence["fed"] == "mean"}
    if "gamma_beta_ratio" in theirs:
        ours["simpo_gamma"] = theirs["beta"] * theirs["gamma_beta_ratio"]
    named = {
        "alpha": "alpha", "a": "alpha", "mode_weight": "beta_dpo_rho", "tau": "gamma_po_tau",
        "epsilon": "epsilon",
    }  # fmt: skip
    ours |= {named[name]: value for name, value in theirs.items() if name in named}
    if sequence["method"] == "alpha_dpo":  # epsilon_dpo's has no effect there
        ours["label_smoothing"] = theirs["label_smoothing"]
    return ours


def _memory(name: str, options: MethodOptions) -> Memory:
    method = method_named(name)
    assert isinstance(method, SumLoss)
    assert method.remembers is not None
    return Memory(method.remembers, options, seed=0)


def _terms(memory: Memory, pairs: PairSums, options: MethodOptions, step: Opts) -> Terms:
    """Ours, where chance has given us what it gave them."""
    if "sampled_gaps" in step:
        kept = memory.now["gaps"]
        memory.now = {**memory.now, "gaps": step["sampled_gaps"]}
        terms = memory.terms(pairs)
        assert memory._next is not None
        added = memory._next["gaps"][len(step["sampled_gaps"]) :]
        memory._next = {**memory._next, "gaps": [*kept, *added][-2048:]}
        return terms
    terms = memory.terms(pairs)
    if "selected" in step:
        assert memory._next is not None
        return beta_step(
            pairs.detached().gap, options, memory._next, torch.tensor(step["selected"])
        )
    return terms


def _sequences(name: str) -> list[Opts]:
    return [sequence for sequence in recorded()["sequences"] if sequence["method"] == name]


@needs_golden
@pytest.mark.parametrize("name", REMEMBERING)
def test_recorded_runs(name: str) -> None:
    _, cases, _ = golden()
    method, compared = method_named(name), 0
    assert isinstance(method, SumLoss)
    for sequence in _sequences(name):
        options = _options(name, **_translated(sequence))
        memory = _memory(name, options)
        if "initial_queue" in sequence:
            memory.now = {**memory.now, "gaps": sequence["initial_queue"]}
        for step in sequence["steps"]:
            pairs, leaf = sums(cases[step["case"]])
            if "signs" in step:
                pairs = pairs._replace(signs=numbers(step["signs"]))
                memory.now = {**memory.now, "beta": step["beta_before"]}  # float32 there
            if "error" in step or not numbers([step["loss"]]).isfinite().all():
                ours = method.formula(pairs, options, memory.terms(pairs))
                assert ours.isfinite().all()  # theirs raises, or is NaN from here on
                break
            terms = _terms(memory, pairs, options, step)
            loss = method.formula(pairs, options, terms).mean()
            loss.backward()
            memory.commit()
            assert leaf.grad is not None
            assert close(loss.detach()[None], numbers([step["loss"]]), 1e-10, 1.0), step["case"]
            for side, theirs in ((leaf.grad[0::2], step["gw"]), (leaf.grad[1::2], step["gl"])):
                assert close(side, numbers(theirs), 1e-10, 1e-3), step["case"]
            for side, theirs in zip(method.rewards(pairs, options), ("rw", "rl"), strict=True):
                if theirs in step and name != "epsilon_dpo":  # whose follow the pair's own beta
                    assert close(side.detach(), numbers(step[theirs]), 1e-10, 1.0)
            _is_remembered(memory, step)
            compared += 1
    assert compared >= 15


def _is_remembered(memory: Memory, step: Opts) -> None:
    theirs = {
        "mean": step.get("ema_mean") or step.get("gap_mean"),
        "std": step.get("ema_std") or step.get("gap_std"),
    }
    for name, value in theirs.items():
        if value is not None:
            assert memory.now[name] == pytest.approx(value[0], rel=1e-10, abs=1e-10)
    if "queue_len_after" in step:
        assert len(memory.now["gaps"]) == step["queue_len_after"]


@needs_golden
def test_epsilon_follows_its_beta() -> None:
    """One step is one update: theirs of two micro-batches is ours of both together."""
    _, cases, _ = golden()
    for sequence in _sequences("epsilon_dpo"):
        options = _options("epsilon_dpo", **_translated(sequence))
        memory, signs = _memory("epsilon_dpo", options), []
        for step in sequence["steps"]:
            signs += [sum(step["signs"]) / len(step["signs"])]
            assert memory.now["beta"] == pytest.approx(step["beta_before"], rel=1e-6)
            if step["sync"]:
                pairs, _ = sums(cases[step["case"]])
                mean = torch.full_like(pairs.chosen, sum(signs) / len(signs))
                memory.terms(pairs._replace(signs=mean))
                memory.commit()
                signs = []


@needs_golden
def test_epsilon_signs_of_logits() -> None:
    """A head that is the identity takes logits for hidden states."""
    cases = {case["id"]: case for case in recorded()["logit_cases"]}
    found = 0
    for row in recorded()["rows"]:
        if row["method"] != "epsilon_dpo":
            continue
        case = cases[row["case"]]
        logits, reference = torch.tensor(case["logits"]), torch.tensor(case["ref_logits"])
        ids, scored = torch.tensor(case["input_ids"]), torch.tensor(case["completion_mask"]).bool()
        order = [side * case["B"] + pair for pair in range(case["B"]) for side in (0, 1)]
        rows = [(r, t) for r in order for t in range(1, ids.shape[1]) if scored[r, t]]
        lengths = [int(scored[r, 1:].sum()) for r in order]
        head = ModelHead(torch.eye(case["V"]), None, None, 1.0)
        signs = perturbed_signs(
            torch.stack([logits[r, t - 1] for r, t in rows]), head,
            torch.stack([reference[r, t - 1] for r, t in rows]), head,
            torch.stack([ids[r, t] for r, t in rows]),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), row["opts"]["epsilon"],
        )  # fmt: skip
        assert signs.tolist() == row["signs"]
        found += 1
    assert found >= 3


def _pairs(count: int, seed: int = 0, equal: bool = False) -> PairSums:
    draw = torch.Generator().manual_seed(seed)
    sides = -20 * torch.rand(2 * count, dtype=torch.float64, generator=draw)
    reference = (
        sides if equal else sides + torch.randn(2 * count, dtype=torch.float64, generator=draw)
    )
    borders = torch.arange(0, 7 * (2 * count) + 1, 7, dtype=torch.int32)
    signs = torch.tensor([1.0, -1.0, 0.0] * count)[:count]
    return pair_sums(sides, borders, reference, signs)


def _loss(name: str, memory: Memory, pairs: PairSums, terms: Terms) -> Tensor:
    method = method_named(name)
    assert isinstance(method, SumLoss)
    return method.formula(pairs, memory.options, terms)


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("pairs", [_pairs(1), _pairs(4, equal=True)], ids=["one pair", "no gap"])
def test_steps_without_a_spread_are_defined(name: str, pairs: PairSums) -> None:
    memory = _memory(name, _options(name))
    for _ in range(2):
        assert _loss(name, memory, pairs, memory.terms(pairs)).isfinite().all()
        memory.commit()
    assert _loss(name, memory, pairs, memory.at_rest(pairs)).isfinite().all()


@pytest.mark.parametrize("name", REMEMBERING)
def test_only_a_step_that_counts_is_remembered(name: str) -> None:
    memory, pairs = _memory(name, _options(name)), _pairs(6)
    before = dict(memory.now)
    first = memory.terms(pairs)
    again = memory.terms(pairs)  # a step repeated draws the same numbers
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    memory.at_rest(_pairs(9, seed=4))
    assert memory.now == before
    with memory.put_back():
        memory.terms(pairs)
        memory.commit()
        assert memory.now != before
    assert memory.now == before
    memory.commit()
    assert memory.now == before  # what was tried isn't left over


@pytest.mark.parametrize("name", REMEMBERING)
def test_pairs_of_an_evaluation_stand_apart(name: str) -> None:
    memory, pairs = _memory(name, _options(name)), _pairs(6)
    memory.terms(pairs)
    memory.commit()
    whole = _loss(name, memory, pairs, memory.at_rest(pairs))
    part = PairSums(*(None if x is None else x[2:4] for x in pairs))
    torch.testing.assert_close(_loss(name, memory, part, memory.at_rest(part)), whole[2:4])


def test_beta_dpo_draws_by_distance() -> None:
    """Pairs near the running mean more often, each at most once, and every pair sometimes."""
    options = _options("beta_dpo", beta_dpo_rho=0.5)
    memory, pairs = _memory("beta_dpo", options), _pairs(8, seed=3)
    memory.now = {**memory.now, "mean": pairs.gap.mean().item(), "std": pairs.gap.std().item()}
    counts = torch.zeros(8)
    for seed in range(400):
        memory.seed = seed
        terms = memory.terms(pairs)
        assert int((terms.weight > 0).sum()) == 4
        counts += terms.weight > 0
    near = (pairs.gap - pairs.gap.mean()).abs().argsort()
    assert counts[near[:2]].min() > counts[near[-2:]].max() + 60
    assert counts.min() > 0
