"""From rows to ids: border, BOS, end token, truncation, and the count of every row."""

from __future__ import annotations

import random
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row, load_rows
from rmipo_lite.tokens.encoder import TextEncoder
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.tokens.tokenize_rows import encode_prompt, tokenize_in_chunks, tokenize_rows
from tests.kit import sentencepiece_like


@pytest.fixture(scope="module")
def tokenizer(references: Path) -> Any:
    """The recorded one: byte-level BPE of 768 tokens, <s>=0 </s>=1, adds nothing by itself."""
    return AutoTokenizer.from_pretrained(references / "tokenizer")


def word_level() -> Any:
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "User", "Assistant", ":"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def adding_bos(tokenizer: Any) -> Any:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def run(
    records: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> tuple[list[TokenizedPair], DataReport]:
    rows, report = load_rows(records)
    pairs = tokenize_rows(rows, tokenizer, TokenizationOptions(**options), report)
    report.check()
    return pairs, report


def pair_of(
    prompt: str = "Hi there", chosen: str = " yes", rejected: str = " no"
) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(chosen: str = "yes", rejected: str = "no", *turns: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * 5
    turns = turns or ("Hi",)
    return {
        "prompt": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


# ---- the border -----------------------------------------------------------------------------

SHARED_TOKENIZERS = ("tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K")
ALPHABET = "abc the price $46 1\n\n\t  éß你好привет😀👩‍👧́.,'\"<>ﬁ"


@pytest.mark.parametrize("name", SHARED_TOKENIZERS)
def test_joined_ids_decode_to_the_text(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    encoder = TextEncoder(tokenizer)
    generator = random.Random(1)
    for _ in range(300):
        text = "".join(generator.choices(ALPHABET, k=generator.randint(2, 40)))
        at = generator.randint(1, len(text) - 1)
        prompt, response = ("x" + text[:at], text[at:] + "x")
        if "qwen2" in name:  # it normalises, each part by itself
            prompt, response = (unicodedata.normalize("NFC", part) for part in (prompt, response))
        ids = (
            encoder.prompts([prompt])[0][len(encoder.bos_ids) :] + encoder.responses([response])[0]
        )
        assert tokenizer.decode(ids) == prompt + response


def test_sentencepiece_response_has_no_space_mark(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    assert tokenizer.decode(tokenizer("Hello").input_ids[1:]) == "Hello"
    (pair,), _ = run([pair_of("Hello", "world", " there")], tokenizer)
    assert tokenizer.decode(pair.prompt_ids[1:] + pair.chosen_ids[:-1]) == "Helloworld"
    assert tokenizer.decode(pair.prompt_ids[1:] + pair.rejected_ids[:-1]) == "Hello there"


@pytest.mark.parametrize("response", ["\nworld", "\n\n", "  x", ": y", ":", "...", "x"])
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_response_that_merges_with_the_anchor_has_no_space_mark(
    model: Any, response: str
) -> None:
    tokenizer = sentencepiece_like(model)
    (pair,), _ = run([pair_of("Hello", response + "1", " there")], tokenizer)
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids[:-1]) == "Hello" + response + "1"


def test_both_sides_share_one_prompt_where_the_tokens_would_merge(tokenizer: Any) -> None:
    # "The answ" + "er" is one token "er" over the border when encoded together.
    (pair,), _ = run([pair_of("It is a tru", "th universally", "!!")], tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "It is a tru"
    assert pair.prompt_ids == tokenizer("It is a tru").input_ids
    assert pair.rejected_prompt_ids is None


def test_word_level_tokenizer() -> None:
    (pair,), _ = run([pair_of("a b", "c", "b a")], word_level())
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ([1, 3, 4], [5, 2], [4, 3, 2])


# ---- BOS and the end token ------------------------------------------------------------------

WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITHOUT_BOS = WITH_BOS.removeprefix("{{ bos_token }}")


@pytest.mark.parametrize("tokenizer_adds", [False, True])
@pytest.mark.parametrize("template", [None, WITH_BOS, WITHOUT_BOS])
def test_one_bos_where_one_is_used(
    tokenizer: Any, tokenizer_adds: bool, template: str | None
) -> None:
    used = adding_bos(tokenizer) if tokenizer_adds else tokenizer
    record = pair_of() if template is None else chat()
    (pair,), _ = run([record], used, chat_template=template)
    expected = 1 if tokenizer_adds or template == WITH_BOS else 0
    assert pair.prompt_ids.count(0) == expected
    assert pair.prompt_ids[:1] == [0] or not expected
    assert 0 not in pair.chosen_ids


def test_bos_of_the_template_stays_when_the_prompt_is_cut(tokenizer: Any) -> None:
    record = chat("yes", "no", "word " * 100)
    (pair,), _ = run([record], tokenizer, chat_template=WITH_BOS, max_length=20)
    assert pair.prompt_ids.count(0) == 1
    assert pair.prompt_ids[0] == 0


def test_bos_in_the_users_text_is_not_doubled(tokenizer: Any) -> None:
    (pair,), report = run([pair_of(prompt="<s>Hi")], adding_bos(tokenizer))
    assert pair.prompt_ids.count(0) == 1
    assert report.special_token_rows == 1
    assert "control token" in str(report)


def test_tokenizer_without_bos_gets_none(shared: Path) -> None:
    qwen = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2")
    (pair,), _ = run([pair_of()], qwen)
    assert pair.prompt_ids == qwen("Hi there").input_ids
    assert pair.chosen_ids == [*qwen(" yes").input_ids, qwen.eos_token_id]


@pytest.mark.parametrize("chosen", [" yes", " yes</s>"])
def test_exactly_one_end_token(tokenizer: Any, chosen: str) -> None:
    (pair,), _ = run([pair_of(chosen=chosen)], tokenizer)
    assert pair.chosen_ids.count(1) == 1
    assert pair.chosen_ids[-1] == 1
    assert pair.rejected_ids[-1] == 1


def test_no_eos_token_is_refused(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    with pytest.raises(ValueError, match="no eos_token"):
        run([pair_of()], PreTrainedTokenizerFast(tokenizer_object=backend))


# ---- truncation -----------------------------------------------------------------------------


def sized(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """Word-level texts of so many words; BOS and the end token come on top."""
    return pair_of("a " * prompt, "b " * chosen, "c " * rejected)


@pytest.mark.parametrize(
    ("sizes", "kept"),  # words in; ids of prompt (with BOS), chosen, rejected kept of 20
    [
        ((4, 3, 5), (5, 4, 6)),  # fits
        ((30, 3, 5), (14, 4, 6)),  # the prompt gives way to the longer response
        ((30, 3, 50), (10, 4, 10)),  # half each; the short response is not cut
        ((4, 3, 50), (5, 4, 15)),  # a short prompt leaves the rest to the response
        ((19, 1, 1), (18, 2, 2)),
        ((18, 1, 1), (18, 2, 2)),
        ((17, 1, 1), (18, 2, 2)),
        ((16, 1, 1), (17, 2, 2)),
    ],
)
def test_budgets(sizes: tuple[int, int, int], kept: tuple[int, int, int]) -> None:
    (pair,), report = run([sized(*sizes)], word_level(), max_length=20)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == kept
    assert pair.prompt_ids[0] == 1  # BOS stays
    for ids, words in ((pair.chosen_ids, sizes[1]), (pair.rejected_ids, sizes[2])):
        assert (ids[-1] == 2) == (len(ids) == words + 1)  # the end token stands unless cut
    assert report.truncated_pairs == (kept != tuple(size + 1 for size in sizes))


def test_prompt_is_cut_from_the_left_and_responses_from_the_right(tokenizer: Any) -> None:
    words = [f" word{i}" for i in range(100)]
    (pair,), report = run(
        [pair_of("".join(words), "".join(words), " x" + "".join(words))],
        adding_bos(tokenizer),
        max_length=40,
    )
    assert tokenizer.decode(pair.prompt_ids).startswith("<s>")
    assert tokenizer.decode(pair.prompt_ids).endswith("word99")
    assert tokenizer.decode(pair.chosen_ids).startswith(" word0 word1")
    assert 1 not in pair.chosen_ids
    assert (report.truncated_prompts, report.truncated_responses) == (1, 2)


@pytest.mark.parametrize("label", [True, False])
def test_an_unpaired_row_is_cut_by_its_own_completion(label: bool) -> None:
    """Its mismatched completion takes what room is left, and is counted nowhere."""
    records = [
        {"prompt": "a " * 12, "completion": "b " * 3, "label": label},
        {"prompt": "b", "completion": "c " * 40, "label": not label},
    ]
    rows, report = load_rows(records, unpaired=True)
    options = TokenizationOptions(max_length=20)
    first, second = tokenize_rows(rows, word_level(), options, report)
    own, other = (first.chosen_ids, first.rejected_ids)[:: 1 if label else -1]
    assert (first.label, second.label) == (label, not label)
    assert (len(first.prompt_ids), len(own), len(other)) == (13, 4, 7)
    assert own[-1] == 2
    assert (report.truncated_prompts, report.truncated_responses) == (0, 1)
    assert report.lengths["chosen" if label else "rejected"]["max"] == 4
    assert report.lengths["rejected" if label else "chosen"]["max"] == 41
    assert report.length_balance is None
    assert "chosen longer" not in str(report)


def test_max_prompt_length_limits_the_prompt_alone() -> None:
    (pair,), _ = run([sized(30, 3, 5)], word_level(), max_length=100, max_prompt_length=8)
    assert (len(pair.prompt_ids), len(pair.rejected_ids)) == (8, 6)


def test_identical_after_truncation_is_dropped(tokenizer: Any) -> None:
    same = " word" * 60
    pairs, report = run(
        [pair_of(), pair_of(chosen=same + " a", rejected=same + " b")], tokenizer, max_length=32
    )
    assert [pair.row for pair in pairs] == [0]
    assert [t.rows for r, t in report.dropped.items() if r.endswith("ones after truncation")] == [
        [1]
    ]
    assert report.identical_pairs == 1


def test_a_huge_text_is_cut_by_characters(tokenizer: Any) -> None:
    huge = "word " * 1_000_000
    (pair,), report = run([pair_of(prompt=huge, chosen=huge)], tokenizer, max_length=64)
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 64
    assert report.lengths["chosen"]["max"] < 64 * 64
    assert pair.chosen_ids[-1] != 1


def test_control_tokens_alone_are_an_empty_response(tokenizer: Any) -> None:
    pairs, report = run([pair_of(), pair_of(chosen="</s>"), pair_of(rejected="<pad>")], tokenizer)
    assert len(pairs) == 1
    assert report.dropped_count == 2


def test_one_token_responses_stay(tokenizer: Any) -> None:
    (pair,), _ = run([pair_of(chosen="A", rejected="B")], tokenizer)
    assert (len(pair.chosen_ids), len(pair.rejected_ids)) == (2, 2)
    (pair,), _ = run([pair_of(prompt="", chosen="A", rejected="B")], adding_bos(tokenizer))
    assert pair.prompt_ids == [0]


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="got control or unknown tokens alone"):
        run([pair_of(chosen="</s>")], tokenizer)


def test_report_numbers(tokenizer: Any) -> None:
    _, report = run([pair_of(chosen=" yes yes yes"), pair_of()], tokenizer)
    assert report.kept == 2
    assert report.chosen_longer_pairs == 1 + (
        len(tokenizer(" yes").input_ids) > len(tokenizer(" no").input_ids)
    )
    assert set(report.lengths) == {"prompt", "chosen", "rejected"}
    assert report.lengths["prompt"]["max"] == len(tokenizer("Hi there").input_ids)


# ---- processes ------------------------------------------------------------------------------


def test_unpicklable_tokenizer_falls_back_to_one_process(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmipo_lite.tokens.tokenize_rows.MIN_ROWS_PER_PROCESS", 1)
    locked = adding_bos(tokenizer)
    locked.lock = threading.Lock()
    records = [pair_of(chosen=f" {i}") for i in range(4)]
    with pytest.warns(UserWarning, match="tokenising in this one"):
        pairs, _ = run(records, locked, num_proc=2)
    assert len(pairs) == 4


@pytest.mark.slow
def test_processes_give_the_same_pairs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmipo_lite.tokens.tokenize_rows.MIN_ROWS_PER_PROCESS", 1)
    records = [pair_of(chosen=f" {i}") for i in range(9)]
    assert run(records, tokenizer, num_proc=2)[0] == run(records, tokenizer)[0]


# ---- in chunks ------------------------------------------------------------------------------


def in_chunks(
    records: list[dict[str, Any]], tokenizer: Any, per_chunk: int, **options: Any
) -> tuple[list[TokenizedPair], DataReport]:
    rows, report = load_rows(records)
    chosen = TokenizationOptions(**options)
    outcomes = [
        outcome
        for chunk in tokenize_in_chunks(rows, tokenizer, chosen, report, per_chunk)
        for outcome in chunk
    ]
    assert [outcome.row for outcome in outcomes] == [row.index for row in rows]
    report.check()
    return [outcome.pair for outcome in outcomes if outcome.pair is not None], report


@pytest.mark.parametrize("per_chunk", [1, 2, 5, 100])
def test_chunks_give_the_same_pairs_and_the_same_report(tokenizer: Any, per_chunk: int) -> None:
    records = [
        pair_of(),
        pair_of(chosen="</s>"),
        pair_of(chosen=" yes</s>"),
        chat("yes", "no", "Hi", "Hello", "How?"),
        pair_of(chosen=" word" * 60, rejected=" a"),
        chat(" yes", "no"),
        pair_of(chosen=" word" * 60 + " a", rejected=" word" * 60 + " b"),
    ]
    options = {"max_length": 24, "chat_template": WITH_BOS}
    pairs, report = run(records, tokenizer, **options)
    chunked, of_chunks = in_chunks(records, tokenizer, per_chunk, **options)
    assert chunked == pairs
    assert of_chunks == report


def test_nothing_left_of_all_chunks_is_an_error(tokenizer: Any) -> None:
    records = [pair_of(chosen="</s>"), pair_of(chosen="<pad>")]
    with pytest.raises(ValueError, match=r"2 rows .*control or unknown tokens alone"):
        in_chunks(records, tokenizer, 1)


def test_bad_options_are_told_at_the_first_chunk(tokenizer: Any) -> None:
    rows, report = load_rows([pair_of()])
    chunks = tokenize_in_chunks(rows, tokenizer, TokenizationOptions(max_length=1), report, 1)
    with pytest.raises(ValueError, match="at least 2"):
        next(chunks)


# ---- generation sees what training saw ------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", WITH_BOS, WITHOUT_BOS])
def test_encode_prompt_is_the_training_prompt(tokenizer: Any, template: str) -> None:
    prepared = prepare_tokenizer(adding_bos(tokenizer), template)
    record = chat("yes", "no", "Hi", "Hello", "How?")
    (pair,), _ = run([record], prepared)
    assert encode_prompt(record["prompt"], prepared) == pair.prompt_ids
    (pair,), _ = run([pair_of()], prepared)
    assert encode_prompt("Hi there", prepared) == pair.prompt_ids


def test_order_of_mixed_rows_is_kept(tokenizer: Any) -> None:
    rows = [Row(4, "p", " a", " b"), Row(7, *chat().values()), Row(9, "q", " a", " b")]
    report = DataReport(total=3, kept=3)
    options = TokenizationOptions(chat_template="plain")
    assert [pair.row for pair in tokenize_rows(rows, tokenizer, options, report)] == [4, 7, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "at least 2"),
        ({"mode": "authors"}, "needs max_length and max_prompt_length"),
        ({"mode": "joint"}, "'separate' or 'authors'"),
    ],
)
def test_bad_options(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([pair_of()], tokenizer, **options)


REAL: dict[str, Callable[[Any], Any]] = {
    "tokenizers/gpt2": lambda tokenizer: prepare_tokenizer(tokenizer, "plain"),
    "tokenizers/qwen2": lambda tokenizer: tokenizer,
    "models/stories260K": lambda tokenizer: prepare_tokenizer(tokenizer, "plain"),
}


@pytest.mark.parametrize("name", REAL)
def test_rules_hold_on_real_pairs(shared: Path, name: str) -> None:
    tokenizer = REAL[name](AutoTokenizer.from_pretrained(shared / name))
    rows, report = load_rows(shared / "data/hh_raw_implicit_prompt.jsonl.gz")
    pairs = tokenize_rows(rows, tokenizer, TokenizationOptions(max_length=256), report)
    report.check()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if "qwen2" in name else None
    end = tokenizer.eos_token_id if end is None else end
    bos = TextEncoder(tokenizer).bos_ids
    ended = 0
    for pair in pairs:
        assert pair.prompt_ids[: len(bos)] == bos
        assert bos == [] or pair.prompt_ids.count(bos[0]) == 1
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert 1 <= len(ids) <= 256 - len(pair.prompt_ids)
            assert ids.count(end) == (ids[-1] == end)
            ended += ids[-1] == end
    assert ended == 2 * len(pairs) - report.truncated_responses
