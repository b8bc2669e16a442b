from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

import rmipo_lite
from benchmarks import estimates
from rmipo_lite import demo
from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.planning import budget, estimation, quantization
from rmipo_lite.planning.estimation_view import Estimate
from rmipo_lite.planning.footprint import Setup, activations_of, weights_of
from rmipo_lite.tokens.pair import TokenizedPair

# The shape of Llama-3-8B.
_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
_SMALL = {**_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}  # fmt: skip


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and nothing else: no weight can be read from it."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**_8B).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def on_3060(eight_billion: str) -> Estimate:
    return rmipo_lite.estimate(eight_billion, gpu="RTX 3060 12GB")


@pytest.mark.slow
def test_8b_on_a_card_of_12_gb(on_3060: Estimate) -> None:
    """6.98 billion numbers in 4 bits, 1.05 in 16; r=16 on seven layers of each block."""
    fit = on_3060.fit
    assert (fit.weights, fit.checkpointing, fit.fits) == ("4-bit", True, True)
    trained = 32 * 16 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert fit.parts["adapter"] == fit.parts["gradients"] == 4 * trained
    assert fit.parts["optimizer"] == 8 * trained
    linear, others = 6_979_321_856, 1_050_939_392
    assert fit.parts["weights"] == pytest.approx(0.5159 * linear + 2 * others, rel=1e-3)
    assert fit.parts["dequantisation"] == 2 * 4096 * 14336
    assert fit.peak == sum(fit.parts.values()) <= 12 * 2**30
    assert fit.least < fit.peak
    assert on_3060.settings == {}
    assert on_3060.note.startswith("assumed: 200 + 300 + 274 tokens, the longest 200 + 2 x 824")
    assert on_3060.steps == 313


@pytest.mark.slow
def test_what_does_not_fit_names_what_would(eight_billion: str) -> None:
    plain = rmipo_lite.estimate(eight_billion, gpu="3060", quantization="none").fit
    assert not plain.fits
    assert plain.way_out == {"quantization": "4bit"}
    small = rmipo_lite.estimate(eight_billion, gpu="8GB")
    assert set(small.settings) == {"max_length"}
    again = rmipo_lite.estimate(eight_billion, gpu="8GB", **small.settings)
    assert again.fit.fits
    assert again.settings == {}
    assert small.fit.seconds is None  # a memory has no speed
    hopeless = rmipo_lite.estimate(eight_billion, gpu="6GB")
    assert hopeless.fit.verdict == "no: take a smaller model"
    with pytest.raises(ValueError, match="fits 6 GB card with no setting: it takes"):
        _ = hopeless.settings


@pytest.mark.slow
def test_advice_is_computed_with_every_option_of_the_caller(
    eight_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it tries may differ from the caller's options in what it advises alone."""
    own = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "packing": False,
        "loss_type": "simpo", "optim": "sgd", "max_length": 900, "max_prompt_length": 333,
        "max_tokens_per_microstep": 4096, "prior": "cached",
    }  # fmt: skip
    tried: list[RMiPOConfig] = []
    real = estimation.choose_budget

    def choose(*given: Any, args: RMiPOConfig, **rest: Any) -> Any:
        tried.append(args)
        return real(*given, args=args, **rest)

    monkeypatch.setattr(estimation, "choose_budget", choose)
    found = rmipo_lite.estimate(eight_billion, gpu="9GB", gradient_checkpointing=False, **own)
    assert found.fit.way_out is not None
    assert found.fit.way_out["gradient_checkpointing"] is True
    asked = RMiPOConfig("x", use_cpu=True, **own)
    assert {args.gradient_checkpointing for args in tried} == {False, True}
    for args in tried:
        assert [getattr(args, name) for name in own] == [getattr(asked, name) for name in own]


def test_the_cards(on_3060: Estimate) -> None:
    by_name = {fit.card: fit for fit in on_3060.cards}
    assert by_name["RTX 3060 12GB"] == on_3060.fit
    assert by_name["T4 16GB"].weights == "4-bit"
    assert by_name["A100 80GB"].weights == "bf16"
    assert not by_name["H100 80GB"].checkpointing
    ranked = ("H100 80GB", "RTX 4090 24GB", "RTX 4070 12GB", "T4 16GB")
    seconds: list[Any] = [by_name[name].seconds for name in ranked]
    assert seconds == sorted(seconds)
    for fit in on_3060.cards:
        assert (fit.least <= 0.95 * fit.memory) == fit.fits
        assert not fit.fits or fit.peak <= fit.memory
    table = on_3060.to_pandas()
    assert len(table) == len(on_3060.cards)
    assert list(table["peak"]) == [fit.peak for fit in on_3060.cards]


def test_it_shows(on_3060: Estimate) -> None:
    text = str(on_3060)
    assert max(map(len, text.splitlines())) <= 110
    assert "on RTX 3060 12GB (nothing was loaded)" in text
    assert "not measured" in text
    page = on_3060._repr_html_()
    assert page.count("<table>") == 2
    assert "RTX 5090 32GB" in page
    axes = on_3060.plot().axes[0]
    assert len(axes.get_yticklabels()) == len(on_3060.cards)
    assert "weights" in axes.get_legend_handles_labels()[1]


@pytest.mark.slow
def test_precision_is_the_cards(eight_billion: str) -> None:
    config = LlamaConfig(**_SMALL)
    weights = {
        gpu: rmipo_lite.estimate(config, gpu=gpu).fit.weights for gpu in ("T4", "3060", "cpu")
    }
    assert weights == {"T4": "fp16", "3060": "bf16", "cpu": "fp32"}
    assert rmipo_lite.estimate(config, gpu="cpu", bf16=True).fit.weights == "bf16"


@pytest.mark.slow
def test_longer_pairs_and_whole_training_take_more() -> None:
    config = LlamaConfig(**_SMALL)

    def fit(lengths: tuple[int, int, int] = (20, 30, 30), **options: Any) -> Any:
        pairs = [TokenizedPair(0, *([5] * length for length in lengths))] * 8
        return rmipo_lite.estimate(config, pairs, gpu="3060", **options).fit

    base = fit()
    assert fit((40, 60, 60)).parts["activations"] > 1.9 * base.parts["activations"]
    again = fit(gradient_checkpointing=True)
    assert again.parts["activations"] < 0.6 * base.parts["activations"]
    assert again.seconds > base.seconds
    whole = fit(peft_config=None)
    assert whole.parts["optimizer"] > 3 * base.parts["optimizer"]
    assert whole.parts["adapter"] == 0
    assert whole.parts["reference"] == 0
    for options in ({"reference": "live"}, {"ref_sync_steps": 9}, {"loss_type": "epsilon_dpo"}):
        moving = fit(peft_config=None, **{"loss_type": "dpo", **options})
        assert moving.parts["reference"] == whole.parts["weights"]
    assert fit(loss_type="dpo", reference="live").parts["reference"] == 0
    assert fit(optim="adamw_8bit").parts["optimizer"] == base.parts["optimizer"] / 4
    assert fit(loss_type="simpo").seconds < base.seconds  # no prior
    assert fit(quantization="4bit").parts["weights"] < 0.9 * base.parts["weights"]


def test_the_choice_is_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model with as much memory free as the card has left: the same micro-steps."""
    config = LlamaConfig(**_SMALL)
    pairs = [TokenizedPair(0, [5] * 200, [5] * 300, [5] * 300)] * 64
    for size in (0.55, 0.6, 1.0, 2.0):
        monkeypatch.setattr("psutil.virtual_memory", lambda size=size: _Memory(int(size * 2**30)))
        found = rmipo_lite.estimate(config, pairs, gpu="cpu").fit
        model = attach_adapter(LlamaForCausalLM(config), "new")
        loaded = found.parts["weights"] + found.parts["adapter"]
        monkeypatch.setattr(
            budget, "free_bytes", lambda device, size=size, loaded=loaded: size * 2**30 - loaded
        )
        args = RMiPOConfig(str(tmp_path), use_cpu=True)
        plan = budget.plan_micro_steps(model, args, 798)
        assert (plan.checkpointing.layers_of(798) > 0) == found.checkpointing
        assert min(plan.max_tokens, 32 * 798) == found.max_tokens or found.max_tokens == 798


class _Memory:
    def __init__(self, total: int) -> None:
        self.total = self.available = total


def test_padded_batches_count_their_padding() -> None:
    pairs = [TokenizedPair(0, [5] * 10, [5] * 40, [5] * 20)] * 4
    config = LlamaConfig(**_SMALL)
    packed = rmipo_lite.estimate(config, pairs, gpu="3060")
    padded = rmipo_lite.estimate(config, pairs, gpu="3060", packing=False)
    # a pair is 10 + 40 + 20 tokens less the two last, or twice 10 + 40 less one
    assert packed.tokens - padded.tokens == 4 * (68 - 98)


def test_a_dataset_gives_real_lengths() -> None:
    rows = demo.load_rows()[:100]
    found = rmipo_lite.estimate(str(demo.MODEL), rows, gpu="cpu")
    assert found.note.startswith("100 of 100 rows, the longest of ")
    assert (found.pairs, found.steps) == (100, 4)
    same = rmipo_lite.estimate(
        str(demo.MODEL), rows, gpu="cpu", tokenizer=AutoTokenizer.from_pretrained(demo.MODEL)
    )
    assert same.tokens == found.tokens


def test_4_bit_is_decided_by_the_same_number() -> None:
    """bf16 weights of 15 GiB: 4-bit where they are more than 60 % of what is free."""
    setup = Setup(torch.bfloat16, None)
    config = LlamaConfig(**_8B)
    nbytes = weights_of(config, setup).loaded_bytes(setup)
    assert nbytes == 2 * 8_030_261_248
    for free, quantized in ((nbytes / 0.6 + 1, False), (nbytes / 0.6 - 1, True)):
        assert quantization.wants_4bit(nbytes, free) is quantized


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu": "potato"}, "gpu: no card is known"),
        ({"quantization": "8bit"}, "quantization: wanted 'auto', 'none' or '4bit', got '8bit'"),
        ({"beta": -1}, "beta must be a number > 0"),
        ({"bf16": True, "fp16": True}, "bf16, fp16: wanted one of them, got both"),
        ({"peft_config": "lora"}, "peft_config must be 'auto', 'new', None or a peft config"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"\w+: |must be") as caught:
        rmipo_lite.estimate(LlamaConfig(**_SMALL), **options)
    assert words in str(caught.value)


def test_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ValueError, match=r"^model: "):
        rmipo_lite.estimate(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        rmipo_lite.estimate(str(tmp_path / "absent"))


def test_an_adapters_folder_is_its_base(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**_SMALL))
    model.save_pretrained(tmp_path / "base")
    adapted = attach_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), "new")
    adapted.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    ours = rmipo_lite.estimate(str(tmp_path / "adapter"), gpu="3060").fit
    assert ours.parts == rmipo_lite.estimate(str(tmp_path / "base"), gpu="3060").fit.parts


def test_an_adapter_that_goes_on_has_its_own_rank(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**_SMALL)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = attach_adapter(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    for model in (adapted, str(tmp_path / "adapter")):
        sizes = [
            rmipo_lite.estimate(model, gpu="3060", peft_config=wanted).fit.parts["adapter"]
            for wanted in ("auto", "new")
        ]
        assert sizes[0] == 4 * 5 * 2 * (64 + 64)
        assert sizes[1] > 10 * sizes[0]


def test_float32_has_a_speed_of_its_own(tmp_path: Path) -> None:
    """Where bfloat16 isn't in hardware it has float32's; a path is a model's name too."""
    LlamaConfig(**_SMALL).save_pretrained(tmp_path)
    half, single = (
        rmipo_lite.estimate(tmp_path, gpu="T4", quantization="none", **options).fit.seconds
        for options in ({"fp16": True}, {"bf16": True})
    )
    assert half is not None
    assert single is not None
    assert single / half == pytest.approx(24 / 8.1)


def test_gpt2_whose_context_is_short() -> None:
    found = rmipo_lite.estimate(GPT2Config(n_positions=256), gpu="T4")
    assert "the longest 128 + 2 x 128" in found.note
    assert activations_of(GPT2Config(n_positions=256), Setup(torch.float16, None), False).counted


@pytest.mark.measured
@pytest.mark.slow
def test_a_run_takes_what_was_estimated() -> None:
    """`python -m benchmarks estimate` shows it within 15 % at five shapes; here a noisy one."""
    rows = {row.metric: row.value for row in estimates.bench(estimates.CASES[:1], steps=2)}
    assert rows[f"{estimates.PEAK} over measured"] == pytest.approx(1.0, abs=0.2)
