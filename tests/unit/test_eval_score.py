# SPDX-License-Identifier: Apache-2.0
import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.ask import divergence
from sglang_diffxkv.eval.estimate import by_document, hit_rate, mean, wilson
from sglang_diffxkv.eval.options import Options
from sglang_diffxkv.eval.questions.answers import Answer, CellAnswers
from sglang_diffxkv.eval.questions.plot import plot, points
from sglang_diffxkv.eval.questions.prompts import Cell, Prompt, Stop
from sglang_diffxkv.eval.questions.report import markdown, outcome, write
from sglang_diffxkv.eval.questions.score import (
    QuestionRecord,
    failures,
    found_share,
    is_right,
    score,
    telling,
)
from sglang_diffxkv.eval.tasks.base import Question
from sglang_diffxkv.eval.variants import KNOBS, VARIANTS, Shape, Variant, make_variant
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.registry import make_policy

SHAPE = Shape(head_dim=64, kv_heads=2, tokens=1024)


def logs(weights):
    total = sum(weights.values())
    return {token: math.log(weight / total) for token, weight in weights.items()}


def test_divergence_is_exact_where_all_tokens_are_listed():
    rng = random.Random(0)
    full, other = (logs({i: rng.random() + 0.01 for i in range(50)}) for _ in range(2))
    expected = sum(math.exp(full[i]) * (full[i] - other[i]) for i in range(50))
    assert divergence(full, other) == pytest.approx(expected, rel=1e-6)
    assert divergence(full, full) == pytest.approx(0, abs=1e-9)


def test_divergence_from_no_numbers_is_none():
    assert math.isnan(divergence({1: -0.1, 2: -3.0}, {1: math.nan, 2: math.nan}))


def test_divergence_of_listed_tokens_is_a_lower_bound():
    rng = random.Random(1)
    for _ in range(200):
        full, other = (logs({i: rng.random() ** 4 + 1e-4 for i in range(50)}) for _ in range(2))
        exact = divergence(full, other)
        top = [
            dict(sorted(d.items(), key=lambda item: -item[1])[: rng.randint(1, 40)])
            for d in (full, other)
        ]
        assert -1e-9 <= divergence(*top) <= exact + 1e-6


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (7, 20), (20, 20), (190, 200)])
def test_wilson(hits, count):
    ends = binomtest(hits, count).proportion_ci(method="wilson")
    found = wilson(hits, count)
    assert found.mean == hits / count
    assert found.low == pytest.approx(ends.low, abs=1e-4)
    assert found.high == pytest.approx(ends.high, abs=1e-4)


def test_mean_covers_the_truth_as_often_as_it_says():
    rng = random.Random(2)
    inside = 0
    for _ in range(400):
        found = mean([rng.gauss(3, 2) for _ in range(100)])
        inside += found.low <= 3 <= found.high
    assert 0.9 < inside / 400 < 0.99


def test_samples_of_one_document_count_once():
    hits, documents = [True] * 7 + [False] * 7, [0] * 7 + [1] * 7
    found = hit_rate(hits, documents)
    assert (found.mean, found.low, found.high) == (0.5, 0, 1)
    assert hit_rate(hits, list(range(14))) == wilson(7, 14)
    assert by_document([1, 2, 6], [4, 9, 9]) == [1, 4]


def test_references_are_whole_words():
    assert found_share("The code is Bat.", ("bat",)) == 1
    assert found_share("bath", ("bat",)) == 0
    assert found_share("bat", ("bat", "bath")) == 0.5


def answer(text, first, tokens=1):
    return Answer(text, [0] * tokens, [logs({first: 2 + first, 9: 1})] * tokens, cached_tokens=64)


def test_score():
    question = Question("What?", "a is b", ("a", "b"))
    prompts = [Prompt([1] * 100, [1] * 100, question, i, str(i), 1) for i in range(4)]
    cell = Cell("vt", 100, prompts, Stop([], []))
    full = CellAnswers([answer("a is b", 1)] * 4, [])
    texts = ["a is b", " a  is b\n", "b then a", "no"]
    stats = {
        "physical_compression": 2.0,
        "bytes_in_use": 1000,
        "sealed_pages": 3,
        "open_pages": 1,
        "tokens_held": 250,
        "tier_tokens": {"high": 5, "low": 3, "pruned": 2},
        "counters": {"sealed_under_pressure": 0},
    }
    given = CellAnswers(
        [answer(text, first, 2) for text, first in zip(texts, (1, 1, 2, 2), strict=True)],
        [stats, stats | {"physical_compression": 4.0, "bytes_in_use": 500}],
    )
    full = full._replace(
        answers=[a._replace(distributions=a.distributions * 2) for a in full.answers]
    )
    row = score(Variant("diffkv", VARIANTS["diffkv"]), cell, given, full)
    assert (row.accuracy, row.recall, row.agreement) == (0.5, 0.75, 0.5)
    assert row.physical_compression == pytest.approx((2000 + 2000) / (1000 + 500))
    assert (row.kept_high, row.kept_low, row.pruned) == (0.5, 0.3, 0.2)
    assert row.sealed == pytest.approx(3 * PAGE_TOKENS / 250)
    assert row.cached == 0.64
    assert row.mean_kl > 0
    assert score(Variant("full", None), cell, full, full).physical_compression == 1
    page = markdown([row, replace(row, length=200)], "Title", "about")
    assert "## 100 tokens" in page and "50% / 30% / 20%" in page


@pytest.mark.parametrize("tokens", [1024, 1100, 2048, 8000])
@pytest.mark.parametrize("target", [2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_meets_its_target(name, target, tokens):
    """Bytes of a prompt whose sealed pages are as full as the policy allows, frames included."""
    shape = SHAPE._replace(tokens=tokens)
    try:
        config = make_variant(name, target, shape).config
    except ConfigError as error:
        assert "lower the target" in str(error)
        assert target >= 4 and (tokens < 2000 or name == "uniform")
        return
    assert config is not None
    policy = make_policy(config, head_dim=64, num_kv_heads=2, raw_itemsize=2, num_layers=6)
    layout = policy.layout
    sealed = (tokens - config.window) // PAGE_TOKENS
    raw = tokens // PAGE_TOKENS - sealed  # the cache holds complete pages only
    dense = 2 * 2 * 64 * 2 * PAGE_TOKENS
    share = {"snapkv": policy.shares[0], "streaming": 0}.get(name, policy.caps[0])
    if name == "snapkv":
        frames = -(-int(share * full_bytes(layout)) // layout.frame_bytes) * sealed
    elif name == "streaming":
        sinks = layout.num_kv_heads * layout.sections(config.sink, 0).total
        frames = -(-sinks // layout.frame_bytes)
    else:
        frames = -(-policy.caps[0] // layout.frame_bytes) * sealed
    nbytes = frames * layout.frame_bytes
    if config.target is not None:  # which the policy itself meets: tests/unit/test_diffxkv.py
        nbytes = dense * sealed / config.target
    assert tokens // PAGE_TOKENS * dense / (raw * dense + nbytes) >= target - 1e-9


def test_unknown_variants_are_refused():
    with pytest.raises(ConfigError, match="one of: full"):
        make_variant("snap", None, SHAPE)
    assert make_variant("int8", 4.0, SHAPE) == Variant("int8", VARIANTS["int8"])


def row(policy, length, exact, compression):
    zeros = dict.fromkeys((field.name for field in fields(QuestionRecord)), 0)
    return replace(
        QuestionRecord(**zeros),
        policy=policy,
        target=None,
        length=length,
        samples=100,
        documents=100,
        accuracy=exact,
        physical_compression=compression,
    )


def test_other_models_are_right_when_every_reference_is_there():
    question = Question("What?", "1 and 2", ("1", "2"), exact=False)
    assert is_right(question, "They are 2 and 1.") and not is_right(question, "They are 2 and 11.")
    assert not is_right(question._replace(exact=True), "They are 1 and 2.")


def test_cells_that_full_kv_fails_are_named_and_left_out(tmp_path):
    full = [row("full", 64, 0.9, 1), row("full", 64, 0.6, 1), row("full", 128, 0.1, 1)]
    full = [replace(r, task=task) for r, task in zip(full, ("qa", "vt", "vt"), strict=True)]
    ours = [replace(r, policy="diffxkv", physical_compression=3, accuracy=0.5) for r in full]
    assert failures(full + ours) == full[1:]
    assert telling(full + ours) == [full[0], ours[0]]
    output = tmp_path / "eval.json"
    options = Options(Path("m"), [], [], [64, 128], 1, 0, "cpu", [], "float32", "noise")
    page = write(full + ours, "eval", options, output)
    assert "left out of summaries and plot: vt at 64 tokens (60%), vt at 128 tokens (10%)" in page
    assert "Model m, in float32 on cpu. Filler: noise." in page
    assert "| full | 100 | 90.0%" in page and "| full | 200 |" not in page
    assert page.count("| diffxkv | vt |") == 2
    failed = json.loads(output.read_text())["full_kv_fails"]
    assert failed == [
        {"task": "vt", "length": 64, "accuracy": 0.6},
        {"task": "vt", "length": 128, "accuracy": 0.1},
    ]
    assert output.with_suffix(".png").exists()
    # Nothing to draw where all of them fail.
    write([full[2]], "eval", options, tmp_path / "none.json")
    assert not (tmp_path / "none.png").exists()
    assert "left out" not in markdown([full[0], ours[0]], "Title", "about")


def test_a_line_per_variant():
    found = replace(row("diffxkv", 64, 0.9, 4), target=4.0, mean_kl=0.0123)
    line = outcome([found, replace(found, accuracy=0.7)], 61.4)
    assert line == "diffxkv at 4×: accuracy 80.0%, KL 0.012, compression 4.00, 2 cells in 61 s"
    assert "KL" not in outcome([row("full", 64, 0.9, 1)], 1)


def test_points_pool_the_tasks(tmp_path):
    rows = [row("a", 64, 0.9, 2), row("a", 64, 0.7, 4), row("b", 64, 1, 1), row("b", 128, 1, 1)]
    first, *_ = found = points(rows)
    assert len(found) == 3
    assert first.accuracy == pytest.approx(0.8)
    assert first.bytes_share == pytest.approx((0.5 + 0.25) / 2)
    assert first.samples == 200
    assert first.recall == 0
    few, *_ = points([replace(row("a", 64, 0.9, 2), documents=10)])
    assert few[4:7] == wilson(9, 10)
    plot(tmp_path / "plot.png", rows)
    assert (tmp_path / "plot.png").stat().st_size > 1000
