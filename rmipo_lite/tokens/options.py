"""How rows become ids: the run's options and the model's context put together."""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rmipo_lite.config import RMiPOConfig, TokenizationMode, TruncationMode
from rmipo_lite.output.console import say
from rmipo_lite.tokens.encoder import leading_ids


@dataclass(frozen=True)
class TokenizationOptions:
    """How rows become ids; lengths in tokens."""

    mode: TokenizationMode = "separate"
    max_length: int | None = 1024  # prompt + response; None: no limit
    max_prompt_length: int | None = None  # None: no limit of its own
    truncation_mode: TruncationMode = "keep_end"  # mode "authors" only
    chat_template: str | None = None  # as for `prepare_tokenizer`
    num_proc: int | None = None  # processes; None: this one


def options_for(args: RMiPOConfig, config: PretrainedConfig | None) -> TokenizationOptions:
    """The run's tokenisation, `max_length` clamped to the model's context (with one line).

    Without a config, where no model limits the length, it is the run's own.
    """
    context = None if config is None else context_of(config)
    max_length = args.max_length
    if context is not None and (max_length is None or max_length > context):
        if max_length is not None:
            say(f"max_length {max_length} is more than the model's context: {context} is used")
        max_length = context
    return TokenizationOptions(
        mode=args.tokenization,
        max_length=max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=args.truncation_mode,
        chat_template=args.chat_template,
        num_proc=args.dataset_num_proc,
    )


def context_of(config: PretrainedConfig) -> int | None:
    """The longest text that a model reads, tokens; None where its config doesn't say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def prior_front(args: RMiPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids in front of a bare response, by `prior_context`; none at all: (). Says which.

    Raises:
        ValueError: "bos" with a tokenizer that has none.
    """
    if args.prior_context == "none":
        return ()
    if args.prior_context == "auto":
        front = tuple(leading_ids(tokenizer))
        if args.uses_prior:
            stands = "".join(tokenizer.convert_ids_to_tokens(list(front))) or "no token at all"
            say(f"PMI: a response without its prompt stands behind {stands}, as the tokenizer does")
        return front
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "prior_context='bos' needs a tokenizer with a BOS token, and this one has none; use "
            "prior_context='none'"
        )
    return (int(tokenizer.bos_token_id),)
