"""The one token that ends an answer: the template's end of a turn, else the tokenizer's EOS.

What is scored as the end of an answer is what generation has to stop at. A base model's tokenizer
with a chat template of ChatML's kind has two: turns end with <|im_end|>, texts with <|endoftext|>.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rmipo_lite.tokens.encoder import TextEncoder
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import after_answer


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token whose score ends an answer in a conversation; of a tokenizer without a chat
    template, or whose template writes no control token there, EOS.
    """
    after = after_answer(tokenizer)
    end = TextEncoder(tokenizer).end_of_turn(after) if after else ""
    ids = tokenizer.encode(end, add_special_tokens=False) if end else []
    last: int | None = ids[-1] if ids else tokenizer.eos_token_id
    return last


def anchored_end(pairs: Sequence[TokenizedPair], tokenizer: Any) -> int | None:
    """`scored_end`, but no word: what pairs that came tokenised and without an end, end with."""
    end = scored_end(pairs)
    known = {end_id(tokenizer), tokenizer.eos_token_id, *tokenizer.all_special_ids}
    known |= set(getattr(tokenizer, "added_tokens_decoder", {}))
    return end if end in known else None


def scored_end(pairs: Sequence[TokenizedPair]) -> int | None:
    """The token that most chosen responses end with; None where no token ends most of them."""
    ends = Counter(pair.chosen_ids[-1] for pair in pairs if pair.chosen_ids)
    token, count = next(iter(ends.most_common(1)), (None, 0))
    return token if 2 * count > len(pairs) else None
