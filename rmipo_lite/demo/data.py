"""What the demo ships, as a reader would load their own: a model's folder and preference pairs."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rmipo_lite.demo.task import make_pairs, wordy_answer

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny-llama"
PAIRS = ASSETS / "pairs.jsonl.gz"
_COUNT = 1600  # of the shipped pairs


def load_rows() -> list[dict[str, Any]]:
    """The shipped preference pairs: prompt, chosen and rejected as message lists."""
    text = gzip.decompress(PAIRS.read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def length_biased_rows() -> list[dict[str, Any]]:
    """Pairs on the same questions, judged by somebody who likes length.

    The wordy right answer is chosen over a terse one, right, wrong or generic. The true reward
    still wants terse answers: what is trained here is a bias of the data.
    """
    rng = random.Random(1)
    return [
        {
            "prompt": _message("user", pair.question.text),
            "chosen": _message("assistant", wordy_answer(pair.question.fact, rng)),
            "rejected": _message(
                "assistant", pair.chosen if pair.kind == "terse/wordy" else pair.rejected
            ),
        }
        for pair in make_pairs(_COUNT)
    ]


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL)


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]
