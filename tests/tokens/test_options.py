"""What stands in front of a bare response."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.tokens.options import prior_front
from tests.kit import BOS_ID, byte_level, word_level, word_tokenizer


def test_a_bare_response_begins_as_the_tokenizer_begins_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RMiPOConfig(str(tmp_path))
    assert prior_front(args, word_level(["a"], adds_bos=True)) == (BOS_ID,)
    assert "stands behind <s>, as the tokenizer does" in capsys.readouterr().out
    assert prior_front(args, byte_level()) == ()  # it has a BOS, and adds none
    assert "behind no token at all" in capsys.readouterr().out
    prior_front(RMiPOConfig(str(tmp_path), loss_type="simpo"), byte_level())
    assert capsys.readouterr().out == ""  # no PMI in that loss


def test_none_and_bos_by_name(tmp_path: Path) -> None:
    none, bos = (RMiPOConfig(str(tmp_path), prior_context=name) for name in ("none", "bos"))
    assert prior_front(none, word_level(["a"], adds_bos=True)) == ()
    tokenizer = word_tokenizer()
    assert prior_front(bos, tokenizer) == (tokenizer.bos_token_id,)
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="needs a tokenizer with a BOS token"):
        prior_front(bos, without)
