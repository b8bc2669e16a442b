"""What one of several cards holds and sends, against numbers by hand."""

from typing import Any

import pytest
from transformers import LlamaConfig

from rmipo_lite.planning.estimation import estimate

_MODEL = LlamaConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=4, vocab_size=8192, max_position_embeddings=2048,
)  # fmt: skip
_LAYERS = 16 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096)
_TRAINED = 16 * 16 * (2 * 2048 + 2 * 1280 + 3 * 5120)  # of r=16 on all of them
_OTHERS = 2 * 8192 * 1024 + 33 * 1024


def _estimate(gpu: str, **options: Any) -> Any:
    return estimate(_MODEL, gpu=gpu, num_gpus=8, per_device_train_batch_size=128, **options)


def test_memory_and_time_of_both_layouts_by_hand() -> None:
    found = _estimate("H100 80GB", gradient_checkpointing=True)
    whole, parts = found.layouts
    assert whole.parts["weights"] == found.fit.parts["weights"] == 2 * (_LAYERS + _OTHERS)
    assert parts.parts["weights"] == 2 * (_LAYERS // 8 + _OTHERS)
    assert parts.parts["adapter"] == 4 * _TRAINED // 8
    assert parts.parts["optimizer"] == 8 * _TRAINED // 8
    assert parts.parts["gathered"] == 2 * 2 * _LAYERS // 16
    # 79 steps: gradients once up and once down; three gathers of all layers a step
    assert whole.sent == pytest.approx(79 * 2 * 7 / 8 * 4 * _TRAINED / 200e9)
    assert parts.sent == pytest.approx(79 * 3 * 7 / 8 * 2 * _LAYERS / 200e9, rel=0.2)
    assert whole.seconds == pytest.approx(found.fit.seconds / 8 + whole.sent, rel=1e-6)
    assert "On 8 x H100 80GB" in str(found)
    assert "FSDP2, each a part" in str(found)


def test_a_model_too_large_for_one_card_fits_in_parts() -> None:
    found = _estimate("1.2GB", quantization="none")
    whole, parts = found.layouts
    assert not whole.fits
    assert parts.fits
    assert whole.weights == parts.weights == "bf16"
    # By itself a run takes 4 bits where the whole model must fit, and 16 where a part must.
    assert [fit.weights for fit in _estimate("1.2GB").layouts] == ["4-bit", "bf16"]


def test_trained_in_full_the_ends_are_whole_on_every_card() -> None:
    _, parts = _estimate("H100 80GB", peft_config=None).layouts
    whole = 2 * (_LAYERS + _OTHERS)
    assert parts.parts["gradients"] == pytest.approx(2 * (_LAYERS / 8 + _OTHERS), rel=1e-6)
    assert parts.parts["gradients"] < whole / 4


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"gpu": "cpu", "num_gpus": 2}, "num_gpus=2 needs a card"),
        ({"gpu": "T4", "num_gpus": 0}, "num_gpus must be a whole number >= 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        estimate(_MODEL, **options)
