"""Models of the installed transformers: their output layers, packing, and a step of the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.model.head import read_head
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.parts import ARCHITECTURES, VOCAB, random_pairs, tiny_model
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.step import PairStep

_WIDTH = 32


# ---- 31: output layers ----------------------------------------------------------------------


def head_kinds(_folder: Path, seed: int) -> Iterator[Case]:
    """Our log-probs are those of the model's own logits, and packed rows those of padded ones."""
    for name, make in KINDS.items():
        yield name, partial(_judge, make, random_pairs(4, seed))


def _judge(make: Callable[[], nn.Module], pairs: list[TokenizedPair]) -> None:
    model = make()
    problem = packing_problem(model, pairs, "auto", 0)
    expect(problem is None, f"packed, it gives other log-probs: {problem}")
    _expect_own_logits(model, pairs)


def _expect_own_logits(model: nn.Module, pairs: list[TokenizedPair]) -> None:
    """Values, and the gradient of what is trained, here and through the model's logits."""
    inputs = batch.policy_input(pairs, packing=False)
    hidden = scored_hidden(model, inputs)
    ours = read_head(model).token_logps(hidden, inputs.target_ids, "auto")
    logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    rows = logits.reshape(-1, logits.shape[-1])[inputs.logit_rows]
    own = rows.log_softmax(-1).gather(1, inputs.target_ids[:, None])[:, 0]
    worst = float((ours - own).abs().max())
    expect(worst <= 1e-5, f"log-probs differ from the model's own by {worst:.2g} nats")
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(logps.sum(), trained, allow_unused=True, materialize_grads=True)
        for logps in (ours, own)
    ]
    for got, want in zip(*grads, strict=True):
        close = torch.allclose(got, want, rtol=1e-4, atol=1e-4 * (1 + float(want.abs().max())))
        expect(close, f"a gradient differs by {float((got - want).abs().max()):.2g}")
    expect(any(want.abs().max() > 0 for want in grads[1]), "nothing is trained")


def _with_bias() -> nn.Module:
    model = tiny_model()
    model.lm_head = nn.Linear(_WIDTH, VOCAB)
    return model


def _with_lora(name: str, *target_modules: str) -> nn.Module:
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=list(target_modules))
    return get_peft_model(tiny_model(name), config).eval()


def _four_bit(quant_type: str) -> nn.Module:
    """A head whose weight is stored in 4 bits, under LoRA elsewhere."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    model = _with_lora("llama", "q_proj")
    kind = {"quant_type": quant_type}
    head = Linear4bit(_WIDTH, VOCAB, bias=False, compute_dtype=torch.float32, **kind)
    weight = read_head(model).weight.detach()
    head.weight = Params4bit(weight, requires_grad=False, **kind)
    head.support_avx512bf16_for_cpu = False  # its packed kernel there computes in bfloat16
    model.get_base_model().lm_head = head.to("cpu")
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(tiny_model, name) for name in ARCHITECTURES},
    "bias": _with_bias,
    "tied to the embeddings": lambda: tiny_model(tie_word_embeddings=True),
    # More rows than the tokenizer has tokens: every row counts in the softmax.
    "padded vocabulary": lambda: tiny_model(vocab_size=128),
    "softcap and LoRA on the head": lambda: _with_lora("gemma2", "q_proj", "lm_head"),
    "4-bit head, nf4": lambda: _four_bit("nf4"),
    "4-bit head, fp4": lambda: _four_bit("fp4"),
}


# ---- 12: the method -------------------------------------------------------------------------


def against_loops(folder: Path, seed: int) -> Iterator[Case]:
    """A step's loss in float64 beside the paper's formulas, one response at a time."""
    for name in ("llama", "mistral", "qwen3", "gpt2"):
        for packing in (True, False):
            args = RMiPOConfig(str(folder), use_cpu=True)
            step = PairStep(tiny_model(name).double(), args, 60, packing)
            yield f"{name}, packing {packing}", partial(_beside_loops, step, seed)


def _beside_loops(step: PairStep, seed: int) -> None:
    pairs = random_pairs(4, seed)
    want = {pair.row: _loss(step.model, pair, step.args) for pair in pairs}
    for part, values in step.evaluate(pairs):
        for pair, loss in zip(part, values.loss.tolist(), strict=True):
            expect(abs(loss - want[pair.row]) < 1e-6, f"loss {loss}, by hand {want[pair.row]}")
    mean = float(step.train(pairs, lambda loss: loss.backward()).loss)
    whole = sum(want.values()) / len(want)
    expect(abs(mean - whole) < 1e-6, f"the step's loss is {mean}, by hand {whole}")


def _loss(model: nn.Module, pair: TokenizedPair, args: RMiPOConfig) -> float:
    means, pmis = [], []
    for ids in (pair.chosen_ids, pair.rejected_ids):
        policy, prior = response_logps(model, pair.prompt_ids, ids), response_logps(model, [], ids)
        means.append(sum(policy) / len(policy))
        pmis.append(means[-1] - sum(prior) / len(prior) if prior else math.nan)
    gap = pmis[0] - pmis[1]
    gap = 0.0 if math.isnan(gap) else max(0.0, gap)
    gamma = args.gamma_min + (args.gamma_max - args.gamma_min) * math.exp(-gap)
    return math.log1p(math.exp(gamma - args.beta * (means[0] - means[1])))


@torch.no_grad()
def response_logps(
    model: nn.Module, context: Sequence[int], response: Sequence[int]
) -> list[float]:
    """Log-prob of each token of a response that has a token before it."""
    ids = [*context, *response]
    if len(ids) < 2:
        return []
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logps = []
    for place in range(max(1, len(context)), len(ids)):
        logps.append(float(torch.log_softmax(logits[place - 1], dim=-1)[ids[place]]))
    return logps


CHECKS = [
    Check(12, "a step against the method in loops, float64", against_loops),
    Check(31, "output layers of the installed transformers, packed = padded", head_kinds),
]
