from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from rmipo_lite import demo
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.planning.workload import cut_lengths, shortened, workload
from rmipo_lite.tokens.pair import TokenizedPair


def test_what_a_shorter_max_length_cuts_is_cut_as_in_a_run(tmp_path: Path) -> None:
    """The prompt keeps half of it at least, the responses their first tokens in what is left."""
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    assert cut_lengths((100, 50, 40), 200, args) == (100, 50, 40)
    assert cut_lengths((100, 150, 40), 200, args) == (100, 100, 40)
    assert cut_lengths((180, 50, 40), 200, args) == (150, 50, 40)
    args.max_prompt_length = 60
    assert cut_lengths((180, 150, 40), 200, args) == (60, 140, 40)


def test_tokens_by_hand(tmp_path: Path) -> None:
    """Packed, a pair is prompt + chosen + rejected less the two last tokens."""
    pairs = [TokenizedPair(i, [5] * (10 + i), [5] * 20, [5] * 30) for i in range(3)]
    args = RMiPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    found = workload("", LlamaConfig(), pairs, None, args)
    assert (found.pairs, found.longest, found.step) == (3, 60, 60 + 59)
    assert (found.policy, found.prior) == (58 + 59 + 60, 3 * 50)
    assert found.note == "3 pairs, the longest of 60 tokens"


def test_assumed_pairs_are_cut_too(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), use_cpu=True, max_length=300)
    found = workload("", LlamaConfig(), None, None, args)
    assert found.note == "assumed: 150 + 150 + 150 tokens, the longest 150 + 2 x 150"
    assert found.policy == 10_000 * 448
    assert shortened(found, 100, args).longest == 50 + 2 * 50 - 2


def test_rows_are_tokenised_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    found = workload(str(demo.MODEL), LlamaConfig(), demo.load_rows()[:20], None, args)
    assert found.pairs == 20
    assert found.note.startswith("20 of 20 rows")
    assert shortened(found, 8, args).longest < found.longest
