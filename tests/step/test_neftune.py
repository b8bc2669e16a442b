"""NEFTune's noise: of each pair its own, the same however pairs are cut and laid out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.step import pair_step
from rmipo_lite.step.neftune import embedding_noise
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, word_tokenizer


def _noise(pair: TokenizedPair, packing: bool, alpha: float = 5.0) -> torch.Tensor:
    model = tiny_model("llama")
    inputs = batch.policy_input([pair], packing)
    embed = causal_lm(model).get_input_embeddings()
    plain = embed(inputs.input_ids)
    with torch.no_grad(), embedding_noise(model, alpha, 3, [pair], packing):
        noise = embed(inputs.input_ids) - plain
    assert not embed._forward_hooks
    return noise


def test_scale_is_that_of_the_pairs_longer_sequence() -> None:
    pair = TokenizedPair(4, [5] * 10, [6] * 41, [7] * 5)
    noise = _noise(pair, packing=True)
    bound = 5.0 / math.sqrt(50 * noise.shape[-1])
    assert 0.98 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert abs(float(noise.mean())) < 0.05 * bound


def test_packed_and_padded_rows_carry_the_same_noise() -> None:
    pair = TokenizedPair(4, [5, 6, 7], [8, 9, 3], [10, 3])
    packed, padded = _noise(pair, True)[0], _noise(pair, False)
    torch.testing.assert_close(padded[0, :5], packed[:5], atol=1e-6, rtol=0)
    torch.testing.assert_close(padded[1, :3], packed[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(padded[1, 3:4], packed[5:6], atol=1e-6, rtol=0)
    assert not padded[1, 4:].any()


def _losses(folder: Path, **options: object) -> list[float]:
    args = RMiPOConfig(
        str(folder), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    trainer = RMiPOTrainer(
        tiny_model("llama"), args, train_dataset=random_pairs(8),
        processing_class=word_tokenizer(), peft_config="auto",
    )  # fmt: skip
    trainer.train()
    assert not causal_lm(trainer.model).get_input_embeddings()._forward_hooks
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_the_cut_changes_no_number(tmp_path: Path) -> None:
    noisy = {"neftune_noise_alpha": 5.0}
    whole = _losses(tmp_path / "whole", **noisy)
    assert whole != pytest.approx(_losses(tmp_path / "plain"), abs=1e-4)
    cuts = [{"max_tokens_per_microstep": 1}, {"packing": False}]
    for number, cut in enumerate(cuts):
        assert _losses(tmp_path / str(number), **noisy, **cut) == pytest.approx(whole, abs=2e-5)


def test_the_prior_has_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    seen: list[tuple[bool, bool]] = []
    real = pair_step.scored_hidden

    def watching(model: torch.nn.Module, inputs: batch.ModelInput) -> torch.Tensor:
        hooks = causal_lm(model).get_input_embeddings()._forward_hooks
        seen.append((torch.is_grad_enabled(), bool(hooks)))
        return real(model, inputs)

    monkeypatch.setattr(pair_step, "scored_hidden", watching)
    _losses(tmp_path, neftune_noise_alpha=5.0)
    assert set(seen) == {(True, True), (False, False)}
