"""Ollama's Modelfile says what the chat template says, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rmipo_lite.demo import MODEL
from rmipo_lite.export.modelfile import modelfile_of, turns_of

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's: roles have other names, a system turn is folded into the user's, texts are trimmed.
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content TRIM }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)


def _tokenizer(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, _CHATML, _GEMMA.replace("TRIM", "")])
def test_conversations_come_out_alike(template: str | None) -> None:
    tokenizer = _tokenizer(template)
    turns = turns_of(tokenizer)
    user, answer = {"role": "user", "content": "A\nb "}, {"role": "assistant", "content": " c"}
    for messages in ([user], [user, answer, user, answer, user]):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert turns.render(messages) == wanted
    assert ("system" in turns.around) == (template != _GEMMA.replace("TRIM", ""))


def test_bos_stands_in_the_file_where_the_tokenizer_does_not_put_it(tmp_path: Path) -> None:
    """Of the demo's tokenizer the template alone writes it."""
    tokenizer = _tokenizer(None)
    assert tokenizer("x")["input_ids"][0] != tokenizer.bos_token_id
    assert 'TEMPLATE """<s>{{ range' in modelfile_of(tokenizer, tmp_path / "my.gguf")
    puts = _tokenizer(None)
    puts._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert puts("x")["input_ids"][0] == tokenizer.bos_token_id
    assert 'TEMPLATE """{{ range' in modelfile_of(puts, tmp_path / "my.gguf")


def test_the_file(tmp_path: Path) -> None:
    text = modelfile_of(_tokenizer(_CHATML), tmp_path / "my.gguf")
    assert text.startswith('FROM ./my.gguf\nTEMPLATE """{{ range .Messages }}')
    turn = '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}'
    assert turn in text
    assert text.endswith('{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|end|>"\n')


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (_GEMMA.replace("TRIM", "| trim"), "puts the same texts around every turn"),
        (
            "{% for m in messages %}{{ loop.index }}. {{ m.content }}{% endfor %}",
            "can't be said in a Modelfile",
        ),
        ("{{ raise_exception('no') }}", "can't be said in a Modelfile"),
    ],
)
def test_what_it_cannot_say_is_refused(template: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        turns_of(_tokenizer(template))


def test_without_a_template_there_is_none() -> None:
    tokenizer = _tokenizer(None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="it has no template"):
        turns_of(tokenizer)
