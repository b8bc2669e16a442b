"""Uploads through the hub's own client and HTTP, to a stand-in on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmipo_lite import demo
from rmipo_lite.results.result import TrainResult
from tests.results.hub import TOKEN, Hub, running_hub

# The hub's own client, to httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


def test_adapter_card_and_report_arrive_whole_and_name_no_path(
    run: TrainResult, hub: Hub, tmp_path: Path
) -> None:
    url = run.push_to_hub("me/aligned", token=TOKEN)
    assert url == f"{hub.address}/me/aligned"
    assert hub.private == {"me/aligned": True}
    files = hub.files["me/aligned"]
    assert {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "run.html",
        "run_log.json", "tokenizer.json", "training_config.json", "generation_config.json",
    } <= files.keys()  # fmt: skip
    saved = run.save(tmp_path / "saved")
    same = ("adapter_model.safetensors", "tokenizer.json", "README.md")
    assert all(files[name] == (saved / name).read_bytes() for name in same)
    assert b"Held-out metrics" in files["run.html"]
    assert set(hub.cards) == {files["README.md"].decode()}  # its client had the card checked
    places = (str(run.output_dir.parent), str(demo.MODEL.parent), str(Path.home()), TOKEN)
    told = {
        (name, place) for name, body in files.items() for place in places if place.encode() in body
    }
    assert told == set()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == demo.MODEL.name


def test_a_public_one_is_asked_for(run: TrainResult, hub: Hub) -> None:
    run.push_to_hub("me/public", private=False, token=TOKEN)
    assert hub.private == {"me/public": False}


@pytest.mark.parametrize("place", ["/api/repos/create", "/objects/batch", "/commit/"])
def test_a_refusal_is_told_and_changes_nothing(run: TrainResult, hub: Hub, place: str) -> None:
    hub.fails_at = place
    before = {path.name for path in run.output_dir.iterdir()}
    with pytest.raises(Exception, match="403"):
        run.push_to_hub("me/refused", token=TOKEN)
    assert hub.files.get("me/refused", {}) == {}
    assert {path.name for path in run.output_dir.iterdir()} == before


def test_a_wrong_token_is_told(run: TrainResult, hub: Hub) -> None:
    with pytest.raises(Exception, match="401"):
        run.push_to_hub("me/aligned", token="hf_wrong")
    assert hub.private == {}
