"""A tokenizer as llama.cpp wants it: texts of tokens, their kinds, merges, and how text is cut.

llama.cpp cuts texts by code of its own, chosen by a name in the file. Which name, follows from what
the tokenizer says of itself; a way of cutting that no known name means is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rmipo_lite.tokens.ending import end_id

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression that a tokenizer splits texts by -> llama.cpp's name for it.
_BY_EXPRESSION = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{'|'.join(_CASED)}|\p{{N}}|{_CASED_REST}": "tekken",
    rf"{'|'.join(part + _ENDING for part in _CASED)}|\p{{N}}{{1,3}}|{_CASED_REST}": "gpt-4o",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN_SCORE = -1e6  # of a piece that no merge makes
_SPACE = chr(0x2581)  # of SentencePiece: a lower block for a space


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: how llama.cpp cuts texts.
        tokens, kinds: by id, one for every row of the embedding.
        scores: of SentencePiece: higher ones are merged first.
        merges: of byte-level BPE.
        special: key of `gguf.GGUFWriter` -> id or flag.
        template: the chat template; of several by name, all of them as the file lists them.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, Any]
    template: str | list[dict[str, str]] | None


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Of a fast tokenizer and a model with embeddings of so many tokens.

    Raises:
        ValueError: the tokenizer is of a kind that llama.cpp has no name for, or has more tokens
            than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("tokenizer: a fast one is wanted for GGUF, with a tokenizer.json")
    said: dict[str, Any] = json.loads(backend.to_str())
    model = said["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"tokenizer: one of kind {model['type']} can't be exported to GGUF here, BPE can"
        )
    is_pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, size, is_pieces)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    special, template = _special(tokenizer), tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if is_pieces:
        special["add_add_space_prefix"] = _has_space_in_front(said)
        return Vocabulary(
            "llama", "default", tokens, kinds, _scores(tokens, merges), None, special,
            template,
        )  # fmt: skip
    pre = _pre_tokenizer(said.get("pre_tokenizer"))
    if said.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError(
            f"tokenizer: its normalizer {json.dumps(said['normalizer'])[:120]} has no place in a "
            "GGUF file, and texts would become other tokens there"
        )
    return Vocabulary(
        "gpt2", pre, tokens, kinds, None, merges, special, template
    )  # fmt: skip


def _tokens(tokenizer: Any, size: int, is_pieces: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ValueError(
            f"tokenizer: it has token {max(by_id)}, and the model's embeddings end at {size - 1}; "
            "use the model's own tokenizer"
        )
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        text = by_id.get(number)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            is_control = added[number].special or _looks_special(text)
            kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
            if not is_control and is_pieces:
                text = text.replace(_SPACE, " ")
        elif is_pieces and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        if is_pieces and text == tokenizer.unk_token:
            kind = TokenType.UNKNOWN
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _looks_special(text: str) -> bool:
    """As llama.cpp's converter sees it: some models don't mark theirs."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return text.startswith(("<|", "<unused")) and text.endswith((">", "|>"))


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair of the highest score: of a piece, that of its first merge."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    return [-float(rank[text]) if text in rank else _UNKNOWN_SCORE for text in tokens]


def _has_space_in_front(said: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    parts = json.dumps([said.get("normalizer"), said.get("pre_tokenizer")])
    if '"Prepend"' in parts:
        return True
    return '"prepend_scheme": "always"' in parts or '"prepend_scheme": "first"' in parts


def _pre_tokenizer(said: Any) -> str:
    """llama.cpp's name for a way of cutting texts."""
    parts = [said] if (said or {}).get("type") != "Sequence" else said["pretokenizers"]
    parts = [part for part in parts if part]
    by_level = parts[-1] if parts else {}
    if by_level.get("type") != "ByteLevel" or by_level.get("add_prefix_space"):
        raise _unknown(said)
    rest, cuts = parts[:-1], bool(by_level.get("use_regex", True))
    if not rest and cuts:
        return "gpt-2"
    if len(rest) == 1 and cuts and rest[0]["type"] == "Digits" and rest[0]["individual_digits"]:
        return "refact"
    if len(rest) == 1 and not cuts and rest[0]["type"] == "Split":
        expression = rest[0]["pattern"].get("Regex", "")
        if expression in _BY_EXPRESSION and rest[0]["behavior"] == "Isolated":
            return _BY_EXPRESSION[expression]
    raise _unknown(said)


def _unknown(said: Any) -> ValueError:
    return ValueError(
        f"tokenizer: llama.cpp has no known name for the way it cuts texts "
        f"({json.dumps(said)[:200]}); llama.cpp's own converter may know this model by name"
    )


def _special(tokenizer: Any) -> dict[str, Any]:
    """Ids of special tokens; the end is the one that training scored."""
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    found = {
        "add_bos_token_id": bos,
        "add_eos_token_id": end_id(tokenizer),
        "add_eot_token_id": end_id(tokenizer) if tokenizer.chat_template else None,
        "add_pad_token_id": tokenizer.pad_token_id,
        "add_unk_token_id": tokenizer.unk_token_id,
    }
    return {
        **{name: number for name, number in found.items() if number is not None},
        "add_add_bos_token": bos is not None and ids[:1] == [bos],
        "add_add_eos_token": False,
    }
