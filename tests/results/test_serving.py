"""What servers refuse, and paths that stay at home."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from rmipo_lite.results.serving import serving_note
from tests.kit import tiny_model


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"r": 16}, "with `--enable-lora` (by its rules"),
        ({"r": 17}, "--max-lora-rank 32`"),
        ({"r": 4, "rank_pattern": {"q_proj": 64}}, "--max-lora-rank 64`"),
        ({"r": 16, "init_lora_weights": "pissa"}, "--max-lora-rank 32`"),
        ({"r": 600}, "rank of 600 is more than vLLM takes (512)"),
        ({"r": 4, "use_dora": True}, "refuse this adapter (DoRA)"),
        ({"r": 4, "bias": "lora_only"}, "refuse this adapter (biases)"),
        ({"r": 4, "modules_to_save": ["lm_head"]}, "(whole layers beside it (modules_to_save))"),
    ],
)
def test_what_a_server_will_say(options: dict[str, Any], wanted: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    assert wanted in str(serving_note(adapted))


def test_of_a_whole_model_there_is_nothing_to_say() -> None:
    assert serving_note(tiny_model("llama")) is None
