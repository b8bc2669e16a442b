from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.ops import head as head_module, head_blocks
from rmipo_lite.planning.budget import Checkpointing
from rmipo_lite.planning.footprint import Activations
from rmipo_lite.step import pair_step as step_module, pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair
from tests.conftest import ROOT
from tests.kit import random_pairs, tiny_model


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _step(model: nn.Module, tmp_path: Path, max_tokens: int = 10**6, **options) -> PairStep:
    return PairStep(model, RMiPOConfig(str(tmp_path), **options), max_tokens, packing=True)


def _backward(loss: torch.Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.5}, {"loss_type": "simpo"}])
def test_the_cut_into_micro_steps_changes_nothing(options: dict, tmp_path: Path) -> None:
    """8 pairs at once, one by one, and in ragged groups: one gradient."""
    model, pairs = tiny_model(), random_pairs(8)
    results = []
    for max_tokens in (10**6, 1, 60):
        model.zero_grad()
        outcome = _step(model, tmp_path, max_tokens, **options).train(pairs, _backward)
        results.append((len(outcome.values), outcome.loss, _gradients(model)))
    assert results[0][0] == 1
    assert results[1][0] == 8
    assert 1 < results[2][0] < 8
    for _, loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][1], atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][2][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"prior_context": "bos"}])
def test_the_prior_of_a_whole_step_is_one_pass(options: dict, tmp_path: Path) -> None:
    """Ahead of its micro-steps, which take what they would have computed."""
    model, pairs = tiny_model(), random_pairs(8)
    with_gradient: list[bool] = []

    def run(max_tokens_no_grad: int | None, max_tokens: int = 40) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with_gradient.clear()
        step = _step(model, tmp_path, max_tokens, **options)
        step.packing = step.args.packing
        step.prior_front = [7] if "prior_context" in options else []
        step.max_tokens_no_grad = max_tokens_no_grad
        outcome = step.train(pairs, _backward)
        gammas = pair_values.concat(outcome.values).gamma.tolist()
        gamma = dict(zip(outcome.rows, gammas, strict=True))
        return {**_gradients(model), "gamma": torch.tensor([gamma[p.row] for p in pairs])}

    hook = model.model.register_forward_pre_hook(
        lambda *_: with_gradient.append(torch.is_grad_enabled())
    )
    whole = run(None, 10**6)
    assert with_gradient == [False, True]
    cut = run(10**6)
    assert with_gradient.count(False) == 1
    assert len(with_gradient) > 3
    alike = run(None)
    assert with_gradient.count(False) > 1
    hook.remove()
    for found in (cut, alike):
        for name, value in found.items():
            torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4)


def test_long_micro_steps_alone_are_checkpointed(tmp_path: Path) -> None:
    """Of three layers one, two or none computes again, by the micro-step's tokens."""
    model, pairs = tiny_model(num_hidden_layers=3).train(), random_pairs(8)
    wanted = _step(model, tmp_path, 40).train(pairs, _backward)
    gradients = _gradients(model)
    model.zero_grad()
    step, calls = _step(model, tmp_path, 40), []
    sizes = [batch.micro_step_tokens(part, True) for part in step._split(pairs)]
    assert len({size > 30 for size in sizes}) == 2
    kept, again = Activations(0, 3, True), Activations(0, 1, True)
    step.enable_checkpointing(Checkpointing(3, kept, again, 90, None))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda *_, number=number: calls.append(number) if torch.is_grad_enabled() else None
        )
    outcome = step.train(pairs, _backward)
    torch.testing.assert_close(outcome.loss, wanted.loss)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, gradients[name])
    layers = [step.as_needed.layers_of(size) for size in sizes]
    assert set(layers) > {0}
    for number in range(3):
        assert calls.count(number) == len(sizes) + sum(count > number for count in layers)
    before = len(calls)
    list(step.evaluate(pairs))
    assert len(calls) == before
    assert all(layer.gradient_checkpointing for layer in model.model.layers)  # as it was prepared


def test_cached_prior_equals_live_while_the_policy_stands_still(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(6)
    live = _step(model, tmp_path).train(pairs, _backward)
    cached_step = _step(model, tmp_path, prior="cached")
    cached_step.prior_cache = cached_step.prior_means(pairs)
    cached = cached_step.train(pairs, _backward)
    torch.testing.assert_close(cached.loss, live.loss, atol=1e-5, rtol=0)
    # And the cache is used: another policy moves the live gamma only.
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    before = pair_values.concat(cached.values).chosen_pmi
    after = pair_values.concat(cached_step.train(pairs, _backward).values)
    moved_by = after.chosen_logps - pair_values.concat(cached.values).chosen_logps
    defined = ~before.isnan()
    torch.testing.assert_close(
        (after.chosen_pmi - before)[defined], moved_by[defined], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("cached", [False, True])
def test_a_float64_model_with_no_prior_token_at_all(cached: bool, tmp_path: Path) -> None:
    pairs = [TokenizedPair(0, [1, 5], [7], [8])]
    step = _step(tiny_model().double(), tmp_path)
    step.prior_cache = step.prior_means(pairs) if cached else None
    outcome = step.train(pairs, lambda loss: loss.backward())
    assert outcome.values[0].gamma.tolist() == [1.6]
    assert outcome.loss.isfinite()


def test_prior_context_bos_scores_the_first_token_too(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(2)
    step = _step(model, tmp_path, prior_context="bos")
    step.prior_front = [1]
    values = pair_values.concat([v for _, v in step.evaluate(pairs)])
    # Pair 1 has one-token responses, which without BOS have no prior.
    assert torch.isfinite(values.chosen_pmi).all()
    bare = pair_values.concat([v for _, v in _step(model, tmp_path).evaluate(pairs)])
    assert bare.chosen_pmi[1].isnan()
    assert bare.gamma[1] == pytest.approx(1.6)


def test_empty_prompt_of_bos_gives_no_gap(tmp_path: Path) -> None:
    """With BOS as the whole prompt, policy and prior pass read the same text: PMI 0."""
    pairs = [replace(pair, prompt_ids=[1]) for pair in random_pairs(3)]
    step = _step(tiny_model(), tmp_path, prior_context="bos")
    step.prior_front = [1]
    values = pair_values.concat([v for _, v in step.evaluate(pairs)])
    assert values.chosen_pmi.abs().max() < 1e-5
    assert values.pmi_gap.abs().max() < 1e-5


def _poison(model: nn.Module, token: int) -> None:
    """A pair that contains this token has a NaN log-prob and a NaN gradient."""
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan


def test_a_pair_that_is_not_finite_is_found_and_the_others_count(tmp_path: Path) -> None:
    model, pairs = tiny_model("llama"), random_pairs(5)
    good = [pair for i, pair in enumerate(pairs) if i != 2]
    clean = _step(model, tmp_path).train(good, _backward)
    wanted = _gradients(model)
    model.zero_grad()
    pairs[2] = replace(pairs[2], chosen_ids=[96, 5, 6])
    for i, pair in enumerate(pairs):
        if i != 2:
            pairs[i] = replace(
                pair,
                prompt_ids=[t if t != 96 else 3 for t in pair.prompt_ids],
                chosen_ids=[t if t != 96 else 3 for t in pair.chosen_ids],
                rejected_ids=[t if t != 96 else 3 for t in pair.rejected_ids],
            )
    _poison(model, 96)
    outcome = _step(model, tmp_path).train(pairs, _backward)
    assert [pair.row for pair in outcome.dropped] == [2]
    assert outcome.num_pairs == 4
    torch.testing.assert_close(outcome.loss, clean.loss, atol=1e-5, rtol=0)
    for name, gradient in _gradients(model).items():
        if "embed_tokens" not in name:
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_nothing_finite_leaves_no_gradient(tmp_path: Path) -> None:
    """An optimizer passes over parameters without a gradient: no momentum, no decay."""
    model, pairs = tiny_model(), random_pairs(3)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    outcome = _step(model, tmp_path).train(pairs, _backward)
    assert [pair.row for pair in outcome.dropped] == [0, 1, 2]
    assert outcome.num_pairs == 0
    assert outcome.loss == 0
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_has_no_gradient_and_the_same_values(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(4)
    values = pair_values.concat([v for _, v in _step(model, tmp_path).evaluate(pairs)])
    assert all(p.grad is None for p in model.parameters())
    trained = pair_values.concat(_step(model, tmp_path).train(pairs, _backward).values)
    torch.testing.assert_close(values.loss, trained.loss, atol=1e-6, rtol=0)


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    """The last token of a response is never embedded: only the head can notice."""
    pair = replace(random_pairs(1)[0], chosen_ids=[5, 97])
    with pytest.raises(ValueError, match="97"):
        _step(tiny_model(), tmp_path).train([pair], _backward)


OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"


class _Fault:
    """A function that runs out of memory at its `at`-th call."""

    def __init__(self, function: Callable, at: int) -> None:
        self.function, self.at, self.calls, self.raised = function, at, 0, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            self.raised += 1
            raise torch.OutOfMemoryError(OOM)
        return self.function(*args, **kwargs)


# where memory runs out -> the function that fails there, and its call in a step of one micro-step
PLACES = {
    "forward": (step_module, "scored_hidden", 1),
    "head": (head_blocks, "_add_product", 1),
    "loss": (step_module, "losses", 1),
    "prior": (step_module, "scored_hidden", 2),
    "prior's head": (head_blocks.native, "fold_logits", 2),
    "head's backward": (head_module, "_scale_directions", 1),
    "trained head's backward": (head_module, "_recompute_backward", 1),
}


def _lora_model() -> nn.Module:
    model = attach_adapter(tiny_model(), "new")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("place", [*PLACES, "backward", "second backward"])
def test_out_of_memory_halves_the_budget_and_loses_nothing(
    place: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tiny_model() if place.startswith("trained") else _lora_model()
    pairs, step = random_pairs(6), _step(model, tmp_path)
    step.packing = packing
    clean = step.train(pairs, _backward)
    wanted, whole = _gradients(model), batch.micro_step_tokens(pairs, packing)
    model.zero_grad()
    backward = _backward
    if place.endswith("backward") and place not in PLACES:
        if place.startswith("second"):  # the first micro-step's gradients are there already
            step.max_tokens = whole // 2
        fault = backward = _Fault(_backward, 2 if place.startswith("second") else 1)
    else:
        module, name, at = PLACES[place]
        fault = _Fault(getattr(module, name), at)
        monkeypatch.setattr(module, name, fault)
    before = step.max_tokens
    outcome = step.train(pairs, backward)
    assert fault.raised == 1
    assert step.max_tokens <= before // 2
    assert "Out of memory: micro-steps of at most" in capsys.readouterr().out
    assert outcome.num_pairs == 6
    assert not outcome.dropped
    assert sum(len(part.loss) for part in outcome.values) == 6
    torch.testing.assert_close(outcome.loss, clean.loss, atol=1e-5, rtol=0)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_an_error_in_the_middle_of_backward_leaves_no_half_gradient(tmp_path: Path) -> None:
    """Some parameters have their gradient by then; the repeat must not add to them."""
    model, pairs = tiny_model(), random_pairs(4)
    step = _step(model, tmp_path)
    step.train(pairs, _backward)
    wanted = _gradients(model)
    model.zero_grad()
    raised = []

    def fail_once(gradient: torch.Tensor) -> torch.Tensor:
        if not raised:
            raised.append(1)
            raise torch.OutOfMemoryError(OOM)
        return gradient

    # The first layer's input comes last in the backward pass.
    model.model.embed_tokens.weight.register_hook(fail_once)
    step.train(pairs, _backward)
    assert raised
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_one_pair_that_does_not_fit_gets_checkpointing_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny_model(), random_pairs(1)
    step = _step(model, tmp_path)
    wanted = step.train(pairs, _backward).loss
    fault = _Fault(step_module.scored_hidden, 2)  # the prior's pass is the first
    monkeypatch.setattr(step_module, "scored_hidden", fault)
    torch.testing.assert_close(step.train(pairs, _backward).loss, wanted)
    assert step.checkpointing
    assert model.model.layers[0].gradient_checkpointing
    fault.at = fault.calls + 1
    with pytest.raises(torch.OutOfMemoryError, match=r"one pair alone \(row 0, \d+ tokens\)"):
        step.train(pairs, _backward)


def test_no_checkpointing_where_the_user_said_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _step(tiny_model(), tmp_path, gradient_checkpointing=False)
    monkeypatch.setattr(step_module, "scored_hidden", _Fault(step_module.scored_hidden, 1))
    with pytest.raises(torch.OutOfMemoryError, match="one pair alone"):
        step.train(random_pairs(1), _backward)


def test_another_error_is_not_taken_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(step_module, "scored_hidden", fail)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        _step(tiny_model(), tmp_path).train(random_pairs(2), _backward)


def test_evaluation_and_cached_priors_survive_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny_model(), random_pairs(6)
    step = _step(model, tmp_path, prior="cached")
    values = pair_values.concat([v for _, v in step.evaluate(pairs)])
    cache = step.prior_means(pairs)
    fault = _Fault(step_module.scored_hidden, 2)
    monkeypatch.setattr(step_module, "scored_hidden", fault)
    again = pair_values.concat([v for _, v in step.evaluate(pairs)])
    assert fault.raised == 1
    torch.testing.assert_close(again.loss.sort()[0], values.loss.sort()[0], atol=1e-5, rtol=0)
    fault.at = fault.calls + 1
    assert step.prior_means(pairs) == {
        row: pytest.approx(means, abs=1e-5, nan_ok=True) for row, means in cache.items()
    }
    assert fault.raised == 2


@pytest.mark.slow
def test_real_memory_shortage_on_the_cpu(tmp_path: Path) -> None:
    """A child process whose address space ends: its allocator fails, and the step is repeated."""
    script = tmp_path / "short.py"
    script.write_text(_SHORT_OF_MEMORY)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Out of memory: micro-steps of at most" in done.stdout
    wanted, got = (float(number) for number in done.stdout.splitlines()[-1].split())
    assert got == pytest.approx(wanted, abs=1e-5)


_SHORT_OF_MEMORY = """
import resource, sys
import torch
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step.pair_step import PairStep
from tests.kit import random_pairs, tiny_model

torch.set_num_threads(1)
model = tiny_model(hidden_size=256, intermediate_size=1024, max_position_embeddings=1024)
pairs = random_pairs(24, longest=300)
args = RMiPOConfig(sys.argv[1], use_cpu=True)
small = PairStep(model, args, 600, packing=True)
wanted = small.train(pairs, lambda loss: loss.backward()).loss.item()  # also loads everything
model.zero_grad()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
whole = PairStep(model, args, 10**6, packing=True)
print(wanted, whole.train(pairs, lambda loss: loss.backward()).loss.item())
"""


@pytest.mark.cuda
def test_a_token_outside_the_vocabulary_is_an_error_on_cuda(tmp_path: Path) -> None:
    pair = replace(random_pairs(1)[0], chosen_ids=[5, 97])
    step = _step(tiny_model().cuda(), tmp_path)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        step.train([pair], _backward)
    assert not step.train(random_pairs(2), _backward).dropped
