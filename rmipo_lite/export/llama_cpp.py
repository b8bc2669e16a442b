"""An exported file in a real llama.cpp, beside the model that it was made of.

llama.cpp comes as a wheel (xllamacpp) and runs in this process; it is asked over a port of this
machine, as its own server is.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.start import adapter_off
from rmipo_lite.model.backbone import evaluating

_TOP = 40  # likeliest tokens of a place that are asked for
_LIKELY = 0.01  # a token of less is nothing that an answer has
_WAIT_S = 600.0


class LlamaCpp:
    """A file that llama.cpp has loaded."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._plain_token = self.tokens("a")[-1]

    def ask(self, what: str, body: dict[str, Any]) -> Any:
        """An answer of the server's interface."""
        request = urllib.request.Request(
            f"{self._address}/{what}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, without what a tokenizer puts around it."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(number) for number in self.ask("tokenize", body)["tokens"]]

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """A conversation by the file's chat template, ready for an answer."""
        return str(self.ask("apply-template", {"messages": messages})["prompt"])

    def likeliest(self, ids: list[int], count: int = _TOP) -> dict[int, float]:
        """Log-probs of the likeliest tokens that may follow, nats."""
        body = {
            "prompt": ids, "n_predict": 1, "n_probs": count, "temperature": 0.0,
            "cache_prompt": False,
            # What is drawn must have a text, or the answer comes without probabilities (which
            # are the model's own all the same): an end has none, nor has half a letter.
            "logit_bias": [[self._plain_token, 1000.0]],
        }  # fmt: skip
        (place,) = self.ask("completion", body)["completion_probabilities"]
        return {int(one["id"]): float(one["logprob"]) for one in place["top_logprobs"]}

    def answer(self, messages: list[dict[str, str]], tokens: int) -> tuple[str, bool]:
        """(text, whether it ended by itself), the likeliest token at every place."""
        body = {
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        choice = self.ask("v1/chat/completions", body)["choices"][0]
        return str(choice["message"]["content"]), choice["finish_reason"] == "stop"


@contextmanager
def loaded(path: Path, *, context: int = 2048, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """A GGUF file in llama.cpp, inside the block; `adapter`: a LoRA file upon it.

    Raises:
        ImportError: xllamacpp isn't installed.
        ValueError: llama.cpp can't load it.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port = context, 1, 0
    params.warmup, params.verbosity, params.use_jinja = False, 0, True
    params.cpuparams.n_threads = torch.get_num_threads()
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ValueError(
            f"llama.cpp can't load {path.name if adapter is None else adapter.name} ({error}); the "
            "model or its adapter is of a kind that isn't exported rightly here"
        ) from error
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server


@dataclass(frozen=True)
class Drift:
    """How far a file is from the model that it was made of.

    Attributes:
        places: how many tokens were predicted.
        worst: largest difference of a log-prob, nats, of tokens that the model gives 1 % or more.
        kl: mean KL(model || file), nats; what isn't among the 40 likeliest tokens counts as one.
        same_first: share of places at which the likeliest token is the same.
        effect: mean KL(model || model without its adapter), nats; None where it has none.
    """

    places: int
    worst: float
    kl: float
    same_first: float
    effect: float | None = None

    def __str__(self) -> str:
        own = "" if self.effect is None else f"; what was trained is KL {self.effect:.1g} itself"
        return (
            f"KL {self.kl:.1g} nats a token from the trained model, the same likeliest token at "
            f"{self.same_first:.1%} of {self.places} places, log-probs within {self.worst:.2g}{own}"
        )


def drift(model: nn.Module, file: LlamaCpp, texts: Sequence[list[int]], places: int = 40) -> Drift:
    """Lay next-token predictions side by side, at places spread over texts of ids."""
    every = max(1, sum(len(ids) - 1 for ids in texts) // places)
    at = [(ids, end) for ids in texts for end in range(1, len(ids))][::every][:places]
    worst, kl, same, effect = 0.0, 0.0, 0, 0.0
    adapted = model if isinstance(model, PeftModel) else None
    with evaluating(model), torch.no_grad():
        for ids, end in at:
            ours = _next_logps(model, ids[:end])
            if adapted is not None:
                with adapter_off(adapted):
                    effect += float((ours.exp() * (ours - _next_logps(model, ids[:end]))).sum())
            theirs = file.likeliest(ids[:end])
            pairs = [(float(ours[number]), logp) for number, logp in theirs.items()]
            likely = [abs(a - b) for a, b in pairs if math.exp(a) >= _LIKELY]
            worst = max(worst, *likely) if likely else worst
            kl += _kl(pairs)
            same += int(ours.argmax()) == max(theirs, key=lambda number: theirs[number])
    own = None if adapted is None else effect / len(at)
    return Drift(len(at), worst, kl / len(at), same / len(at), own)


def _next_logps(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probs of what follows, (V,) float64, nats."""
    device = next(model.parameters()).device
    logits = causal_lm(model)(torch.tensor([ids], device=device)).logits[0, -1]
    logps: torch.Tensor = logits.double().cpu().log_softmax(-1)
    return logps


def _kl(pairs: list[tuple[float, float]]) -> float:
    """Of log-probs of some tokens, (model's, file's); all others are one token more."""
    ours, theirs = (sum(math.exp(pair[side]) for pair in pairs) for side in (0, 1))
    found = sum(math.exp(a) * (a - b) for a, b in pairs)
    if ours < 1 and theirs < 1:
        found += (1 - ours) * math.log((1 - ours) / (1 - theirs))
    return max(0.0, found)
