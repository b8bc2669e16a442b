"""The meaning of the config's own options: what each must be, beyond its type."""

import re
from typing import Any

from rmipo_lite.methods import table

_Check = tuple[bool, str, str, Any]  # (holds, name, wanted, what came)


def take_defaults(args: Any) -> str | None:
    """Set what nobody has set of the method's options; what is wrong where that can't be done."""
    if not isinstance(args.loss_type, str):
        return None  # its type is told next
    try:
        args.loss_type = table.full_name(args.loss_type)
    except ValueError as error:
        return str(error)
    defaults = table.defaults_of(args.loss_type)
    if args.beta is None:
        args.beta = defaults["beta"]
    if args.gamma_beta_ratio is not None and isinstance(args.gamma_beta_ratio, int | float):
        if not 0 <= args.gamma_beta_ratio < float("inf"):
            return f"gamma_beta_ratio must be a number >= 0, got {args.gamma_beta_ratio!r}"
        gamma = args.beta * args.gamma_beta_ratio
        if args.simpo_gamma not in (None, gamma):
            return "simpo_gamma and gamma_beta_ratio say the same thing: give one of them"
        args.simpo_gamma = gamma
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return None


def problem(args: Any) -> str | None:
    """What is wrong with the first own option that can't stand, as "NAME must be ..., got ..."."""
    checks = [*_of_method(args), *_of_data(args), *_of_step(args), *_of_adapter(args)]
    for holds, name, wanted, came in checks:
        if not holds:
            return f"{name} must be {wanted}, got {came!r}"
    return None


def _of_method(args: Any) -> list[_Check]:
    own = table.defaults_of(args.loss_type)
    checks: list[_Check] = [
        (0 <= getattr(args, name) < float("inf"), name, ">= 0", getattr(args, name))
        for name in ("sft_weight", "end_anchor")
    ]
    for name, (holds, wanted) in table.RANGES.items():
        value = getattr(args, name)
        if name in own:
            checks.append((holds(value), name, wanted, value))
        else:
            without = f"None, since loss_type={args.loss_type!r} has none"
            checks.append((value is None, name, without, value))
    if args.loss.unpaired:
        bare = f"0 with loss_type={args.loss_type!r}, whose rows are no pairs"
        for name in ("sft_weight", "end_anchor"):
            checks.append((not getattr(args, name), name, bare, getattr(args, name)))
        checks.append((args.ld_alpha is None, "ld_alpha", "None" + bare[1:], args.ld_alpha))
    apart = not args.loss.of_the_step or args.length_balance == "off"
    alike = f"off with loss_type={args.loss_type!r}, whose pairs hang on each other"
    checks.append((apart, "length_balance", alike, args.length_balance))
    of_sums = isinstance(args.loss, table.SumLoss)
    least = args.loss.remembers.least_pairs if args.loss.remembers else 1
    size = args.pairs_per_step
    enough = f"at least {least} with loss_type={args.loss_type!r}, which takes a step's spread"
    checks.append((size >= least, "the number of pairs per step", enough, size))
    is_prior = re.fullmatch(r"live|cached|refresh:[1-9]\d*", args.prior) is not None
    wanted = "live, cached or refresh: and a number of steps, as refresh:200"
    checks.append((is_prior, "prior", wanted, args.prior))
    checks += _of_moving_reference(args)
    share = args.ld_alpha
    checks.append((share is None or 0 <= share <= 1, "ld_alpha", "None or 0 to 1", share))
    only = f"None, since loss_type={args.loss_type!r} takes means"
    checks.append((share is None or of_sums, "ld_alpha", only, share))
    return checks


def _of_moving_reference(args: Any) -> list[_Check]:
    steps, share = args.ref_sync_steps, args.ref_sync_alpha
    none = f"None, since loss_type={args.loss_type!r} measures from no reference model"
    return [
        (steps is None or steps >= 1, "ref_sync_steps", "None or a whole number >= 1", steps),
        (steps is None or args.loss.needs_reference, "ref_sync_steps", none, steps),
        (0 < share <= 1, "ref_sync_alpha", "in (0, 1]", share),
    ]


def _of_data(args: Any) -> list[_Check]:
    checks = []
    for name in ("max_length", "max_prompt_length", "dataset_num_proc"):
        value = getattr(args, name)
        checks.append((value is None or value >= 1, name, "None or a whole number >= 1", value))
    if args.tokenization == "authors":
        limits = (args.max_length, args.max_prompt_length)
        wanted = (
            "a number when tokenization='authors' (theirs: max_length 1024 or 2048, "
            "max_prompt_length 512 or 1800)"
        )
        checks.append((None not in limits, "max_prompt_length", wanted, args.max_prompt_length))
        wanted = "False when tokenization='authors', whose two sides can have different prompts"
        checks.append((not args.packing, "packing", wanted, args.packing))
    return checks


def _of_step(args: Any) -> list[_Check]:
    budget, dropped = args.max_tokens_per_microstep, args.max_dropped_in_a_row
    fits = budget == "auto" or budget >= 1
    return [
        *(
            (getattr(args, name) >= 0, name, "a whole number >= 0", getattr(args, name))
            for name in ("sample_prompts", "eval_completions")
        ),
        (fits, "max_tokens_per_microstep", "'auto' or a whole number >= 1", budget),
        (dropped >= 1, "max_dropped_in_a_row", ">= 1", dropped),
    ]


def _of_adapter(args: Any) -> list[_Check]:
    rank, alpha, dropout, targets = (
        args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules,
    )  # fmt: skip
    fits = dropout is None or 0 <= dropout < 1
    heard = not (dropout and args.disable_dropout)
    switched = "0 while disable_dropout=True, which switches every dropout off"
    return [
        (rank is None or rank >= 1, "lora_r", "None or a whole number >= 1", rank),
        (alpha is None or 0 < alpha < float("inf"), "lora_alpha", "None or > 0", alpha),
        (fits, "lora_dropout", "None or in [0, 1)", dropout),
        (heard, "lora_dropout", switched, dropout),
        (targets is None or bool(targets), "target_modules", "names of layers", targets),
    ]
