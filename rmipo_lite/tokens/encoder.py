"""Text -> ids, in batches, for prompts and for responses that are tokenised apart from them.

Three things go wrong when a response is tokenised alone. The tokenizer may put BOS in front: every
call here is made without special tokens, and BOS is put in front of prompts alone, once, if and
only if the tokenizer itself adds one. A sentencepiece-like tokenizer takes the response for the
beginning of a text and puts a space mark in front: such a tokenizer is found by trying, and its
responses are tokenised behind an anchor (a newline) whose ids are then taken off; a response that
merges with it gets another one. And a huge text takes minutes: texts are cut by characters before
they are tokenised.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

CHARS_PER_TOKEN = 64  # a text is cut to max_length times this; ordinary tokens hold 2 to 6
BATCH_TEXTS = 1000  # texts in one call of the tokenizer
ANCHORS = ("", "\n", " ", ":", ".", "x")  # tried in this order
_PROBES = ("world", " world", "\nworld", "1", "é", "  x")


class TextEncoder:
    """A tokenizer with its border behaviour found out.

    Attributes:
        bos_ids: what the tokenizer puts in front of a text; empty if nothing.
        anchor: text put in front of a response while tokenising it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos_ids = leading_ids(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self._special_text = special_text_pattern(tokenizer)
        self.anchor = ""
        self._anchor_ids: list[int] = []
        self._find_anchor()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, no special token added."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            batch: Any = self.tokenizer(
                list(texts[start : start + BATCH_TEXTS]),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += batch["input_ids"]
        return ids

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every prompt, with exactly one BOS if the tokenizer uses one."""
        front = self.bos_ids
        return [ids if ids[: len(front)] == front else front + ids for ids in self.encode(texts)]

    def front(self, prompt: list[int]) -> list[int]:
        """What a prompt keeps when it is cut: its BOS, put there by the tokenizer or a template."""
        bos = [self.tokenizer.bos_token_id]
        return self.bos_ids or (bos if prompt[:1] == bos else [])

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every response as they stand behind other text."""
        if not self.anchor:
            return self.encode(texts)
        size = len(self._anchor_ids)
        anchored = self.encode([self.anchor + text for text in texts])
        return [
            ids[size:] if ids[:size] == self._anchor_ids else self._behind_another(text)
            for ids, text in zip(anchored, texts, strict=True)
        ]

    def _behind_another(self, text: str) -> list[int]:
        """Ids of a response that merges with the anchor: another newline behind a newline."""
        for anchor in ANCHORS[1:]:
            front, ids = self.encode([anchor, anchor + text])
            if ids[: len(front)] == front and self._joins(ids[len(front) :], text):
                return ids[len(front) :]
        return self.encode([text])[0]

    def _joins(self, ids: list[int], text: str) -> bool:
        """Whether these ids, behind those of another text, say the joined text."""
        front = self.encode(["Hello"])[0]
        joined = self.tokenizer.decode(front + ids, clean_up_tokenization_spaces=False)
        return bool(joined == "Hello" + text)

    def has_special_text(self, text: str) -> bool:
        """Whether user text holds the text of a control token."""
        return self._special_text is not None and self._special_text.search(text) is not None

    def end_of_turn(self, after: str) -> str:
        """What of the template's text after an answer is scored; empty if it has no control token.

        That is the text up to the first control token, and those that follow it directly up to
        EOS (Cohere ends the response and then the turn).
        """
        if self._special_text is None:
            return ""
        match = self._special_text.search(after)
        end = 0
        while match is not None:
            end = match.end()
            if match.group() == self.tokenizer.eos_token:
                break
            match = self._special_text.match(after, end)
        return after[:end]

    def _find_anchor(self) -> None:
        """The first anchor with which prompt and response decode to their joined text."""
        for anchor in ANCHORS:
            self.anchor, self._anchor_ids = anchor, self.encode([anchor])[0] if anchor else []
            probed = self.responses(_PROBES)
            if all(self._joins(ids, probe) for ids, probe in zip(probed, _PROBES, strict=True)):
                return
        self.anchor, self._anchor_ids = "", []  # no tokenizer of exact text (word-level, BERT)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text: [BOS], or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def special_text_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of the texts of all control tokens; None without one."""
    texts = set(tokenizer.all_special_tokens)
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    texts |= {token.content for token in decoder.values() if token.special}
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
