"""Which of accelerate's files are taken, and what is said of the others."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from rmipo_lite.cli.launch import config_file, launch


@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2"])
def test_files_that_come_with_the_package_are_accelerates(name: str) -> None:
    path, said = config_file(name)
    assert load_config_from_file(str(path)).distributed_type.value == said["distributed_type"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # the authors' and trl's files, shortened to what decides
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "DEEPSPEED.*Use fsdp2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP version 1.*Use fsdp2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: false}", "FSDP version 1"),
        ("distributed_type: MEGATRON_LM", "MEGATRON_LM, which is not supported"),
        ("num_processes: 4", "it says no distributed_type"),
        ("distributed_type: [", "can't be read"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(text: str, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=wanted):
        config_file(str(file))


def test_no_such_file_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no file fsdp; wanted a path or one of fsdp2, multi_gpu"):
        config_file("fsdp")


def test_one_process_goes_on_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert launch(["train"], None, "fsdp2") is None
    assert capsys.readouterr().out == "One process: nothing is shared\n"
