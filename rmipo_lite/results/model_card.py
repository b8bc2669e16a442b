"""The README.md that is saved with an adapter: what was done, with which data, and what it shows.

It claims what was measured and no more: that the margin sets itself per pair from fixed constants,
not that nothing needs tuning and not that the result beats other methods.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from rmipo_lite.methods.table import RANGES
from rmipo_lite.model.names import short_name
from rmipo_lite.output import held_out
from rmipo_lite.output.console import printable
from rmipo_lite.output.redaction import redact, redact_text
from rmipo_lite.results.record import RunRecord
from rmipo_lite.results.serving import serving_note
from rmipo_lite.system.files import looks_like_path

_CLAIMS = """\
The figures above belong to this run: one seed, one dataset, one held-out set. Nothing here shows
that the method needs no tuning or is better than a tuned one. The learning rate is the setting
that matters most. A preference loss can teach length as well as quality: look at the length of
the answers, and at the share that never ends, before using this model."""
SHOWN_OPTIONS = (
    "loss_type", "beta", "gamma_min", "gamma_max", "gamma_scaled_by_beta", "simpo_gamma",
    "label_smoothing", "alpha", "dpop_lambda", "slic_delta", "ld_alpha", "reference",
    "sft_weight", "length_balance", "end_anchor",
    "prior", "prior_context", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "tokenization",
    "packing", "bf16", "fp16", "seed",
)  # fmt: skip


_FIRST = ("rewards/accuracies", "rewards/margins", "loss")


def run_options(result: RunRecord) -> dict[str, Any]:
    """The options that describe a run, secrets redacted, in a fixed order."""
    values = redact(result.args.to_dict())
    if values["learning_rate"] == "auto" and result.learning_rate is not None:
        values["learning_rate"] = f"auto: {result.learning_rate:.3g} was found"
    absent = {name for name in (*RANGES, "ld_alpha") if values.get(name) is None}
    if not result.args.uses_prior:
        absent |= {"gamma_min", "gamma_max", "gamma_scaled_by_beta", "prior", "prior_context"}
    if not result.args.loss.needs_reference:
        absent.add("reference")
    return {name: values[name] for name in SHOWN_OPTIONS if name in values and name not in absent}


CARD_FILE = "README.md"
METRIC_HEAD = ("metric", "before", "after", "change")


def metric_rows(result: RunRecord) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, change +- its standard error) as texts, the telling ones first."""
    rows = []
    first = [key for name in _FIRST for key, _ in held_out.names_of(name, result.metrics)]
    for name in dict.fromkeys([*first, *sorted(result.metrics)]):
        value = result.metrics[name]
        if not name.startswith("eval_") or not isinstance(value, (int, float)):
            continue
        if name.endswith(("runtime", "per_second")) or name == "epoch":
            continue
        before = result.metrics_before.get(name)
        shown = "" if before is None else f"{before:.4f}"
        rows.append((printable(name), shown, f"{value:.4f}", _change(result, name)))
    return rows


def _change(result: RunRecord, name: str) -> str:
    """Of a metric, with its standard error where that is known; of one number, that alone."""
    before, error = result.metrics_before.get(name), result.errors.get(name, math.nan)
    change = "" if before is None else f"{result.metrics[name] - before:+.4f}"
    return f"{change} +- {error:.4f}".strip() if math.isfinite(error) else change


def _code(text: str) -> str:
    """A fenced block that the text can't end: its fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _name(text: str) -> str:
    """A name as inline code, which ends at no character of the name and holds no markup."""
    return "`" + " ".join(printable(text).replace("`", "'").split()) + "`"


def _cell(text: str) -> str:
    """A text in a table: no column ends in it, and no tag begins."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _is_lora(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, LoraConfig)


def _front(result: RunRecord, is_merged: bool) -> tuple[list[str], str]:
    """What hubs read at the top, and the title: of an adapter, or of a whole model."""
    base = redact_text(short_name(result.base_model_name) if result.base_model_name else "")
    named = _name(base) if base else "a local model"
    is_adapter = isinstance(result.model, PeftModel) and not is_merged
    front = [f"library_name: {'peft' if is_adapter else 'transformers'}", "tags:"]
    lora = ["- lora"] if is_adapter and _is_lora(result.model) else []
    front += ["- preference-optimization", *lora, "- rmipo_lite"]
    is_path = looks_like_path(result.base_model_name) or Path(result.base_model_name).exists()
    if base and (not is_path or "/" in base):  # hubs refuse a path
        front.insert(0, f"base_model: {json.dumps(base)}")  # which YAML reads, whatever is in it
    if is_adapter:
        return front, f"# Adapter for {named}"
    how = "with its adapter merged in" if is_merged else "trained in full"
    return front, f"# {named[:1].upper() + named[1:]}, {how}"


def card_of_merged(card: str, how: str) -> str:
    """An adapter's card as that of the model it was merged into; any other text comes after it."""
    title = re.search(r"^# Adapter for (.+)$", card, re.MULTILINE)
    merged = f"## Merged\n\n{how}\n"
    if title is None:
        return f"# A model with its adapter merged in\n\n{merged}\n{card}"
    front = card[: title.start()].replace("library_name: peft", "library_name: transformers")
    name = title[1][:1].upper() + title[1][1:]
    text = card[title.end() :].replace("\n## ", f"\n{merged}\n## ", 1)
    return f"{front.replace('- lora' + chr(10), '')}# {name}, with its adapter merged in{text}"


def model_card(result: RunRecord, merged: str | None = None) -> str:
    """The card as Markdown with the front matter that hubs read.

    `merged` makes it that of the merged model: how far this is from the trained one.
    """
    front, title = _front(result, merged is not None)
    method = result.args.loss.words
    steps = result.history[-1].get("step", 0) if result.history else 0
    stopped = "" if result.stopped_at_step is None else " (stopped early, on request)"
    served = None if merged is not None else serving_note(result.model)
    rows = metric_rows(result)
    table = "\n".join(f"| {' | '.join([_cell(row[0]), *row[1:]])} |" for row in rows)
    options = "\n".join(f"{k}: {v!r}" for k, v in run_options(result).items())
    of_step = "" if result.weights_step is None else f", weights of step {result.weights_step}"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            title,
            "",
            f"Trained with rmipo_lite by {method}, for {steps} optimizer steps{stopped}{of_step}.",
            "",
            *([] if merged is None else ["## Merged", "", merged, ""]),
            *([] if served is None else ["## Serving", "", served, ""]),
            "## Held-out metrics",
            "",
            f"| {' | '.join(METRIC_HEAD)} |\n|---|---|---|---|\n{table}"
            if rows
            else "None was measured.",
            "",
            "## Findings",
            "",
            _code(redact_text(str(result.findings))),
            "",
            "## What may be concluded",
            "",
            _CLAIMS,
            "",
            "## Data",
            "",
            _code(redact_text(str(result.data_report))),
            "",
            "## Options",
            "",
            _code(redact_text(options)),
            "",
        ]
    )
