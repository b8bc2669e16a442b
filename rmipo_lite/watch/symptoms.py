"""Plain-word findings from a run's numbers: one function a symptom, each of the run's chart alone.

A symptom reads what was logged and says what it means and what to do, or None. Its threshold
stands beside it with where it comes from. "Stored runs" are 48 of an earlier demo's model: in the
ones whose answers went on ending, held-out chosen responses lost at most 0.16 nats per token; in
those half of whose answers no longer ended, 0.97 to 2.6.
"""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

from rmipo_lite.methods.table import SumLoss
from rmipo_lite.output.findings import Finding
from rmipo_lite.output.uncertainty import share_text, wilson
from rmipo_lite.watch.chart import LEAST_ANSWERS, SURE, Chart
from rmipo_lite.watch.completions import CLIPPED, MEAN_LENGTH, REPETITION, REPETITIVE

_LEAST_PAIRS = 20  # held out: fewer don't tell a share
_LEAST_STEPS = 20  # of training, before anything is said of its course
_LEAST_LOGS = 5

_COLLAPSE_NATS = 0.5  # between the stored runs' 0.16 and 0.97
_FALL_NATS = 0.25
_REJECTED_SHARE, _EVEN = 0.6, 0.5  # of the held-out pairs, before training; and of a coin
_EASY_SHARE = 0.95
_PINNED_SHARE = 0.8
_UNDEFINED_SHARE = 0.1
_CONSTANT = 1e-4  # of the loss: pairs drawn at random alone change it by more
# Reward units beyond gamma. Of the stored RMiPO and SimPO runs on terse pairs, those that gained by
# the true reward stand at 1.3 at most, those that lost at 4.3 and more.
_OVERSHOT = 2.0
_ACCURACY_FELL = 0.1
_LOSS_ROSE = 0.05  # held out, as a share of the loss before training
_STILL_NATS = 0.005  # a held-out log-prob that moved less has not been trained
_EMPTY_TOKENS, _EMPTY_SHARE = 4.0, 0.25  # an answer's mean length, and that of the start's
_BASE_UNENDED = 0.9
_REPETITION_ROSE, _REPETITIVE_ROSE, _UNENDED_ROSE, _LENGTH_ROSE = 0.2, 0.2, 0.3, 1.5


class Seen(NamedTuple):
    """What a symptom says: what was seen, what to do, how grave it is."""

    text: str
    advice: str
    level: Literal["warning", "note"] = "warning"


def chosen_longer(chart: Chart) -> Seen | None:
    """Length tells chosen from rejected."""
    report = chart.report
    if report is None or not report.has_length_bias:
        return None
    longer = share_text(report.share_chosen_longer, report.kept)
    seen = f"the chosen response is the longer one in {longer} of the pairs"
    balance = report.length_balance
    if balance is not None and balance.is_used and chart.args.length_balance == "auto":
        if not balance.is_strong:
            return None
        return Seen(
            f"{seen}, and weighing that down leaves {balance.effective:.0%} of the sample",
            "Length explains most of these labels. If longer answers are what is meant, train with "
            "length_balance='off', and watch the answers' length",
            level="note",
        )
    if isinstance(chart.args.loss, SumLoss):
        return Seen(
            seen,
            "Length can be learnt in place of quality, and answers grow: length_balance='auto' "
            "weighs the pairs where that can be done (not with kto_pair); of these methods r_dpo "
            "and ld_alpha are made for it. Watch the answers' length",
        )
    return Seen(
        seen,
        "This loss takes means over tokens, and on such pairs it can run away to answers that "
        "never end: length_balance='auto' weighs the pairs where that can be done, end_anchor "
        "holds the end; else drop pairs until the shares are alike",
    )


def ends_differ(chart: Chart) -> Seen | None:
    """The end that is scored isn't the one that the model stops at."""
    if chart.ends is None:
        return None
    scored, own = chart.ends
    return Seen(
        f"answers end with {scored} in training, and the model itself stops at {own}",
        "Generation here and every generation_config that is saved stop at both; a program that "
        f"reads neither has to be told to stop at {scored}",
        level="note",
    )


def _accuracy_before(chart: Chart) -> float | None:
    if chart.args.loss.needs_reference:
        return None  # measured from itself the model prefers neither side
    before = chart.before or {}
    accuracy = before.get("eval_rewards/accuracies")
    return None if accuracy is None or chart.pairs < _LEAST_PAIRS else float(accuracy)


def swapped_labels(chart: Chart) -> Seen | None:
    """The untrained model prefers the rejected side."""
    accuracy = _accuracy_before(chart)
    if accuracy is None or accuracy >= 1 - _REJECTED_SHARE:
        return None
    if wilson(accuracy, chart.pairs)[1] >= _EVEN:
        return None
    return Seen(
        "before any training the model finds the rejected side likelier in "
        f"{share_text(1 - accuracy, chart.pairs)} of {chart.pairs} held-out pairs",
        "Look at a few (rmipo_lite.inspect shows the worst): if chosen and rejected are swapped, "
        "rename the columns",
    )


def easy_pairs(chart: Chart) -> Seen | None:
    """There is little left to learn."""
    accuracy = _accuracy_before(chart)
    if accuracy is None or accuracy < _EASY_SHARE:
        return None
    return Seen(
        f"the model already prefers the chosen side in {share_text(accuracy, chart.pairs)} of "
        f"{chart.pairs} held-out pairs",
        "The pairs are too easy, or the model has seen them; held-out accuracy can't show progress "
        "here, so judge by answers, and look for harder pairs",
        level="note",
    )


def _fall_of_chosen(chart: Chart) -> tuple[float, str] | None:
    """How far the chosen responses fell, nats per token, and of which pairs."""
    if chart.change("logps/chosen") is not None:
        held_out = chart.sure_change("logps/chosen")
        return None if held_out is None else (held_out[0] - held_out[1], "held-out")
    seen = chart.series("logps/chosen")
    if len(seen) < _LEAST_LOGS or chart.step < _LEAST_STEPS:
        return None
    fall = statistics.mean(seen[:2]) - statistics.mean(seen[-2:])
    # Other pairs at the end than at the beginning: how much lines differ by that, neighbours tell,
    # few of them, and line after line is looked at: twice as sure as where the pairs are the same.
    error = math.sqrt(statistics.mean((b - a) ** 2 for a, b in pairwise(seen)) / 2)
    return (fall, "training") if fall > 2 * SURE * error else None


def chosen_collapsing(chart: Chart) -> Seen | None:
    """The margin is won by making both sides unlikely."""
    fall = _fall_of_chosen(chart)
    if fall is None or not fall[0] > _COLLAPSE_NATS:
        return None
    return Seen(
        f"the {fall[1]} chosen responses became less likely, by {fall[0]:.1f} nats per token",
        "Accuracy and margin don't see that. Read result.compare([...]) before using the model; a "
        "lower learning_rate, fewer steps or a larger sft_weight are the usual cures",
    )


def both_rewards_falling(chart: Chart) -> Seen | None:
    """Both sides lose, the chosen one less."""
    chosen, rejected = chart.sure_change("logps/chosen"), chart.sure_change("logps/rejected")
    if chosen is None or rejected is None:
        return None
    falls = chosen[0] - chosen[1], rejected[0] - rejected[1]
    if not _FALL_NATS < falls[0] <= _COLLAPSE_NATS or falls[1] <= falls[0]:
        return None
    return Seen(
        f"rewards of both sides fall: chosen by {falls[0]:.2f}, rejected by {falls[1]:.2f} nats "
        "per token",
        "That is normal for a loss that sees the gap alone, as long as the chosen side loses less "
        f"than about {_COLLAPSE_NATS} and the answers read well; a larger sft_weight holds it up",
        level="note",
    )


def _counted(chart: Chart) -> bool:
    """Whether the newest log line is a mean over enough pairs to speak of shares."""
    return len(chart.logs) * chart.args.pairs_per_step >= _LEAST_PAIRS


def gamma_pinned(chart: Chart) -> Seen | None:
    """The margin is a constant for most pairs."""
    args = chart.args
    if not args.uses_prior or args.gamma_min == args.gamma_max or not _counted(chart):
        return None
    for end, metric, meaning in (
        ("gamma_max", "rmipo/gamma_at_max",
         "their prompt speaks no more for the chosen response than for the rejected one"),
        ("gamma_min", "rmipo/gamma_at_min",
         "their prompt speaks far more for the chosen response already"),
    ):  # fmt: skip
        share = chart.newest(metric)
        if share is not None and share > _PINNED_SHARE:
            return Seen(
                f"gamma stands at {end} ({getattr(args, end):g}) for {share:.0%} of the pairs: "
                f"{meaning}",
                "RMiPO is then SimPO with a constant margin: look at the pairs with "
                "rmipo_lite.inspect (prompts cut or missing? labels swapped?), or say it outright "
                "with loss_type='simpo'",
                level="note",
            )
    return None


def pmi_undefined(chart: Chart) -> Seen | None:
    """Responses without a prior."""
    share = chart.newest("rmipo/pmi_undefined")
    if share is None or share <= _UNDEFINED_SHARE or not _counted(chart):
        return None
    return Seen(
        f"{share:.0%} of the pairs have a response of one token, which has no prior and no PMI; "
        "they take gamma_max",
        "prior_context='bos' scores every token, where the tokenizer has a BOS",
        level="note",
    )


def loss_constant(chart: Chart) -> Seen | None:
    """Nothing is learnt: the loss doesn't even vary with the pairs."""
    losses = chart.series("loss")
    if len(losses) < _LEAST_LOGS or chart.step < _LEAST_STEPS:
        return None
    spread = max(losses) - min(losses)
    if spread > _CONSTANT * max(map(abs, losses)):
        return None
    norm = chart.newest("grad_norm")
    gradient = "" if norm is None else f", the gradient's norm is {norm:.2g}"
    return Seen(
        f"the loss is {losses[-1]:.4g} in all of {len(losses)} log lines{gradient}",
        "Nothing is being learnt: is the learning rate 0, is every weight frozen, or are all pairs "
        "won already (a hinge loss is then 0)?",
    )


def learning_rate_high(chart: Chart) -> Seen | None:
    """Training makes the held-out pairs worse."""
    loss, accuracy = chart.change("loss"), chart.change("rewards/accuracies")
    if loss is None or accuracy is None or chart.pairs < _LEAST_PAIRS:
        return None
    rose = chart.sure_change("loss") and loss[1] - loss[0] > _LOSS_ROSE * abs(loss[0])
    fell = chart.sure_change("rewards/accuracies") and accuracy[0] - accuracy[1] > _ACCURACY_FELL
    if not rose and not fell:
        return None
    return Seen(
        f"training makes the held-out pairs worse: loss {loss[0]:.3f} -> {loss[1]:.3f} (+- "
        f"{chart.error('loss'):.3f}), accuracy {accuracy[0]:.0%} -> {accuracy[1]:.0%} (+- "
        f"{chart.error('rewards/accuracies'):.0%})",
        f"The learning rate ({chart.learning_rate:.2g}) is too high for these pairs, or there "
        "are too many passes over them: try a third of it, or one epoch",
    )


def overshooting(chart: Chart) -> Seen | None:
    """The margin is far past what the loss asks for, at the rejected side's cost."""
    args = chart.args
    margin, rejected = chart.sure_change("rewards/margins"), chart.change("logps/rejected")
    loss = args.loss
    if margin is None or rejected is None or isinstance(loss, SumLoss):
        return None
    if not loss.beta_in_rewards or loss.margin == "none":
        return None
    wanted = args.simpo_gamma or 0.0
    if loss.needs_prior:
        wanted = chart.held_out[-1]["eval_rmipo/gamma"]
    if args.gamma_scaled_by_beta:
        wanted *= args.beta
    if margin[1] - max(wanted, margin[0]) <= _OVERSHOT:
        return None
    return Seen(
        f"the held-out margin went from {margin[0]:.1f} to {margin[1]:.1f}, far past gamma "
        f"({wanted:.1f}), and the rejected side lost {rejected[0] - rejected[1]:.1f} nats per "
        "token",
        f"The updates are too large: at a learning rate of {chart.learning_rate:.2g} these pairs "
        "are long won, and what follows spoils the answers. Try a third of it, or stop earlier; "
        "loss_type='simper' loses least at a rate that is too high (docs/claims.md)",
    )


def learning_rate_low(chart: Chart) -> Seen | None:
    """The updates are too small to change anything."""
    chosen, rejected = chart.change("logps/chosen"), chart.change("logps/rejected")
    if chosen is None or rejected is None or chart.step < _LEAST_STEPS:
        return None
    if chart.step < chart.max_steps / 2:  # the warm-up is still near
        return None
    moved = max(abs(after - before) for before, after in (chosen, rejected))
    error = max(chart.error("logps/chosen"), chart.error("logps/rejected"))
    if moved >= _STILL_NATS or not SURE * error < _STILL_NATS:
        return None
    return Seen(
        f"{chart.step} steps moved the held-out log-probs by {moved:.1g} nats per token",
        f"The learning rate ({chart.learning_rate:.2g}) is too low for so few updates: try "
        "three times as much, or train longer",
    )


def repetition(chart: Chart) -> Seen | None:
    """Answers repeat themselves more than the start model's: all a little, or a few altogether."""
    change, some = chart.change_of_answers(REPETITION), chart.change(REPETITIVE)
    cure = (
        "Read result.compare([...]); a lower learning_rate, fewer steps or a larger sft_weight are "
        "the usual cures"
    )
    if change is not None and change[1] - change[0] > _REPETITION_ROSE:
        return Seen(
            f"the model's answers repeat themselves: {change[1]:.0%} of their phrases of four "
            f"tokens stood there before, at the start {change[0]:.0%} (+- "
            f"{chart.error(REPETITION):.0%})",
            cure,
        )
    if some is None or chart.answers < LEAST_ANSWERS or some[1] - some[0] <= _REPETITIVE_ROSE:
        return None
    before, after = (round(share * chart.answers) for share in some)
    return Seen(
        f"{after} of {chart.answers} answers say the same again and again, at the start {before}",
        cure,
        level="note",
    )


def length_runaway(chart: Chart) -> Seen | None:
    """Answers no longer end, or grow."""
    clipped, length = chart.change(CLIPPED), chart.change(MEAN_LENGTH)
    if clipped is None or length is None:
        return None
    grew = length[1] > _LENGTH_ROSE * max(length[0], 1.0) and clipped[1] > clipped[0]
    grew = grew and chart.change_of_answers(MEAN_LENGTH) is not None
    unended = clipped[1] - clipped[0] > _UNENDED_ROSE and chart.change_of_answers(CLIPPED)
    if not unended and not grew:
        return None
    return Seen(
        f"the model's answers run away: {length[1]:.0f} tokens (+- {chart.error(MEAN_LENGTH):.0f}) "
        f"in the mean of {chart.answers} and {clipped[1]:.0%} without an end, at the start "
        f"{length[0]:.0f} and {clipped[0]:.0%}",
        "Accuracy and margin don't see that. It comes from pairs whose chosen side is usually "
        "longer (length_balance='auto' weighs them), and from a high learning rate: lower it, stop "
        "earlier, or hold the end with a larger end_anchor",
    )


def answers_vanish(chart: Chart) -> Seen | None:
    """Answers end before they have said anything."""
    length = chart.change_of_answers(MEAN_LENGTH)
    if length is None or length[1] > min(_EMPTY_TOKENS, _EMPTY_SHARE * length[0]):
        return None
    return Seen(
        f"the model's answers shrink to nothing: {length[1]:.1f} tokens in the mean, at the start "
        f"{length[0]:.0f}",
        "Accuracy and margin don't see that. The end of an answer has become likely everywhere: "
        "keep end_anchor on, lower the learning_rate, or stop earlier",
    )


def never_ends(chart: Chart) -> Seen | None:
    """A model that doesn't end its answers before training: a base model."""
    share = (chart.before or {}).get(f"eval_{CLIPPED}")
    if share is None or share < _BASE_UNENDED or chart.answers < LEAST_ANSWERS:
        return None
    taught = "end_anchor teaches it here" if chart.args.end_anchor else "end_anchor=0.1 would"
    if not chart.is_anchored:
        taught = "end_anchor can't, since no special token ends the chosen side here"
    return Seen(
        f"before any training {share_text(share, chart.answers)} of the model's answers don't end",
        f"It looks like a base model, which nobody has taught when to stop: {taught}. The usual "
        "way is a supervised start on good answers first",
        level="note",
    )


SYMPTOMS: tuple[Callable[[Chart], Seen | None], ...] = (
    chosen_longer, ends_differ, swapped_labels, easy_pairs, chosen_collapsing, both_rewards_falling,
    gamma_pinned, pmi_undefined, loss_constant, learning_rate_high, overshooting,
    learning_rate_low, repetition, length_runaway, answers_vanish, never_ends,
)  # fmt: skip


def examine(chart: Chart) -> list[Finding]:
    """Every finding that the chart gives now, each called by its symptom's name."""
    seen = [(symptom.__name__, symptom(chart)) for symptom in SYMPTOMS]
    return [Finding(name, *found) for name, found in seen if found is not None]
