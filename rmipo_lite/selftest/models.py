"""Models of the installed transformers: their output layers, packing, and a step of the method."""

import math
from collections.abc import Callable, Iterator
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
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair


def head_kinds(_folder: Path, seed: int) -> Iterator[Case]:
    """Our log-probs are those of the model's own logits, and packed rows those of padded ones."""
    for name, make in KINDS.items():
        yield name, partial(_judge, make, random_pairs(4, seed))


def _judge(make: Callable[[], nn.Module], pairs: list[TokenizedPair]) -> None:
    model, inputs = make(), batch.policy_input(pairs, packing=False)
    problem = packing_problem(model, pairs, "auto", 0)
    expect(problem is None, f"packed, it gives other log-probs: {problem}")
    ours = read_head(model).token_logps(scored_hidden(model, inputs), inputs.target_ids, "auto")
    logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    logps = logits.flatten(0, 1)[inputs.logit_rows].log_softmax(-1)
    worst = float((ours - logps.gather(1, inputs.target_ids[:, None])[:, 0]).abs().max())
    expect(worst <= 1e-5, f"log-probs differ from the model's own by {worst:.2g} nats")


def _with_head(head: nn.Module) -> nn.Module:
    model = tiny_model()
    model.lm_head = head
    return model


def _with_lora() -> nn.Module:
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    return get_peft_model(tiny_model("gemma2"), config).eval()


def _four_bit() -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head = Linear4bit(32, VOCAB, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.weight = Params4bit(torch.randn(VOCAB, 32), requires_grad=False, quant_type="nf4")
    head.support_avx512bf16_for_cpu = False  # its packed kernel there computes in bfloat16
    return _with_head(head.to("cpu"))


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(tiny_model, name) for name in ARCHITECTURES},
    "bias": lambda: _with_head(nn.Linear(32, VOCAB)),
    "tied to the embeddings": lambda: tiny_model(tie_word_embeddings=True),
    # More rows than the tokenizer has tokens: every row counts in the softmax.
    "padded vocabulary": lambda: tiny_model(vocab_size=128),
    "softcap and LoRA on the head": _with_lora,
    "4-bit head": _four_bit,
}


def against_loops(folder: Path, seed: int) -> Iterator[Case]:
    """A step's loss in float64 beside the paper's formulas, one response at a time."""
    for name in ("llama", "mistral", "qwen3", "gpt2"):
        for packing in (True, False):
            args = RMiPOConfig(str(folder), use_cpu=True, sft_weight=0.0)
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
def response_logps(model: nn.Module, context: list[int], response: list[int]) -> list[float]:
    """Log-prob of each token of a response that has a token before it."""
    ids, first = context + response, max(1, len(context))
    if len(ids) < 2:
        return []
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return [float(logits[n - 1].log_softmax(-1)[ids[n]]) for n in range(first, len(ids))]


CHECKS = [
    Check(12, "a step against the method in loops, float64", against_loops),
    Check(31, "output layers of the installed transformers, packed = padded", head_kinds),
]
