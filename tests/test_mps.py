"""A run on an Apple GPU, played on the CPU (`mps_on_cpu`): same numbers, with what it has alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import rmipo_lite
from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.checkpoints.random_state import random_state, set_random_state
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.inspection import pair_scores
from rmipo_lite.model import attention, loading
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.ops import linear_logps, native, pair_loss
from rmipo_lite.planning import budget, device, estimation, quantization
from rmipo_lite.planning.footprint import Activations, Setup
from rmipo_lite.results.agreement import agreement
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.training.run_log import TIMES, RunLog
from tests.kit import random_pairs, tiny_model, train_words, trained_weights, word_tokenizer
from tests.mps_on_cpu import GIB, MPS, play_a_mac, simulated_mps


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Mac, whose GPU no tensor is on."""
    play_a_mac(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def mps(mac: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with simulated_mps(monkeypatch):
        yield


def _moved(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to("mps").requires_grad_(tensor.requires_grad) for tensor in tensors]


# ---- operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head(trained_head: bool, dtype: torch.dtype, mps: None) -> None:
    hidden = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=trained_head)
    ids = torch.tensor([3, -100, 49, 0, 7, 7, 1])
    want = linear_logps(hidden, weight, ids, impl="torch")
    want.sum().backward()
    there = _moved(hidden, weight, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no advice to install what can't be had
        got = linear_logps(*there)
        got.sum().backward()
    assert got.device == there[0].grad.device == MPS
    assert torch.equal(got.cpu(), want)
    assert torch.equal(there[0].grad.cpu(), hidden.grad)
    if trained_head:
        assert torch.equal(there[1].grad.cpu(), weight.grad)


@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
def test_the_pair_loss(loss_type: str, mps: None) -> None:
    logps = (-torch.rand(11)).requires_grad_()
    borders = torch.tensor([0, 3, 5, 9, 11], dtype=torch.int32)
    prior, prior_borders = -torch.rand(5), torch.tensor([0, 2, 4, 5, 5], dtype=torch.int32)
    want = pair_loss(logps, borders, prior, prior_borders, loss_type=loss_type, impl="torch")
    want.loss.sum().backward()
    there = _moved(logps, borders, prior, prior_borders)
    got = pair_loss(*there, loss_type=loss_type)
    got.loss.sum().backward()
    for name, value in want._asdict().items():
        here = getattr(got, name)
        assert here.device == MPS
        assert torch.allclose(here.cpu(), value, rtol=0, atol=0, equal_nan=True), name
    assert torch.equal(there[0].grad.cpu(), logps.grad)


def test_what_asks_for_kernels_is_told_that_there_are_none(mps: None) -> None:
    hidden, weight, ids = _moved(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="native extension for mps is missing: the kernels"):
        linear_logps(hidden, weight, ids, impl="native")
    logps, borders = _moved(-torch.rand(2), torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="native extension for mps is missing: the kernels"):
        pair_loss(logps, borders, loss_type="simpo", impl="native")


# ---- a step ---------------------------------------------------------------------------------


def _adapted(place: str) -> Any:
    torch.manual_seed(0)
    model = attach_adapter(tiny_model(), "new")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.to(place)


def _step(model: nn.Module, folder: Path, **options: Any) -> PairStep:
    packing = options.pop("packing", True)
    args = RMiPOConfig(str(folder), kernel_impl="torch", save_pair_values=True, **options)
    return PairStep(model, args, 10**6, packing)


def _everything(step: PairStep, folder: Path) -> dict[str, Any]:
    """Every number that a step, an evaluation, a log and a score give."""
    pairs = random_pairs(6)
    if step.args.prior == "cached":
        step.prior_cache = step.prior_means(pairs)
    outcome = step.train(pairs, lambda loss: loss.backward())
    grads = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
    assert {g.device for g in grads.values()} == {p.device for p in step.model.parameters()}
    log = RunLog(step.args)
    log.add(1, outcome)
    line = log.line({"loss": 0.0})
    written = (Path(str(step.args.output_dir)) / "pair_values.jsonl").read_text(encoding="utf-8")
    (_, values), *_ = step.evaluate(pairs)
    return {
        "loss": outcome.loss.item(),
        "priors": step.prior_means(pairs),
        "grads": {name: grad.tolist() for name, grad in grads.items()},
        "line": {name: value for name, value in line.items() if name not in TIMES},
        "written": written,
        "mean": log.mean_loss,
        "evaluated": pair_values.reduce([values], step.args),
        "scores": pair_scores._numbers(pairs, values, step.args),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": False},
        {"prior": "cached"},
        {"sft_weight": 0.5},
        {"loss_type": "simper"},
        {"neftune_noise_alpha": 5.0},
        {"gradient_checkpointing": True},
    ],
)
def test_a_step_has_the_cpus_numbers(
    options: dict, tmp_path: Path, mps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_trusted", lambda kind: False)
    found = []
    for place in ("cpu", "mps"):
        step = _step(_adapted(place), tmp_path / place, use_cpu=place == "cpu", **options)
        if options.get("gradient_checkpointing"):
            step.enable_checkpointing()
        torch.manual_seed(1)
        found.append(_everything(step, tmp_path))
    assert str(found[0]) == str(found[1])  # to the last bit, NaN too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_of_packing(dtype: torch.dtype, mps: None) -> None:
    model = tiny_model().to(dtype).to("mps")
    assert packing_problem(model, random_pairs(4), "auto", 0) is None


def test_a_token_outside_the_vocabulary(tmp_path: Path, mps: None) -> None:
    step = _step(_adapted("mps"), tmp_path)
    native.device_flag(MPS).fill_(1)
    with pytest.raises(ValueError, match="a token id outside the model's vocabulary"):
        step.train(random_pairs(2), lambda loss: loss.backward())


def test_two_models_are_compared(mps: None) -> None:
    texts = [[1, 5, 7, 9], [3, 4]]
    here = agreement(tiny_model(seed=0), tiny_model(seed=1), texts)
    there = agreement(tiny_model(seed=0).to("mps"), tiny_model(seed=1).to("mps"), texts)
    assert here == there
    assert here is not None
    assert here.kl > 0


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, evaluated, saved, answered, and gone on with: the weights are the CPU's."""
    monkeypatch.setattr(attention, "is_trusted", lambda kind: False)
    options: dict[str, Any] = {"kernel_impl": "torch", "save_steps": 1, "sample_prompts": 0}
    options |= {"eval_completions": 1, "max_tokens_per_microstep": 1000}

    def run(place: str) -> dict[str, list[float]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        options.update(use_cpu=place == "cpu", gradient_checkpointing=False)
        for steps in (1, 2):
            result = train_words(
                tiny_model(), tmp_path / place, max_steps=steps, resume=steps == 2, **options
            )
            assert {p.device.type for p in result.model.parameters()} == {place}
        return {name: w.tolist() for name, w in trained_weights(result.model).items()}

    on_cpu = run("cpu")
    with simulated_mps(monkeypatch):
        assert run("mps") == on_cpu


def test_a_model_is_loaded_where_it_runs(
    tmp_path: Path, mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> nn.Module:
        asked.update(options)
        return tiny_model()

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    loading.load_model(str(tmp_path / "base"), RMiPOConfig(str(tmp_path)))
    assert asked["device_map"] == {"": torch.device("mps")}
    assert asked["dtype"] == torch.float32
    asked.clear()
    loading.load_model(str(tmp_path / "base"), RMiPOConfig(str(tmp_path), use_cpu=True))
    assert "device_map" not in asked


# ---- settings -------------------------------------------------------------------------------


def test_precision(tmp_path: Path, mac: None) -> None:
    assert RMiPOConfig(str(tmp_path)).dtype == torch.float32
    assert RMiPOConfig(str(tmp_path), bf16=True).dtype == torch.bfloat16
    assert RMiPOConfig(str(tmp_path), fp16=True).dtype == torch.float16  # it has a scaler
    assert RMiPOConfig(str(tmp_path)).device.type == "mps"
    assert not RMiPOConfig(str(tmp_path)).dataloader_pin_memory


def test_4_bits_are_never_chosen_and_refused_where_bitsandbytes_has_none(
    tmp_path: Path, mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "free_bytes", lambda _: 0)
    args = RMiPOConfig(str(tmp_path))
    assert quantization.quantization_for("never loaded", args, "auto") is None
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cpu", "cuda", "mps"})
    with pytest.raises(ValueError, match=r"no 4-bit weights on 'mps', only on cpu, cuda .*; take"):
        loading.load_model("never loaded", args, BitsAndBytesConfig(load_in_4bit=True))


def test_memory(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.memory_in_use(MPS) == (3 * GIB, 10 * GIB)
    available = 5 * GIB
    monkeypatch.setattr(
        device.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available})
    )
    assert device.free_bytes(MPS) == 6 * GIB  # what the system has, and the pool's unused part
    available = 12 * GIB
    assert device.free_bytes(MPS) == 8 * GIB  # what is recommended, less what is used
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(1))
    watched = device.PeakMemory(MPS)
    assert emptied
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4 * GIB)
    assert watched.growth() == GIB


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 9.00 GiB, max allowed: 9.32 GiB). Tried to",
        "Invalid buffer size: 29.19 GiB",
        "HIP error: out of memory",
    ],
)
def test_memory_that_ran_out_is_recognised(text: str) -> None:
    assert budget.is_out_of_memory(RuntimeError(text))


def test_scores_that_attention_keeps_are_counted() -> None:
    config, setup = tiny_model().config, Setup(torch.float32, None)
    for checkpointing in (False, True):
        here, there = (
            budget.activations_on(kind, config, setup, checkpointing, 100)
            for kind in ("cpu", "mps")
        )
        layers = 3 if checkpointing else config.num_hidden_layers + 2
        scores = 4 * config.num_attention_heads * 100 * layers
        assert there.per_token == here.per_token + scores


def test_random_numbers_are_put_back(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([7], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda index: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, index: states.append(state))
    before = random_state()
    states.append(torch.tensor([8], dtype=torch.uint8))
    set_random_state(before)
    assert states[-1].tolist() == [7]
    del before["mps"]  # of a machine without one
    set_random_state(before)


def test_info_names_the_chip(mac: None) -> None:
    found = rmipo_lite.info()
    assert any(line.startswith("mps:0: Apple M2 Pro, ") for line in found.devices)
    assert found.devices[1].endswith(" of 10.0 GiB free")
    assert found.precision == "fp32 on mps (bf16=True halves the weights)"
    assert found.backends["mps"] == (
        "PyTorch reference: the kernels are for CPUs and NVIDIA's GPUs alone"
    )


def test_an_estimate_is_of_this_machine(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimation, "COMMON", ())
    monkeypatch.setattr(budget, "activations_on", lambda *_: Activations(0, 1000, True))
    config = tiny_model().config
    found = rmipo_lite.estimate(config, random_pairs(8), tokenizer=word_tokenizer())
    fit = found.fit
    assert (fit.card, fit.memory, fit.weights, fit.fits) == ("Apple M2 Pro", 10 * GIB, "fp32", True)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 32768, 4
    large = rmipo_lite.estimate(config, random_pairs(8), tokenizer=word_tokenizer()).fit
    assert large.weights == "fp32"  # never 4 bits by itself
    assert large.way_out == {"bf16": True}
