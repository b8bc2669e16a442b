"""Tokenizers of three kinds, small and made in memory or shipped with the demo."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rmipo_lite.demo import data

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
BOS_ID, EOS_ID, UNKNOWN_ID = 1, 2, 3
_MARK = "\u2581"  # what sentencepiece writes for a space
_CHARACTERS = _MARK + "abcdefghijklmnopqrstuvwxyz0123456789.,:!?'\néü你"
# The last ones merge what the package puts in front of a response to tokenise it.
_MERGES = (
    "_ a|_ t|_t h|_th e|h e|i n|in g|e r|a n|r e|o n|l l|a b|ab c|1 2|. .|.. .|' s|_ 1|é é"
    "|_ _|__ __|\n \n|: :"
)


@functools.cache
def byte_level() -> Any:
    """The demo's byte-level BPE of 512 tokens, with a chat template; adds nothing by itself."""
    return data.load_tokenizer()


@functools.cache
def sentencepiece_like(model: Literal["bpe", "unigram"]) -> Any:
    """Byte fallback, spaces as marks, and a mark before every text, as Llama's tokenizers have."""
    pieces = [PAD, BOS, EOS, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), *_CHARACTERS]
    merges = []
    for merge in _MERGES.replace("_", _MARK).split("|"):
        left, right = merge.split(" ")
        merges.append((left, right))
        pieces.append(left + right)
    if model == "bpe":
        table = {piece: number for number, piece in enumerate(pieces)}
        backend: Any = Tokenizer(
            models.BPE(table, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
        )
        spaces = normalizers.Replace(" ", _MARK)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_MARK), spaces])
    else:
        scores = [(piece, -10.0 / len(piece)) for piece in pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=UNKNOWN_ID, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(backend)


def word_level(words: Sequence[str], *, adds_bos: bool = False, **special: Any) -> Any:
    """A token for every word between spaces; what is no word is unknown."""
    vocab = {token: number for number, token in enumerate((PAD, BOS, EOS, UNKNOWN, *words))}
    backend: Any = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
        )
    return _fast(backend, **special)


def _fast(backend: Any, **special: Any) -> Any:
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
