"""The demo: its pages, questions, arms and report. Whether the effect shows takes minutes: `make demo`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import own_training_loop
from examples.demo import stages
from examples.demo.__main__ import main
from examples.demo.arms import ARMS, Arm, Pretrained, build_arm
from examples.demo.cache import Cache
from examples.demo.encoder import EMPTY, IGNORE, patch_labels
from examples.demo.models import TEXT_WIDTH, TokenPlaces, build_model
from examples.demo.pages import BAR_UNIT, GRID, PATCH, SIZE, Pages, render_pages
from examples.demo.questions import KINDS, QUESTIONS, VOCABULARY, answers, bag_ceiling
from examples.demo.report import claims
from examples.demo.train import accuracy, predict, question_logits, read_page

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pages() -> Pages:
    return render_pages(6, seed=5)


@pytest.fixture(scope="module")
def arms() -> dict[str, Arm]:
    torch.manual_seed(0)
    pretrained = Pretrained(build_model(seed=3).state_dict(), TokenPlaces(TEXT_WIDTH).state_dict())
    return {name: build_arm(name, pretrained, seed=1) for name in ARMS}


def test_pages_depend_on_the_seed_alone(pages: Pages) -> None:
    again, other = render_pages(6, seed=5), render_pages(6, seed=6)
    assert torch.equal(pages.pixels, again.pixels)
    assert torch.equal(answers(pages), answers(again))
    assert not torch.equal(answers(pages), answers(other))


def test_bars_are_as_tall_as_their_answers(pages: Pages) -> None:
    half = SIZE // 2
    centre = slice(PATCH // 2, half, PATCH)  # the middle column of every bar
    filled = (pages.pixels[:, 0, half:, :half][:, :, centre] < 150).sum(1)
    assert torch.equal(filled, (pages.heights + 1) * BAR_UNIT)


def test_patch_labels_agree_with_the_page(pages: Pages) -> None:
    labels = {name: label.view(-1, GRID, GRID) for name, label in patch_labels(pages).items()}
    half = GRID // 2
    assert torch.equal(labels["letter"][:, :half], pages.letters)
    assert (labels["letter"][:, half:] == IGNORE).all()
    assert torch.equal(labels["fill"][:, half:, :half].sum(1), pages.heights + 1)
    shown = labels["shape"][:, half:, half:]
    assert ((shown < EMPTY).sum((1, 2)) == 4 * 4).all()
    assert torch.equal(labels["colour"][:, half:, half:] == IGNORE, shown == EMPTY)


def test_kinds_cover_every_question_once() -> None:
    assert [column for kind in KINDS for column in kind.columns] == list(range(len(QUESTIONS)))
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_accuracy_counts_right_answers_by_kind(pages: Pages) -> None:
    predictions = answers(pages)
    assert set(accuracy(predictions, pages).values()) == {1.0}
    characters, heights = KINDS[0], KINDS[1]
    predictions[:, list(characters.columns)[:18]] = 0  # a quarter of the letters
    predictions[:3, list(heights.columns)] = 0  # half of the bars
    found = accuracy(predictions, pages)
    assert found.pop(characters.name) == pytest.approx(0.75)
    assert found.pop(heights.name) == pytest.approx(0.5)
    assert set(found.values()) == {1.0}


def test_bag_ceiling_agrees_with_the_sum_over_all_bags_of_two() -> None:
    # Two letters of twenty are equal once in twenty times; otherwise either guess is right for one of the two.
    assert bag_ceiling(letters_per_token=2) == pytest.approx(1 / 20 + 19 / 20 / 2, abs=2e-3)
    assert bag_ceiling(letters_per_token=1) == 1.0
    assert bag_ceiling() == pytest.approx(0.321, abs=2e-3)


@pytest.mark.parametrize("name", ARMS)
@torch.no_grad()
def test_packed_questions_equal_questions_asked_alone(arms: dict[str, Arm], pages: Pages, name: str) -> None:
    arm = arms[name]
    columns = torch.tensor([[0, 40, 71, 74, 80, 85]]).expand(len(pages), -1)
    packed = question_logits(arm, pages, columns)
    for index in range(columns.shape[1]):
        torch.testing.assert_close(
            question_logits(arm, pages, columns[:, index : index + 1])[:, 0], packed[:, index], atol=TOLERANCE, rtol=0
        )
    # And equal the model's own way, with the masks that it makes itself.
    prompts = [f"<image> {QUESTIONS[column]}" for column in columns[0].tolist()]
    inputs = arm.processor(text=prompts, images=[pages.image(0)] * len(prompts), return_tensors="pt")
    torch.testing.assert_close(arm.model(**inputs).logits[:, -1], packed[0], atol=TOLERANCE, rtol=0)


def test_generate_reads_what_predict_does(arms: dict[str, Arm], pages: Pages) -> None:
    arm = arms["pooled + VR"]
    read = read_page(arm, pages, index=2)
    assert read == [VOCABULARY[token] for token in predict(arm, pages)[2].tolist()]


def test_all_pooled_arms_start_as_the_same_function(arms: dict[str, Arm], pages: Pages) -> None:
    columns = torch.arange(len(QUESTIONS)).expand(len(pages), -1)
    with torch.no_grad():
        pooled = question_logits(arms["pooled"], pages, columns)
        for name in ("pooled + MLP", "pooled + VR", "pooled + VR, no saliency"):
            assert torch.equal(question_logits(arms[name], pages, columns), pooled), name


def test_the_control_is_as_large_as_vision_remember(arms: dict[str, Arm]) -> None:
    control, restored = arms["pooled + MLP"].added_parameters, arms["pooled + VR"].added_parameters
    assert abs(control - restored) < 0.01 * restored
    assert arms["pooled"].added_parameters == 0
    assert {name: arm.vision_tokens for name, arm in arms.items()} == {
        name: 144 if name == "uncompressed" else 36 for name in ARMS
    }


def test_only_the_encoder_is_frozen(arms: dict[str, Arm]) -> None:
    for arm in arms.values():
        frozen = {name for name, parameter in arm.model.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in arm.model.named_parameters() if "vision_tower" in name}


def test_cache_keeps_a_result_until_its_key_changes(tmp_path: Path) -> None:
    cache, made, hits = Cache(tmp_path), [], []

    def get(key: dict[str, Any]) -> Any:
        return cache.get(
            "a stage", key, make=lambda: made.append(key) or {"n": len(made)}, on_hit=lambda: hits.append(1)
        )

    assert get({"steps": 1}) == get({"steps": 1}) == {"n": 1}
    assert get({"steps": 2}) == {"n": 2}
    assert (len(made), len(hits)) == (2, 1)


def test_claims_must_hold_in_every_seed() -> None:
    def results(pooled: list[float], restored: list[float], control: list[float]) -> dict[str, Any]:
        found = {"pooled": pooled, "pooled + VR": restored, "pooled + MLP": control}
        return {"arms": {n: {"seeds": [{"accuracy": {KINDS[0].name: x}} for x in v]} for n, v in found.items()}}

    assert [c.holds for c in claims(results([0.32, 0.33], [0.99, 0.98], [0.33, 0.32]))] == [True, True, True]
    assert [c.holds for c in claims(results([0.32, 0.41], [0.99, 0.89], [0.38, 0.41]))] == [False, False, False]


def test_quick_demo_writes_a_self_contained_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--seeds", "1", "--threads", threads, "--out", str(tmp_path)]
    report = main(arguments)
    html = report.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in html
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html)
    assert all(name in html for name in (*ARMS, *(kind.name for kind in KINDS)))

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == list(ARMS)
    assert results["arms"]["pooled"]["prefill_ratio"] == 1
    steps = results["settings"]["arm"]["steps"]
    assert all(len(arm["seeds"][0]["curve"]["losses"]) == steps for arm in results["arms"].values())
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "curves.png", "look.png", "reading.png"}

    def must_not_train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the second run trained again")

    for stage in ("pretrain_encoder", "pretrain_lookup", "train_arm"):
        monkeypatch.setattr(stages, stage, must_not_train)
    main(arguments)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["arms"]["pooled + VR"]["seeds"] == results["arms"]["pooled + VR"]["seeds"]


def test_own_training_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    losses = own_training_loop.main(steps=12)
    assert len(losses) == 12
    assert all(map(math.isfinite, losses))
    assert "the truth is" in capsys.readouterr().out
    source = Path(own_training_loop.__file__).read_text(encoding="utf-8")
    assert source.count("\n") < 150
