# SPDX-License-Identifier: Apache-2.0
"""The default policy on real servers: calibration, its plan, retention, long generations."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.cli import main
from sglang_diffxkv.eval.prompts import make_cells
from sglang_diffxkv.eval.run import load_model
from tests.server.harness import Server
from tests.server.workload import assert_healthy

GENERATED = 8192


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated through the command line, on prompts of its own making."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    options = ["--length", "900", "--samples", "4", "--target", "0.95", "--device", "cpu"]
    assert main(["calibrate", *options, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def server(plan: Path) -> Iterator[Server]:
    config = {"plan": str(plan), "learn_share": 0, "target": 0.95, "memory_bytes": "24MiB"}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    with Server(BUNDLED, *args, dtype="bfloat16") as server:
        yield server
        assert_healthy(server)


def test_calibration_learns_layers(plan: Path) -> None:
    found = json.loads(plan.read_text())
    budgets = found["qualities"]["balanced"]["page_bytes"]
    assert len(budgets) == found["shape"]["layers"] == 6
    assert max(budgets) > 1.5 * min(budgets)
    retention = found["qualities"]["balanced"]["retention"]
    assert sum(retention) / len(retention) == pytest.approx(0.95, abs=0.01)
    tokens = sum(tokens for *_, tokens, _ in found["sketch"]["bins"])
    assert tokens > 6 * 2 * 16 * 700  # layers, KV heads, prompts, tokens outside window and sinks


def test_retention_asked_for_is_got(server: Server) -> None:
    cells = make_cells(load_model(BUNDLED).tokenizer, ["niah_multikey", "vt"], [900], 6, seed=4)
    for cell in cells:
        for prompt in cell.prompts:
            server.generate(prompt.ids, max_new_tokens=4)
    stats = server.stats()
    layers = stats["retention_by_layer"]
    assert sum(layers) / len(layers) == pytest.approx(0.95, abs=0.01)
    assert max(layers) - min(layers) > 0.005
    assert stats["plan"]["number"] == 1
    assert stats["sealed_pages_by_plan"] == {"1": stats["sealed_pages"]}
    nbytes = stats["sealed_bytes_per_token_by_layer"]
    assert max(nbytes) > 1.5 * min(nbytes)


@pytest.mark.slow
def test_long_generations_stay_bounded(make_model: Callable[..., Path]) -> None:
    """Pages of generated text are sealed as they leave the window, by the plan that is learnt."""
    model = make_model(dtype="bfloat16", layers=2, max_position=16384)
    config = {"target": 4, "memory_bytes": "24MiB"}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    with Server(model, *args, dtype="bfloat16") as server:
        answer = server.generate([1, 2, 3], max_new_tokens=GENERATED)
        assert len(answer["output_ids"]) == GENERATED
        stats = server.stats()
        assert stats["open_pages"] <= 3
        assert stats["sealed_pages"] >= GENERATED // 64 - 3
        assert stats["plan"]["number"] >= 1
        by_plan = stats["sealed_pages_by_plan"]
        assert sum(pages for number, pages in by_plan.items() if number != "0") > 20
        layout_bytes = 2 * 2 * 2 * 64 * 2  # K and V, layers, KV heads, elements of two bytes
        sealed = sum(stats["sealed_bytes_per_token_by_layer"])
        assert layout_bytes / sealed == pytest.approx(4, rel=0.1)
        assert_healthy(server)
