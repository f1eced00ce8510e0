# SPDX-License-Identifier: Apache-2.0
"""Sketches, the plans solved from them, their files, and learning them from traffic."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import FORMATS, PageLayout, make_layout
from sglang_diffxkv.policy.budgeting.learner import CHECK_PAGES, FIRST_PLAN_PAGES, PlanLearner
from sglang_diffxkv.policy.budgeting.plan import Shape, load_plan, solve_plan
from sglang_diffxkv.policy.budgeting.sketch import BINS, HALF_LIFE_TOKENS, ImportanceSketch, bin_of
from sglang_diffxkv.policy.budgeting.target import raw_page_bytes
from sglang_diffxkv.policy.quality import Quality

LAYERS, HEADS = 4, 2
LAYOUT = make_layout(
    head_dim=128, num_kv_heads=HEADS, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
)


def traffic(pages: int, seed: int = 0, sharp: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Importances of pages, more peaked in later layers, and which tokens count."""
    rng = torch.Generator().manual_seed(seed)
    exponent = sharp * torch.arange(1, LAYERS + 1)[:, None, None]
    values = torch.rand(pages, LAYERS, HEADS, 64, generator=rng) ** exponent
    counted = torch.rand(pages, 64, generator=rng) > 0.1
    return values * (exponent + 1), counted


def sketch_of(pages: int, seed: int = 0, sharp: float = 1.0) -> ImportanceSketch:
    sketch = ImportanceSketch.empty(LAYERS, HEADS, "cpu")
    sketch.update(*traffic(pages, seed, sharp))
    return sketch


def test_bins_cover_every_importance_in_order() -> None:
    values = torch.tensor([0.0, 1e-30, 2.0**-14, 0.02, 1.0, 1.09, 1.1, 50.0, 1e30])
    bins = bin_of(values)
    assert bins.tolist() == sorted(bins.tolist())
    assert (bins[0], bins[-1]) == (0, BINS - 1)
    assert bins[4] == BINS // 2 and bins[6] == bins[4] + 1


def test_sketch_counts_and_fades() -> None:
    values, counted = traffic(3)
    sketch = ImportanceSketch.empty(LAYERS, HEADS, "cpu")
    sketch.update(values, counted)
    whole = (values * counted[:, None, None]).sum((0, 3))
    torch.testing.assert_close(sketch.mass.sum(-1), whole)
    assert (sketch.tokens.sum(-1) == counted.sum()).all()
    bins = bin_of(values[:, 2, 1][counted]).bincount(minlength=BINS)
    assert torch.equal(sketch.tokens[2, 1], bins.float())
    before = sketch.tokens.clone()
    sketch.update(torch.zeros(1, LAYERS, HEADS, 64), torch.zeros(1, 64, dtype=torch.bool))
    fade = 2 ** (-64 / HALF_LIFE_TOKENS)
    torch.testing.assert_close(sketch.tokens, before * fade, rtol=1e-7, atol=0)
    torch.testing.assert_close(sketch.mass.sum(-1), whole * fade, rtol=1e-5, atol=0)


def test_difference() -> None:
    one, other = sketch_of(20), sketch_of(20, seed=1)
    assert one.difference(one.copy()) == 0
    assert one.difference(other) < 0.1 < one.difference(sketch_of(20, sharp=5.0)) <= 1


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.97, 0.99])
def test_plan_meets_its_retention(target: float) -> None:
    plan = solve_plan(1, target, sketch_of(50), LAYOUT)
    # Bins of the sketch are coarse where thresholds cut through the most important tokens.
    near = pytest.approx(target, abs=0.025 if target == 0.5 else 0.01)
    assert retention(plan.qualities[Quality.BALANCED], seed=0) == near
    # On other traffic of the same kind, too.
    assert retention(plan.qualities[Quality.BALANCED], seed=5) == near
    nbytes = [
        sum(plan.qualities[quality].page_bytes)
        for quality in (Quality.SMALL, Quality.BALANCED, Quality.HIGH)
    ]
    assert nbytes == sorted(nbytes)


def retention(layers, seed: int) -> float:
    """Mean R over layers of fresh traffic graded by the plan's thresholds."""
    values, counted = traffic(50, seed)
    values = values * counted[:, None, None]
    high, kept = (
        values >= torch.tensor(alphas)[:, None, None]
        for alphas in (layers.alpha_high, layers.alpha_low)
    )
    utility = high + (kept & ~high) * 0.995
    return float(((values * utility).sum((0, 2, 3)) / values.sum((0, 2, 3))).mean())


@pytest.mark.parametrize("target", [2.6, 3.0, 5.0, 9.0])
def test_plan_meets_its_compression(target: float) -> None:
    plan = solve_plan(1, target, sketch_of(50), LAYOUT)
    layers = plan.qualities[Quality.BALANCED]
    assert raw_page_bytes(LAYOUT, LAYERS) / sum(layers.page_bytes) == pytest.approx(
        target, rel=0.05
    )
    # Peaked layers need fewer tokens for the same importance.
    assert len(set(layers.page_bytes)) > 1
    assert layers.page_bytes[-1] <= layers.page_bytes[0]


def test_high_layers_stay_high() -> None:
    plan = solve_plan(1, 5.0, sketch_of(50), LAYOUT, high_layers=(0, 3))
    layers = plan.qualities[Quality.BALANCED]
    assert (layers.alpha_high[0], layers.alpha_low[3]) == (0, 0)
    assert layers.alpha_low[1] > 0
    assert layers.retention[0] == layers.retention[3] == 1
    full = LAYOUT.num_kv_heads * 64 * LAYOUT.token_bytes(LAYOUT.high)
    assert layers.page_bytes[0] >= full > layers.page_bytes[1]
    assert raw_page_bytes(LAYOUT, LAYERS) / sum(layers.page_bytes) == pytest.approx(5, rel=0.05)


def test_file_round_trip(tmp_path: Path) -> None:
    means = 100 * torch.randn(LAYERS, HEADS, LAYOUT.head_dim)
    plan = replace(solve_plan(7, 0.9, sketch_of(10), LAYOUT), key_means=means)
    plan.save(tmp_path / "plan.json")
    number, sketch, read = load_plan(tmp_path / "plan.json", Shape.of(LAYOUT, LAYERS))
    assert number == 7
    torch.testing.assert_close(read, means, rtol=1e-4, atol=0)
    torch.testing.assert_close(sketch.mass, plan.sketch.mass, rtol=1e-5, atol=0)
    again = solve_plan(7, 0.9, sketch, LAYOUT)
    for quality, layers in plan.qualities.items():
        for name, values in asdict(layers).items():
            assert asdict(again.qualities[quality])[name] == pytest.approx(values, rel=1e-3)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["format"] == 3 and found["shape"]["layers"] == LAYERS
    assert not list(tmp_path.glob("*.part"))
    # Those of 8-bit keys are not those of others.
    other = replace(LAYOUT, high=FORMATS["K4V4"])
    assert load_plan(tmp_path / "plan.json", Shape.of(other, LAYERS)).key_means is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not one that `sglang-diffxkv calibrate` writes"),
        ('{"format": 99}', "format 99, expected 3: calibrate again"),
        ('{"format": 3, "shape": {}}', "not one that"),
        (
            '{"format": 3, "number": 1, "importance": null, '
            '"shape": {"layers": 4, "kv_heads": 2, "head_dim": 128, '
            '"high": "K8V4", "low": "K4V2"}, "sketch": {"layers": 4, "kv_heads": 2, '
            '"bins": [[0, 0, -1, 3.0, 1.0]]}}',
            "not one that",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        learner(LAYOUT, plan=str(path))


def test_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    solve_plan(1, 0.9, sketch_of(10), LAYOUT).save(path)
    with pytest.raises(ConfigError, match="4 layers of 2 KV heads of 128, this one has 3"):
        PlanLearner(DiffXKVConfig(plan=str(path)), 0.9, LAYOUT, 3)


def learner(layout: PageLayout, **fields: object) -> PlanLearner:
    return PlanLearner(DiffXKVConfig(**fields), 0.9, layout, LAYERS)  # type: ignore[arg-type]


def test_learns_from_all_until_there_is_a_plan_then_from_a_share() -> None:
    found = learner(LAYOUT, learn_share=0.1)
    found.observe(*traffic(FIRST_PLAN_PAGES - 1))
    found.wait()
    assert found.plan is None
    assert found.wants_pages()
    found.observe(*traffic(1))
    found.wait()
    assert found.plan is not None and found.plan.number == 1
    first = found.plan
    for seed in range(400):  # of which some 40 are looked at; the traffic is the same
        if found.wants_pages():
            found.observe(*traffic(1, seed))
    found.wait()
    assert found.plan is first
    assert found._sketch is not None
    pages = float(found._sketch.tokens[0, 0].sum()) / 64 / 0.9
    assert FIRST_PLAN_PAGES + 15 < pages < FIRST_PLAN_PAGES + 80


def test_solves_again_when_traffic_drifts() -> None:
    found = learner(LAYOUT, learn_share=1.0)
    found.observe(*traffic(FIRST_PLAN_PAGES))
    found.wait()
    assert found.plan is not None
    first = found.plan.qualities[Quality.BALANCED]
    for seed in range(20):
        found.observe(*traffic(CHECK_PAGES, seed, sharp=6.0))
        found.wait()
    assert found.plan.number > 1
    expected = solve_plan(1, 0.9, sketch_of(50, sharp=6.0), LAYOUT).qualities[Quality.BALANCED]
    layers = found.plan.qualities[Quality.BALANCED]
    for old, new, best in zip(
        first.page_bytes, layers.page_bytes, expected.page_bytes, strict=True
    ):
        assert (old - new) / (old - best) > 0.5


def test_a_fixed_plan_stays(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    solve_plan(3, 0.9, sketch_of(50), LAYOUT).save(path)
    found = learner(LAYOUT, plan=str(path), learn_share=0.0)
    plan = found.plan
    assert plan is not None and plan.number == 3
    assert not any(found.wants_pages() for _ in range(100))
    found.on_idle()
    found.wait()
    assert found.plan is plan


def test_saves_at_rest(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = learner(LAYOUT, save_plan=str(path), learn_share=1.0)
    found.observe(*traffic(5))
    found.on_idle()
    found.wait()
    assert load_plan(path, Shape.of(LAYOUT, LAYERS)).number == 1
    path.unlink()
    found.on_idle()  # nothing new
    found.wait()
    assert not path.exists()
    first = found.plan
    found.observe(*traffic(5, seed=1))
    found.on_idle()
    found.wait()
    assert found.plan is first  # the same traffic, but all of it in the file
    number, sketch, _ = load_plan(path, Shape.of(LAYOUT, LAYERS))
    assert number == 1 and float(sketch.tokens[0, 0].sum()) > 1.8 * float(
        first.sketch.tokens[0, 0].sum()
    )


def test_a_plan_that_cannot_be_saved_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = learner(LAYOUT, save_plan=str(tmp_path / "nowhere" / "plan.json"), learn_share=1.0)
    found.observe(*traffic(5))
    found.on_idle()
    assert found.plan is None, "nobody waits for it"
    found.wait()
    assert found.plan is not None
    assert "the plan cannot be written" in caplog.text


def test_the_plan_changes_only_when_asked_for(tmp_path: Path) -> None:
    found = learner(LAYOUT, learn_share=1.0)
    found.observe(*traffic(FIRST_PLAN_PAGES))
    assert found._solving is not None
    found._solving.result()
    assert found.plan is None
    found.take_over()
    assert found.plan is not None


def test_nothing_known_prunes_nothing() -> None:
    for sketch in (ImportanceSketch.empty(LAYERS, HEADS, "cpu"), sketch_of(5)):
        sketch.mass[1] = 0
        for target in (0.9, 6.0):
            layers = solve_plan(1, target, sketch, LAYOUT).qualities[Quality.BALANCED]
            assert layers.alpha_high[1] == layers.alpha_low[1] == 0
