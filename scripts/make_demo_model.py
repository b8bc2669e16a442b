"""Makes everything the demo ships: tokenizer, tiny Llama, preference pairs. Needs no network.

    python scripts/make_demo_model.py            # writes into rmipo_lite/demo/assets
    python scripts/make_demo_model.py my-folder

One process, one thread, fixed seed: the same machine writes the same bytes again, another one the
same metrics to a few digits (`metrics.json`). The supervised text is question and answer, with the
loss on the answer, and bare answers without a question, as raw text has them: without those the
model would never have seen what its own prior pass shows it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rmipo_lite.demo.data import ASSETS, MODEL, message_row
from rmipo_lite.demo.facts import GENERIC, KINDS, Fact
from rmipo_lite.demo.scoring import sample_answers
from rmipo_lite.demo.task import (
    ANSWER_SHARES,
    WORDY_SHARE,
    Question,
    ask,
    held_out_questions,
    right_answer,
    split_facts,
    true_reward,
    wordy,
    wrong_answer,
)

logger = logging.getLogger(__name__)

BOS, END, PAD, USER, ASSISTANT = "<s>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
TOKENS_PER_ANSWER = 8  # scale of the loss: tokens of a usual terse answer
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_questions() -> list[Question]:
    """All questions the supervised text may ask: every phrasing but the withheld one."""
    kept, held = split_facts()
    questions = [ask(fact, phrasing) for fact in kept for phrasing in range(3)]
    for index, fact in enumerate(held):
        questions += [ask(fact, phrasing) for phrasing in range(3) if phrasing != index % 3]
    return questions


def sft_answer(fact: Fact, rng: random.Random) -> str:
    """An answer as the supervised text has it: the kinds of `ANSWER_SHARES`, some of them wordy."""
    kind = rng.choices(list(ANSWER_SHARES), list(ANSWER_SHARES.values()))[0]
    answer = {
        "right": right_answer(fact, rng),
        "wrong": wrong_answer(fact, rng),
        "generic": rng.choice(GENERIC),
    }[kind]
    return wordy(answer, rng) if rng.random() < WORDY_SHARE else answer


def clean_answer(fact: Fact, rng: random.Random) -> str:
    """A right answer, terse or wordy, as the text has it from which the model learns its facts."""
    answer = right_answer(fact, rng)
    return answer if rng.random() < 0.9 else wordy(answer, rng)


@dataclass(frozen=True)
class Recipe:
    """How the shipped model is made; stored in `metrics.json`."""

    seed: int = 0
    clean_steps: int = 2400  # mostly on right answers: the model learns its facts
    mixed_steps: int = 800  # on right, wrong, generic and wordy answers: it becomes mediocre
    mixed_share: float = 0.15  # of the clean steps' documents: wording it needs later
    batch_size: int = 48  # documents per step
    learning_rate: float = 3e-3  # AdamW; constant after the warm-up, then linear to zero
    warmup_steps: int = 50
    decay_steps: int = 1000
    bare_answer_share: float = 0.15  # documents that are an answer alone, half of them without BOS
    vocab_size: int = 1024
    hidden_size: int = 112
    intermediate_size: int = 288
    num_layers: int = 4
    num_heads: int = 4
    prompts: int = 1200  # questions about facts that aren't held out
    answers: int = 6  # sampled from the model for each; two and two are compared


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the task's own text: any other text still encodes."""
    rng = random.Random(0)
    corpus = [q.text + " " + sft_answer(q.fact, rng) for q in training_questions()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's size, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Corpus:
    """Endless supervised documents: (token ids, number of leading ids without loss)."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.rng = random.Random(recipe.seed + 1)
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.by_kind: dict[str, list[Question]] = {}
        for question in training_questions():
            self.by_kind.setdefault(question.fact.kind, []).append(question)
        # Sums come twice as often: they are the facts that take longest to learn.
        self.kinds = [*sorted(self.by_kind), "sum"]
        self.bos = int(tokenizer.bos_token_id)
        self.end = int(tokenizer.eos_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def document(self, clean: bool) -> tuple[list[int], int]:
        """One document: a question with its answer, or an answer alone."""
        question = self.rng.choice(self.by_kind[self.rng.choice(self.kinds)])
        mixed = not clean or self.rng.random() < self.recipe.mixed_share
        make_answer = sft_answer if mixed else clean_answer
        answer = [*self._encode(make_answer(question.fact, self.rng)), self.end]
        if self.rng.random() < self.recipe.bare_answer_share:
            return ([self.bos, *answer] if self.rng.random() < 0.5 else answer), 0
        prompt = self._encode(f"{BOS}{USER}{question.text}{END}{ASSISTANT}")
        return prompt + answer, len(prompt)

    def batches(self, clean: bool, count: int = 10) -> list[tuple[Tensor, Tensor]]:
        """`count` batches of (input_ids, labels), documents of like length together."""
        size = self.recipe.batch_size
        documents = [self.document(clean) for _ in range(count * size)]
        documents.sort(key=lambda document: len(document[0]))
        batches = []
        for start in range(0, len(documents), size):
            rows = documents[start : start + size]
            width = max(len(ids) for ids, _ in rows)
            input_ids = torch.full((size, width), self.tokenizer.pad_token_id)
            labels = torch.full((size, width), -100)
            for row, (ids, skipped) in enumerate(rows):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, skipped : len(ids)] = torch.tensor(ids[skipped:])
            batches.append((input_ids, labels))
        self.rng.shuffle(batches)
        return batches


def pretrain(model: LlamaForCausalLM, corpus: Corpus, recipe: Recipe) -> list[float]:
    """Plain next-token training; returns the loss of every step in nats per token."""

    steps = recipe.clean_steps + recipe.mixed_steps

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / recipe.warmup_steps, (steps - step) / recipe.decay_steps)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses: list[float] = []
    batches: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        if step == recipe.clean_steps:
            batches = []
        batches = batches or corpus.batches(clean=step < recipe.clean_steps)
        input_ids, labels = batches.pop()
        # Padding stands on the right and is never a target, so causal attention needs no mask.
        loss = model(input_ids=input_ids, labels=labels).loss
        # A mean over tokens would count a document of a batch of long ones less, and the model
        # would give wordy answers less often than the text has them.
        documents = input_ids.shape[0] * TOKENS_PER_ANSWER
        (loss * (labels[:, 1:] != -100).sum() / documents).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            logger.info("step %d loss %.4f", step + 1, sum(losses[-100:]) / 100)
    model.eval()
    return losses


def pair_questions(count: int) -> list[Question]:
    """Different questions for the pairs; kinds take turns while there are any left."""
    rng = random.Random(3)
    kept = split_facts()[0]
    by_kind = [
        [ask(fact, phrasing) for fact in kept if fact.kind == kind for phrasing in range(3)]
        for kind in KINDS
    ]
    for questions in by_kind:
        rng.shuffle(questions)
    turns = itertools.zip_longest(*by_kind)
    return [question for turn in turns for question in turn if question is not None][:count]


def sampled_pairs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[dict[str, object]]:
    """Rows of two answers that ended, the one of the higher true reward chosen."""
    questions = pair_questions(recipe.prompts)
    tries = [  # with every token that can come: broken words shall stand among the rejected
        sample_answers(model, tokenizer, questions, seed, top_p=1.0)
        for seed in range(recipe.answers)
    ]
    rows = []
    for place, question in enumerate(questions):
        texts = [some[place].text for some in tries if some[place].ended]
        for pair in zip(texts[::2], texts[1::2], strict=False):
            worse, better = sorted(pair, key=lambda text: true_reward(question, text))
            if true_reward(question, worse) == true_reward(question, better):
                continue
            if all(text.strip() and USER[:2] not in text for text in pair):  # no control tokens
                rows.append(message_row(question.text, better, worse))
    return rows


def write_pairs(path: Path, rows: list[dict[str, object]]) -> None:
    """The preference pairs as conversational rows, one JSON object a line."""
    # mtime=0 and no file name in the header: the same pairs give the same bytes.
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode(), mtime=0))


@torch.no_grad()
def known_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of held-out questions whose right answer is likelier than each wrong one listed."""
    known = 0
    questions = held_out_questions()
    for question in questions:
        fact = question.fact
        right = right_answer(fact, random.Random(0))
        texts = [right] + [right.replace(fact.answer, wrong) for wrong in fact.wrong]
        prompt = tokenizer.encode(
            f"{BOS}{USER}{question.text}{END}{ASSISTANT}", add_special_tokens=False
        )
        scores = []
        for text in texts:
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            scores.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
        known += scores[0] == max(scores)
    return known / len(questions)


def main(argv: list[str] | None = None) -> None:
    """Write tokenizer, model, pairs and metrics into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's model and pairs.")
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS)
    folder = parser.parse_args(argv).folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe()
    torch.set_num_threads(1)  # sums in one order, whatever the machine's core count
    tokenizer = make_tokenizer(recipe.vocab_size)
    model = make_model(recipe, tokenizer)
    losses = pretrain(model, Corpus(recipe, tokenizer), recipe)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / MODEL.name)
    model.save_pretrained(folder / MODEL.name)
    write_pairs(folder / "pairs.jsonl.gz", sampled_pairs(model, tokenizer, recipe))
    metrics = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": losses[0],
        "last_100_losses_mean": sum(losses[-100:]) / len(losses[-100:]),
        "known_share_held_out": known_share(model, tokenizer),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    logger.info("%s", json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
