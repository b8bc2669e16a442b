"""`compare()` from start to end on a tiny model: the same for all, resumable, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.cli.main import main
from rmipo_lite.comparing import runs as runs_file
from rmipo_lite.comparing.comparison import NO_DIFFERENCE, Comparison
from rmipo_lite.comparing.outcome import read_outcome
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import equal_weights, tiny_model, tiny_peft, word_rows, word_tokenizer

ROWS = word_rows(120)


def _compare(folder: Path, model: Any = None, **given: Any) -> Comparison:
    options: dict[str, Any] = {
        "methods": ["rmipo", "dpo"], "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "prompts": 9, "max_new_tokens": 8, "use_cpu": True,
        "tokenizer": word_tokenizer(), "save_strategy": "no", **given,
    }  # fmt: skip
    model = tiny_model("llama") if model is None else model
    return rmipo_lite.compare(model, options.pop("rows", ROWS), output_dir=folder, **options)


def _longer(prompt: Any, answer: Any) -> float:
    return float(len(answer))


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    was = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = _compare(tmp_path, model, judge=_longer, seeds=[0, 1])
    out = capsys.readouterr().out
    assert out.index("Plan: 4 runs") < out.index("1 of 4: rmipo, seed 0")
    assert [(one.method, one.seed) for one in found.results] == [
        ("rmipo", 0), ("dpo", 0), ("rmipo", 1), ("dpo", 1),
    ]  # fmt: skip
    assert equal_weights(was, model.state_dict())  # and no adapter is left on it
    pairs = [set(one.cases["accuracy"]) for one in found.results]
    assert all(one == pairs[0] for one in pairs)
    assert len(pairs[0]) == 12
    for one in found.results:
        assert len(one.answers) == len(one.cases["win_rate"]) == len(found.prompts) == 9
    # A reference that is the model as it came: the first run's adapter was off it.
    assert found.mean("dpo", "margin").mean == pytest.approx(
        sum(one.mean("margin") for one in found.of("dpo")) / 2
    )
    text = str(found)
    assert "Comparison of 2 methods: 4 of 4 runs, 2 seeds, 9 prompts" in text
    assert NO_DIFFERENCE in text
    assert "less rmipo" in text
    assert "<table>" in found._repr_html_()
    assert list(found.to_pandas().method) == ["rmipo", "dpo", "rmipo", "dpo"]
    assert found.best("accuracy").method in ("rmipo", "dpo")
    with pytest.raises(ValueError, match="neither better nor worse"):
        found.best("length")
    page = found.report().read_text(encoding="utf-8")
    assert all(one.answers[0] in page for one in found.results if one.seed == 0 and one.answers[0])
    assert len(found.plot().axes) == 6


@pytest.mark.slow
def test_a_run_is_the_one_that_train_makes(tmp_path: Path) -> None:
    """Whatever ran before it: the second method's numbers are those of a call of its own."""
    found = _compare(tmp_path / "both")
    alone = _compare(tmp_path / "alone", methods=["dpo"])
    assert found.of("dpo")[0].cases == alone.of("dpo")[0].cases
    assert found.of("dpo")[0].answers == alone.of("dpo")[0].answers
    assert found.of("rmipo")[0].answers != alone.of("dpo")[0].answers


def test_a_method_of_unpaired_rows_is_measured_on_the_same_pairs(tmp_path: Path) -> None:
    found = _compare(tmp_path, methods=["dpo", "kto"])
    dpo, kto = (one.cases for one in found.results)
    assert dpo.keys() == kto.keys()
    for measure in ("accuracy", "margin", "chosen_moved"):
        assert dpo[measure].keys() == kto[measure].keys()
    for pair, margin in kto["margin"].items():
        assert kto["accuracy"][pair] == float(margin > 0)


@pytest.mark.slow
def test_unpaired_rows_have_their_own_comparison(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(ROWS)
    ]
    methods = ["kto", {"loss_type": "kto", "desirable_weight": 1.3}]
    found = _compare(tmp_path, rows=rows, methods=methods)
    assert [len(one.cases["accuracy"]) for one in found.results] == [12, 12]
    assert all("margin" not in one.cases for one in found.results)
    with pytest.raises(ValueError, match="are unpaired, and loss_type='kto' alone"):
        _compare(tmp_path / "mixed", rows=rows, methods=["kto", "dpo"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["an adapter goes on", "in full"])
def test_every_run_begins_with_the_model_as_it_came(kind: str, tmp_path: Path) -> None:
    model = tiny_peft() if kind == "an adapter goes on" else tiny_model("llama")
    peft_config = "auto" if kind == "an adapter goes on" else None
    was = {name: weight.clone() for name, weight in model.state_dict().items()}
    methods = [{"loss_type": "dpo", "name": name} for name in ("one", "other")]
    found = _compare(tmp_path, model, methods=methods, peft_config=peft_config)
    assert not found.failed
    assert found.of("one")[0].cases == found.of("other")[0].cases
    assert equal_weights(was, model.state_dict())


@pytest.mark.slow
def test_it_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that are there aren't made again; methods, seeds and a judge may be added."""
    _compare(tmp_path, methods=["rmipo"])
    made: list[str] = []
    train = runs_file.train
    monkeypatch.setattr(
        runs_file, "train", lambda *a, **k: made.append(k["output_dir"].name) or train(*a, **k)
    )
    found = _compare(tmp_path, judge=_longer)
    assert made == ["dpo-seed0"]
    assert "1 of 2: rmipo" in capsys.readouterr().out
    assert all("win_rate" in one.cases for one in found.results)
    assert "win_rate" in (read_outcome(tmp_path / "rmipo-seed0") or found).cases  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="holds a comparison of another kind: pairs is"):
        _compare(tmp_path, rows=ROWS[:80])
    with pytest.raises(ValueError, match="rmipo-seed0 there has other options"):
        _compare(tmp_path, methods=[{"loss_type": "rmipo", "beta": 3.0, "name": "rmipo"}])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(FileExistsError, match="holds no comparison"):
        _compare(tmp_path / "other")


@pytest.mark.slow
def test_one_failure_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = RMiPOTrainer.training_step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.loss_type == "rmipo" and self.state.global_step == 1:
            raise RuntimeError("as planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RMiPOTrainer, "training_step", failing)
    found = _compare(tmp_path)
    assert [one.error for one in found.results] == ["RuntimeError: as planted", None]
    assert "1 FAILED" in found.headline
    assert "FAILED: rmipo, seed 0: RuntimeError: as planted" in str(found)
    assert "as planted" in (tmp_path / "rmipo-seed0.log").read_text()
    assert found.best("accuracy").method == "dpo"
    monkeypatch.undo()
    assert not _compare(tmp_path).failed  # made anew, and the other is there


@pytest.mark.slow
def test_stopped_it_gives_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs_file.train

    def stopped(*args: Any, **given: Any) -> Any:
        if given["loss_type"] == "dpo":
            raise KeyboardInterrupt
        return train(*args, **given)

    monkeypatch.setattr(runs_file, "train", stopped)
    found = _compare(tmp_path, methods=["rmipo", "dpo", "simpo"])
    assert [one.method for one in found.results] == ["rmipo"]
    assert "1 of 3 runs" in str(found)
    assert f"output_dir={str(tmp_path)!r} goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert len(_compare(tmp_path, methods=["rmipo", "dpo", "simpo"]).results) == 3


def test_a_judge_that_fails_costs_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def moody(prompt: Any, answer: Any) -> float:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return 1.0

    found = _compare(tmp_path, methods=["dpo"], judge=moody)
    assert not found.failed
    assert "win_rate" not in found.results[0].cases
    assert "not judged: tired" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="tired"):  # before anything is trained
        _compare(tmp_path / "new", judge=moody)
    assert not (tmp_path / "new" / "rmipo-seed0").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seeds": []}, "seeds must be different whole numbers"),
        ({"seeds": [0, 0]}, "seeds must be different whole numbers"),
        ({"seed": 3}, "a comparison has several; pass seeds"),
        ({"rows": ROWS[:4]}, "too few pairs or prompts to hold any out"),
        ({"eval_dataset": {"a": ROWS, "b": ROWS}}, "must be one set in a comparison"),
        ({"judge": 7}, "judge must be a callable"),
    ],
)
def test_what_can_be_known_before_is_said_before(given: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        _compare(tmp_path, **given)
    assert not list(tmp_path.glob("*-seed*"))


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = tmp_path / "model", tmp_path / "runs"
    causal_lm(tiny_model("llama")).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, ROWS)))
    words = [
        "compare", str(model), str(pairs), "--methods", "rmipo", "dpo:beta=0.05", "--output_dir",
        str(folder), "--max_steps", "2", "--learning_rate", "0.01", "--prompts", "2",
        "--max_new_tokens", "4", "--use_cpu", "--report",
    ]  # fmt: skip
    assert main(words) == 0
    assert "dpo beta=0.05" in capsys.readouterr().out
    assert (folder / "comparison.html").is_file()
    outcome = read_outcome(folder / "dpo-beta=0.05-seed0")
    assert outcome is not None
    assert outcome.options == {"loss_type": "dpo", "beta": 0.05}
    assert len(outcome.load(use_cpu=True).generate(["w5 w6"], max_new_tokens=2)) == 1
    assert main([*words[:5], "dpo:beta"]) == 2
    assert "wanted option=value" in capsys.readouterr().err
