"""Chat templates: the prefix rule, what templates insert, strip, refuse, and how long they take."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import load_rows
from rmipo_lite.system import memory
from rmipo_lite.tokens import template_limits
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.tokens.tokenize_rows import tokenize_rows

# A model of each thing templates do, in the byte-level tokenizer's own control tokens.
HEAD = "{% for m in messages %}{% if m['role'] == 'assistant' %}A:"
TAIL = (
    "{% else %}{{ m['role'] }}:{{ m['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
SIMPLE = HEAD + "{{ m['content'] }}</s>\n" + TAIL
STRIPS = HEAD + "{{ m['content'] | trim }}</s>" + TAIL
THINKS = (
    HEAD + "{% if '</think>' in m['content'] %}{{ m['content'] }}{% else %}"
    "<think>\n\n</think>\n\n{{ m['content'] }}{% endif %}</s>\n" + TAIL
)
NO_PREFIX = HEAD.replace("A:", "B:") + "{{ m['content'] }}</s>" + TAIL
NO_END = HEAD + "{{ m['content'] }};" + TAIL
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
SILENT = HEAD + "</s>" + TAIL
HANGS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}" + SIMPLE


@pytest.fixture(scope="module")
def tokenizer(references: Path) -> Any:
    return AutoTokenizer.from_pretrained(references / "tokenizer")


def chat(chosen: str = "yes", rejected: str = "no", system: str = "") -> dict[str, Any]:
    head = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*head, {"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def run(
    records: list[dict[str, Any]], tokenizer: Any, template: str | None
) -> tuple[list[TokenizedPair], DataReport]:
    rows, report = load_rows(records)
    pairs = tokenize_rows(rows, tokenizer, TokenizationOptions(chat_template=template), report)
    report.check()
    return pairs, report


def decoded(pair: TokenizedPair, tokenizer: Any) -> tuple[str, str, str]:
    texts = (tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return tuple(texts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (SIMPLE, "user:Hi;A:"),
        (THINKS, "user:Hi;A:<think>\n\n</think>\n\n"),  # inserted text belongs to the prompt
        (NO_END, "user:Hi;A:"),  # EOS is added once
        ("plain", "User: Hi\nAssistant: "),
    ],
)
def test_the_answer_alone_is_scored(tokenizer: Any, template: str, prompt: str) -> None:
    pairs, report = run([chat(), chat("1", " two")], tokenizer, template)
    assert decoded(pairs[0], tokenizer) == (prompt, "yes</s>", "no</s>")
    assert decoded(pairs[1], tokenizer) == (prompt, "1</s>", " two</s>")
    assert report.template_stripped == 0


def test_answers_with_their_own_thinking_replace_the_inserted_one(tokenizer: Any) -> None:
    pairs, report = run([chat(), chat("<think>hm</think>yes", "no")], tokenizer, THINKS)
    assert decoded(pairs[1], tokenizer) == (
        "user:Hi;A:",
        "<think>hm</think>yes</s>",
        "<think>\n\n</think>\n\nno</s>",
    )
    assert report.template_rewritten == 1


def test_a_prompt_without_words_is_no_fault(tokenizer: Any) -> None:
    record = chat()
    record["prompt"][-1]["content"] = " "
    (pair,), _ = run([record], tokenizer, SIMPLE)
    assert decoded(pair, tokenizer)[0] == "user: ;A:"


def test_rows_that_need_a_template_are_refused_among_rows_that_need_none(tokenizer: Any) -> None:
    text = {"prompt": "Hi", "chosen": " a", "rejected": " b"}
    pairs, report = run([text, chat(), text], tokenizer, None)
    assert [pair.row for pair in pairs] == [0, 2]
    ((reason, tally),) = report.refused.items()
    assert reason.startswith("prompt: wanted a conversation that the chat template takes")
    assert tally.example == "roles user: LookupError: the tokenizer has no chat template"


def test_an_empty_thought_before_the_answers_own_is_refused(tokenizer: Any) -> None:
    doubles = HEAD + "<think></think>{{ m['content'] }}</s>" + TAIL
    pairs, report = run([chat(), chat("<think>hm</think>yes", "no")], tokenizer, doubles)
    assert [pair.row for pair in pairs] == [0]
    ((reason, tally),) = report.refused.items()
    assert reason.startswith("chosen: wanted a chat template that leaves an answer's own <think>")
    assert "<think></think><think>hm" in tally.example


def test_a_template_that_opens_the_thinking_keeps_answers_that_think(tokenizer: Any) -> None:
    opens = HEAD + "{{ m['content'] }}</s>" + TAIL.replace("A:{% endif", "A:<think>{% endif")
    thoughts = ("<think>so</think>yes", "<think>hm</think>no")
    pairs, report = run([chat(*thoughts), chat()], tokenizer, opens)
    assert decoded(pairs[0], tokenizer) == (
        "user:Hi;A:<think>",
        "so</think>yes</s>",
        "hm</think>no</s>",
    )
    assert [tally.rows for tally in report.refused.values()] == [[1]]


def test_stripped_whitespace_is_counted_and_can_make_a_pair_identical(tokenizer: Any) -> None:
    pairs, report = run([chat(), chat(" yes", "no"), chat("yes", " yes")], tokenizer, STRIPS)
    assert len(pairs) == 2
    assert report.template_stripped == 1
    assert [t.rows for r, t in report.dropped.items() if "identical ones after the chat" in r] == [
        [2]
    ]
    assert report.identical_pairs == 1


def test_template_that_rewrites_the_prompt_is_refused_with_both_texts(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="wanted a chat template that writes it the same before an answer"
    ) as caught:
        run([chat()], tokenizer, NO_PREFIX)
    assert "'user:Hi;A:' against 'user:Hi;B:yes</s>'" in str(caught.value)


def test_template_that_raises_names_row_and_roles(tokenizer: Any) -> None:
    pairs, report = run([chat(), chat(system="S"), chat()], tokenizer, REFUSES + SIMPLE)
    assert [pair.row for pair in pairs] == [0, 2]
    ((reason, tally),) = report.refused.items()
    assert (
        reason == "prompt: wanted a conversation that the chat template takes, got one it refuses"
    )
    assert tally.rows == [1]
    assert "system, user" in tally.example
    assert "no system" in tally.example


def test_template_that_drops_the_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="wanted a chat template that writes the answer, got one that doesn't"
    ):
        run([chat()], tokenizer, SILENT)


def test_hostile_template_ends_in_time(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "RENDER_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ValueError, match="took more than"):
        run([chat()], tokenizer, HANGS)
    assert time.monotonic() - start < 20


def test_authors_tokenisation_has_the_same_limit(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "RENDER_SECONDS", 0.3)
    options = TokenizationOptions(
        mode="authors", max_length=64, max_prompt_length=32, chat_template=HANGS
    )
    rows, report = load_rows([chat()])
    with pytest.raises(ValueError, match="took more than"):
        tokenize_rows(rows, tokenizer, options, report)


def test_a_refused_prompt_does_not_shift_the_texts_of_the_next_row(tokenizer: Any) -> None:
    options = TokenizationOptions(
        mode="authors", max_length=64, max_prompt_length=32, chat_template=REFUSES + SIMPLE
    )
    alone, among = ([chat("a", "b")], [chat(system="S"), chat("a", "b")])
    ids = []
    for records in (alone, among):
        rows, report = load_rows(records)
        (pair,) = tokenize_rows(rows, tokenizer, options, report)
        ids.append((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    assert ids[0] == ids[1]


@pytest.mark.parametrize("bomb", ["{{ 'a' * 10**0 }}", "{{ 10 ** 10 ** 9 }}", "{% set x = 2**9 %}"])
def test_powers_are_refused_before_anything_is_rendered(tokenizer: Any, bomb: str) -> None:
    with pytest.raises(ValueError, match=r"line 1 uses the operator \*\*"):
        run([chat()], tokenizer, bomb + SIMPLE)


def test_stars_before_keywords_are_no_power(tokenizer: Any) -> None:
    keywords = "{% set names = {'a': 1} %}{{ dict(**names) and '' }}{{ dict(b=2, **names) and '' }}"
    assert len(run([chat()], tokenizer, keywords + SIMPLE)[0]) == 1


@pytest.mark.skipif(not memory.CAN_LIMIT, reason="memory is limited on Linux alone")
@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 999999999 * 9 }}",
        "{% for i in range(90000) %}{{ 'a' * 1000000 }}{% endfor %}",
    ],
)
def test_a_template_that_eats_memory_ends(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    monkeypatch.setattr(template_limits, "RENDER_BYTES", 2**29)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=r"took more than 0\.5 GiB"):
        run([chat()], tokenizer, bomb + SIMPLE)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_where_memory_cannot_be_limited_it_is_watched(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CAN_LIMIT", False)
    monkeypatch.setattr(memory, "limit", contextlib.nullcontext)
    monkeypatch.setattr(template_limits, "RENDER_BYTES", 2**26)
    start, more = "namespace(x=[])", "n.x + ['a' * 99999 ~ i]"
    grows = f"{{% set n = {start} %}}{{% for i in range(9000) %}}{{% set n.x = {more} %}}"
    with pytest.raises(ValueError, match=r"took more than 0\.0625 GiB"):
        run([chat()], tokenizer, grows + "{% endfor %}" + SIMPLE)


def test_a_template_that_is_no_jinja_is_called_that(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="chat_template: line 1 is not Jinja"):
        run([chat()], tokenizer, "{% for m in messages %}")


def test_no_template_names_the_way_out(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match='chat_template="plain"'):
        run([chat()], tokenizer, None)


def test_text_that_is_no_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="got 'chatml'"):
        prepare_tokenizer(tokenizer, "chatml")
    with pytest.raises(ValueError, match="got '7'"):
        prepare_tokenizer(tokenizer, 7)  # type: ignore[arg-type]


def test_a_name_is_no_tokenizer() -> None:
    with pytest.raises(TypeError, match=r"tokenizer: wanted a tokenizer, .* got str"):
        prepare_tokenizer("gpt2", None)  # type: ignore[arg-type]


def test_text_rows_stay_text_under_a_template(tokenizer: Any) -> None:
    record = {"prompt": "Hi", "chosen": " a", "rejected": " b"}
    (pair,), _ = run([record], tokenizer, "plain")
    assert decoded(pair, tokenizer) == ("Hi", " a</s>", " b</s>")


def test_plain_is_saved_with_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    prepared = prepare_tokenizer(tokenizer, "plain")
    assert tokenizer.chat_template is None  # the user's object is left alone
    prepared.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "System: Be short.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant: "


def test_end_of_turn_keeps_adjacent_control_tokens_and_cuts_the_rest(tokenizer: Any) -> None:
    ended = HEAD + "{{ m['content'] }}<pad></s>\n<pad>" + TAIL
    (pair,), _ = run([chat()], tokenizer, ended)
    assert decoded(pair, tokenizer)[1] == "yes<pad></s>"


def test_chatml_of_a_real_tokenizer(shared: Path) -> None:
    qwen = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2")
    (pair,), _ = run([chat()], qwen, None)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(pair, qwen) == (prompt, "yes<|im_end|>", "no<|im_end|>")
