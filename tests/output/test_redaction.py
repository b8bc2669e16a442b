"""What is uploaded names no path of this machine."""

import json
from pathlib import Path

from rmipo_lite.output.redaction import without_paths


def test_paths_are_taken_out(tmp_path: Path) -> None:
    home = str(tmp_path / "home" / "my-model")
    said = {"base_model_name_or_path": home, "r": 8, "target_modules": ["q_proj", home]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert without_paths(tmp_path) == ["adapter_config.json"]
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {
        "base_model_name_or_path": "my-model", "r": 8, "target_modules": ["q_proj", "my-model"],
    }  # fmt: skip
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
