"""bitsandbytes as it is imported: no compiler loaded, no advice, nothing left behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

_CODE = """
import logging, sys
{first}
import rmipo_lite
import torch
whole = torch.compile
class Advice(logging.Handler):
    lines = []
    def emit(self, record): self.lines.append(record.getMessage())
logging.getLogger("bitsandbytes").addHandler(Advice())
import peft
import bitsandbytes
assert "bitsandbytes" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
assert torch.compile is whole
assert [f for f in sys.meta_path if type(f).__module__.startswith("rmipo_lite")] == []
assert not any("gemm_4bit_forward" in line for line in Advice.lines), Advice.lines
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
weight = torch.randn(64, 64)
packed, state = quantize_4bit(weight, quant_type="nf4")
assert (dequantize_4bit(packed, state) - weight).abs().max() < 1
"""


def _told(first: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(first=first)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import bitsandbytes"])
def test_it_loads_no_compiler_unless_it_is_there_already(first: str) -> None:
    assert _told(first) == str(bool(first))


def test_a_function_is_compiled_when_it_is_first_called() -> None:
    from rmipo_lite.system.imports import _at_first_call

    seen: list[dict[str, object]] = []

    def compile_now(function, **options):
        seen.append(options)
        return lambda value: function(value) + 1

    later = _at_first_call(compile_now)

    @later(dynamic=False)
    def double(value: int) -> int:
        return 2 * value

    assert seen == []
    assert [double(2), double(3)] == [5, 7]
    assert seen == [{"dynamic": False}]
    assert later(double)(2) == 6
