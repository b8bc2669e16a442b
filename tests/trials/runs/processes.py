"""Check 47: a run that two processes share is that of one, whatever its options, faults in it."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rmipo_lite.methods.table import methods
from tests.parallel.launched import difference, launched, outcome_of
from tests.parallel.worker import drawn, keep, soaked
from tests.trials.scorecard import Check, Trials, expect

_LOOSE = 1e-4  # Adam makes more of rounding where a gradient is near 0
# By which a beta is moved a thousandfold: rounding too.
_UNSTABLE = {"beta_dpo"}


def _options(seed: int, index: int) -> dict[str, Any]:
    draw = random.Random(f"processes/{seed}/{index}")
    loss_type = draw.choice([name for name in methods() if name not in _UNSTABLE])
    found = {
        "fault": draw.choice(("none", "none", "memory", "number", "disk")),
        "count": draw.choice((3, 8, 17, 40)),
        "loss_type": loss_type,
        "max_steps": draw.choice((3, 5, 7)),
        "eval_steps": draw.choice((2, 3)),
        "save_steps": draw.choice((2, 4)),
        "per_device_train_batch_size": draw.choice((2, 3, 5, 9)),
        "gradient_accumulation_steps": draw.choice((1, 2)),
        "max_tokens_per_microstep": draw.choice((30, 60, 200)),
        "packing": draw.random() < 0.8,
        "learning_rate": draw.choice((1e-4, 1e-3)),
        "weight_decay": draw.choice((0.0, 0.1)),
        "sft_weight": 0.0 if loss_type == "kto" else draw.choice((0.0, 1.0)),
        "seed": draw.randrange(1000),
        "peft_config": draw.choice(("auto", "auto", None)),
        "prior": draw.choice(("live", "cached")),
    }
    if methods()[loss_type].needs_reference:
        found |= draw.choice(({}, {"reference": "live"}, {"ref_sync_steps": 2}))
    return found


def shared(trials: Trials) -> None:
    """Every trial is one run; all of them share two processes, begun once."""
    options = [_options(trials.seed, index) for index in trials.indices]
    folder = Path(tempfile.mkdtemp(dir=trials.folder))
    (folder / "options.json").write_text(json.dumps(options), encoding="utf-8")
    try:
        launched(2, folder / "2", [str(folder / "options.json")])
        for number, trial in enumerate(trials):
            with trial:
                own = options[number]
                trial.tried = str(own)
                keep(trial.folder / "one", functools.partial(drawn, options=own))
                of_both = [outcome_of(folder / "2" / str(number), rank) for rank in (0, 1)]
                one = outcome_of(trial.folder / "one")
                problem = difference(one, of_both, _LOOSE, padded=not own["packing"])
                expect(problem is None, str(problem))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(trials: Trials) -> None:
    """Hundreds of steps with shortages, full disks and bad pairs: the run of one without them."""
    for trial in trials:
        with trial:
            options = {"steps": 300 if trials.thorough else 60, "seed": trial.rng.randrange(2**30)}
            (trial.folder / "options.json").write_text(json.dumps([options]), encoding="utf-8")
            launched(2, trial.folder / "2", [str(trial.folder / "options.json")])
            keep(trial.folder / "one", functools.partial(soaked, options=options))
            both = [outcome_of(trial.folder / "2" / "0", rank) for rank in (0, 1)]
            one = outcome_of(trial.folder / "one")
            shortages, failed = sum(found["shortages"] for found in both), len(both[0]["failed"])
            trial.tried = f"{options['steps']} steps, {shortages} shortages, {failed} full disks"
            one["failed"] = both[0]["failed"]  # one process met none
            problem = difference(one, both, _LOOSE)
            expect(problem is None, str(problem))
            expect(shortages > 0, "memory ran out nowhere: nothing was tried")


CHECKS = [
    Check(49, "a long shared run through shortages of memory and disk", 1, soak),
    Check(47, "a run shared by two processes is that of one", 60, shared, least=6),
]
