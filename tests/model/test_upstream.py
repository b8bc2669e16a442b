"""What we lean on of other packages is still there, and its absence is told as a name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from rmipo_lite import RMiPOTrainer, info
from rmipo_lite.model import upstream
from rmipo_lite.model.upstream import BORROWED, Borrowed, missing
from tests.conftest import ROOT
from tests.kit import tiny_model


def test_every_borrowed_name_is_there() -> None:
    assert missing() == []


def test_every_user_is_a_file_of_ours_that_names_it() -> None:
    for borrowed in BORROWED:
        text = (ROOT / "rmipo_lite" / borrowed.user).read_text(encoding="utf-8")
        assert borrowed.name.rpartition(".")[2] in text, borrowed


def test_what_is_set_on_objects_is_there() -> None:
    model = tiny_model()
    model.enable_input_require_grads()
    assert hasattr(model, "_require_grads_hook")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules())
    plain = nn.Linear(2, 2)
    AcceleratorState._reset_state(True)  # another test's precision would be refused to change
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(plain)
    finally:
        AcceleratorState._reset_state(True)  # and this one would be every later test's
    assert hasattr(plain, "_original_forward")
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        assert hasattr(plain, kind)


def test_a_name_that_is_gone_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Borrowed("transformers", "Trainer._no_such_hook", "checkpoints/trainer_mixin.py")
    monkeypatch.setattr(upstream, "BORROWED", (*BORROWED, gone))
    told = "transformers.Trainer._no_such_hook is gone, which checkpoints/trainer_mixin.py leans on"
    with pytest.raises(RuntimeError, match=told):
        RMiPOTrainer(tiny_model())
    assert "BROKEN" not in str(info())  # which imports nothing where the versions are known
    monkeypatch.setitem(upstream.KNOWN, "transformers", ((5, 1), (5, 2)))
    assert f"BROKEN        {told}" in str(info())


@pytest.mark.slow
def test_importing_the_package_leaves_other_loggers_alone() -> None:
    code = (
        "import logging, rmipo_lite\n"
        "rmipo_lite.RMiPOTrainer, rmipo_lite.train, rmipo_lite.inspect\n"
        "loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]\n"
        "ours = [f for l in [logging.root, *loggers] for f in l.filters\n"
        "        if getattr(f, '__module__', '').startswith('rmipo_lite')]\n"
        "assert ours == [], ours\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_versions_that_are_known_are_those_that_have_all_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those installed here have them, so where they count as known nothing may be missing."""
    assert upstream.is_known()
    assert upstream.missing() == []
    versions = {
        name: ".".join(map(str, last)) + ".3rc1" for name, (_, last) in upstream.KNOWN.items()
    }
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    assert upstream.is_known()
    for other in ("5.99.0", "5.16.9", "unknown"):
        monkeypatch.setitem(versions, "transformers", other)
        assert not upstream.is_known()
