"""TrainResult: answers before and after, files, figures, report; nothing of the user's changed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.model.generation import Answer, generate_answers, prompt_ids
from rmipo_lite.output import plots
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.model_card import model_card
from rmipo_lite.results.result import TrainResult
from tests.kit import tiny_model, tiny_peft, word_tokenizer

PROMPTS = ["w1 w2 w3 w4", "w5"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w9 {{ m.content }}{% else %}"
    " w8 {{ m.content }} </s>{% endif %}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
)
HISTORY = [
    {"step": s, "loss": 1.5 - s / 10, "rewards/accuracies": 0.5 + s / 20, "rewards/margins": s / 10,
     "rmipo/gamma": 1.2, "rmipo/gamma_std": 0.1, "rmipo/gamma_at_max": 0.2, "rmipo/pmi_gap": 0.1,
     "lengths/chosen": 12.0, "lengths/rejected": 14.0}
    for s in (1, 2, 3)
] + [{"step": 3, "eval_loss": 1.1, "eval_rewards/accuracies": 0.7}]  # fmt: skip


def strong_adapter() -> Any:
    """A tiny model whose adapter changes the answers."""
    model = tiny_peft(dropout=0.0)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=2.0)
    return model


@pytest.fixture
def result(tmp_path: Path) -> TrainResult:
    report = DataReport(source="pairs.jsonl", total=3, kept=2)
    report.drop(1, "empty", "<script>alert(1)</script>")
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None  # as many have none
    return TrainResult(
        model=strong_adapter(),
        tokenizer=tokenizer,
        args=RMiPOConfig(str(tmp_path / "run"), use_cpu=True, hub_token="hf_" + "Ab1" * 8),
        metrics={"eval_loss": 1.1, "eval_rewards/accuracies": 0.7, "eval_runtime": 3.0},
        metrics_before={"eval_loss": 1.5, "eval_rewards/accuracies": 0.5},
        history=HISTORY,
        data_report=report,
        output_dir=tmp_path / "run",
    )


# ---- answers --------------------------------------------------------------------------------


def test_batched_answers_equal_single_ones_and_change_nothing(result: TrainResult) -> None:
    result.model.train()
    state = vars(result.tokenizer).copy()
    size = len(result.tokenizer)
    config = result.model.generation_config.to_dict()
    together = result.generate(PROMPTS, max_new_tokens=6)
    alone = [result.generate([p], max_new_tokens=6)[0] for p in PROMPTS]
    assert together == alone
    assert len(together[0].split()) <= 6
    assert result.tokenizer.pad_token is None
    assert len(result.tokenizer) == size
    assert vars(result.tokenizer).keys() == state.keys()
    assert result.tokenizer.padding_side == state.get("padding_side", "right")
    assert result.model.generation_config.to_dict() == config
    assert all(module.training for module in result.model.modules())


def test_generation_works_with_checkpointing_and_without_cache(result: TrainResult) -> None:
    expected = result.generate(PROMPTS, max_new_tokens=4)
    base = result.model.get_base_model()
    base.config.use_cache = False
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    result.model.train()
    assert result.generate(PROMPTS, max_new_tokens=4) == expected
    assert base.config.use_cache is False
    assert base.model.layers[0].gradient_checkpointing is True


def test_prompts_are_rendered_by_kind(result: TrainResult) -> None:
    tokenizer = result.tokenizer
    words = tokenizer("w1 w2")["input_ids"]
    assert prompt_ids(tokenizer, "w1 w2", conversational=True) == words  # it has no template
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        prompt_ids(tokenizer, [{"role": "user", "content": "w1"}], conversational=True)
    tokenizer.chat_template = TEMPLATE
    turn = tokenizer("w9 w1 w2 w8", add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, "w1 w2", conversational=True) == turn
    assert prompt_ids(tokenizer, "w1 w2", conversational=False) == words
    messages = [{"role": "user", "content": "w1 w2"}]
    assert prompt_ids(tokenizer, messages, conversational=False) == turn


def test_wrong_prompts_are_named(result: TrainResult) -> None:
    with pytest.raises(TypeError, match=r"got one string; write \[prompt\]"):
        result.generate("w1")
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        result.generate(["w1", ""])


def test_compare_switches_the_adapter_off_and_on(result: TrainResult) -> None:
    both = result.compare(PROMPTS, max_new_tokens=5)
    assert both.before == generate_answers(
        tiny_model(), result.tokenizer, PROMPTS, max_new_tokens=5
    )
    assert both.after == result.generate(PROMPTS, max_new_tokens=5)
    assert both.before != both.after
    text = str(both)
    assert "> w1 w2 w3 w4" in text
    assert re.search(r"^before +\| after$", text, re.M)


def test_comparison_shows_hostile_text_as_text() -> None:
    both = AnswerComparison(["<b>\x1b[2J"], [Answer("x" * 200 + "\n\nend")], [Answer("")])
    assert "\x1b" not in str(both)
    assert max(len(line) for line in str(both).splitlines()) <= 2 * 46 + 3
    assert "(empty)" in str(both)
    page = both._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_an_answer_that_the_limit_cut_says_so(result: TrainResult) -> None:
    (short,) = result.generate(PROMPTS[:1], max_new_tokens=1)
    end = result.tokenizer.encode(short)[-1]  # what it says first becomes the end token
    (ended,) = result.generate(PROMPTS[:1], max_new_tokens=5, eos_token_id=end)
    assert (short.ended, ended.ended) == (False, True)
    both = AnswerComparison(PROMPTS[:1], [ended], [short])
    assert both.cut == (0, 1)
    assert str(both).count("[cut]") == both._repr_html_().count("[cut]") == 1


def test_compare_without_an_adapter_is_refused(result: TrainResult) -> None:
    result.model = tiny_model()
    with pytest.raises(TypeError, match="has none"):
        result.compare(PROMPTS)
    with pytest.raises(TypeError, match="merging needs an adapter"):
        result.merge()


# ---- files ----------------------------------------------------------------------------------


def test_saved_adapter_loads_with_equal_logits(result: TrainResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "adapter")
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert {"README.md", "training_config.json"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    ids = torch.arange(3, 11).view(1, -1)
    loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
    result.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    for path in folder.iterdir():
        assert b"hf_Ab1" not in path.read_bytes(), path
    assert json.loads((folder / "training_config.json").read_text())["beta"] == 2.0


def test_merge_gives_the_same_logits_without_adapter(result: TrainResult, tmp_path: Path) -> None:
    ids = torch.arange(3, 11).view(1, -1)
    result.model.eval()
    with torch.no_grad():
        before = result.model(ids).logits
        merged = result.merge(tmp_path / "merged")
        assert not isinstance(merged, PeftModel)
        torch.testing.assert_close(merged(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not [k for k in load_file(tmp_path / "merged" / "model.safetensors") if "lora" in k]


def test_push_to_hub_uploads_what_save_writes(
    result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> str:
            seen.update(options)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> None:
            seen["files"] = {p.name for p in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert result.push_to_hub("me/adapter") == "https://hub/me/adapter"
    assert seen["private"] is True
    assert {"README.md", "adapter_model.safetensors"} <= seen["files"]


def test_model_card_says_what_was_done_and_no_more(result: TrainResult) -> None:
    card = model_card(result)
    assert card.startswith("---\nlibrary_name: peft")
    assert "arXiv:2604.24804" in card
    assert "| eval_loss | 1.5000 | 1.1000 |" in card
    assert "eval_runtime" not in card
    assert "Nothing here shows\nthat the method needs no tuning" in card
    assert "3 in = 2 kept + 1 dropped + 0 refused" in card
    assert "learning_rate: 'auto'" in card
    result.learning_rate = 2.34567e-4
    assert "learning_rate: 'auto: 0.000235 was found'" in model_card(result)
    assert "learning rate 0.00023 (found)" in result.headline


@pytest.mark.parametrize(
    ("name", "told"), [("org/base", True), (r"C:\models\base", False), ("/models/base", False)]
)
def test_a_hub_is_told_of_no_path(result: TrainResult, name: str, told: bool) -> None:
    """It refuses a card whose base is one, and a path says who somebody is."""
    result.model.get_base_model().config._name_or_path = name
    result.model.get_base_model().name_or_path = name
    assert (f"base_model: {json.dumps(name)}" in model_card(result)) is told


def test_no_page_is_written_to_a_device(
    result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmipo_lite.output.page.is_reserved", lambda path: path.stem == "aux")
    with pytest.raises(ValueError, match=r"wanted a file to write to, got 'aux\.html'"):
        result.report("aux.html")


# ---- pictures and pages ---------------------------------------------------------------------


def test_one_figure_has_a_panel_for_everything_logged(result: TrainResult) -> None:
    titles = [axes.get_title() for axes in result.plot().axes]
    assert titles == [
        "Loss", "Reward accuracy", "Reward margin", "Gamma", "PMI gap", "Response length"
    ]  # fmt: skip
    assert [axes.get_title() for axes in plots.figure(HISTORY[-1:]).axes] == titles[:2]
    assert plots.series(HISTORY, "eval_loss") == ([3.0], [1.1])


def test_a_run_that_logged_nothing_still_draws() -> None:
    assert plots.figure([])._repr_png_().startswith(b"\x89PNG")
    assert plots.svgs([]) == []
    assert len(plots.svgs([{"step": 1, "loss": float("nan")}])) == 1


class Page(HTMLParser):
    """Collects tags and attributes, to see what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.loads.append(value)


def test_report_is_one_safe_self_contained_file(result: TrainResult, tmp_path: Path) -> None:
    result.compare(PROMPTS, max_new_tokens=4)
    path = result.report(
        tmp_path / "deep" / "run.html", extra_sections=[("Win <rate>", "<p>60 %</p>")]
    )
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.loads == []
    assert "@import" not in text
    assert "url(http" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "Win &lt;rate&gt;</h2><p>60 %</p>" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "hf_Ab1" not in text
    assert "<svg" in text
    assert "0.7000" in text


def test_report_goes_into_the_run_folder_by_default(result: TrainResult) -> None:
    assert result.report() == result.output_dir / "run.html"


def test_text_forms(result: TrainResult) -> None:
    text = repr(result)
    assert "3 steps, held-out accuracy 0.500 -> 0.700" in text
    page = result._repr_html_()
    assert "<svg" in page
    assert "<script>" not in page
    result.stopped_at_step = 3
    assert "stopped at step 3" in repr(result)
    frame = result.to_pandas()
    assert list(frame["step"]) == [1, 2, 3, 3]


def test_a_merged_model_put_in_place_of_the_adapted_one_is_not_called_whole(
    result: TrainResult,
) -> None:
    result.start, result.model = {"lora": torch.zeros(1)}, tiny_model()
    with pytest.raises(TypeError, match=r"was merged into the weights \(merge_and_unload\)"):
        result.compare(["What is 2 + 2?"])
    result.start = None
    with pytest.raises(TypeError, match=r"this model has none .* is a whole model"):
        result.compare(["What is 2 + 2?"])
