# SPDX-License-Identifier: Apache-2.0
"""The default policy on a real server: calibration, its plan, retention, a long generation."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_diffxkv.cli import main
from tests.support.harness import Server
from tests.support.workload import assert_healthy

TARGET = 0.95
GENERATED = 8192
TOKEN_BYTES = 2 * 2 * 2 * 64 * 2
"""K and V, layers, KV heads, elements of two bytes."""


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=length))


@pytest.fixture(scope="module")
def small_model(make_model: Callable[..., Path]) -> Path:
    return make_model(dtype="bfloat16", layers=2, max_position=16384)


@pytest.fixture(scope="module")
def plan(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated through the command line, on lines of text and of JSON."""
    folder, rng = tmp_path_factory.mktemp("plan"), random.Random(1)
    prompts = folder / "prompts.txt"
    lines = [text(rng, 900) for _ in range(4)]
    lines += ["", json.dumps({"prompt": text(rng, 700)}), json.dumps({"text": text(rng, 30)})]
    prompts.write_text("\n".join(lines))
    options = ["--model", small_model, "--prompts", prompts, "--target", TARGET, "--device", "cpu"]
    assert main(["calibrate", *map(str, options), "--output", str(folder / "plan.json")]) == 0
    return folder / "plan.json"


@pytest.fixture(scope="module")
def server(small_model: Path, plan: Path) -> Iterator[Server]:
    config = {"plan": str(plan), "learn_share": 0, "target": TARGET, "memory_bytes": "24MiB"}
    config["importance"] = str(plan.with_suffix(".importance.safetensors"))
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    with Server(small_model, *args, dtype="bfloat16") as server:
        yield server
        assert_healthy(server)


def test_calibration_takes_in_every_page(plan: Path) -> None:
    found = json.loads(plan.read_text())
    shape = found["shape"]
    assert (shape["layers"], shape["kv_heads"], shape["head_dim"]) == (2, 2, 64)
    retention = found["qualities"]["balanced"]["retention"]
    assert over_layers(retention, found) == pytest.approx(TARGET, abs=0.01)
    tokens = sum(tokens for *_, tokens, _ in found["sketch"]["bins"])
    pages = 4 * (900 - 64) // 64 + (700 - 64) // 64
    assert tokens == pytest.approx(2 * 2 * (pages * 64 - 5 * 4), rel=0.02)  # sinks do not count


def over_layers(retention: list[float], plan: dict[str, Any]) -> float:
    """Retention of all layers together, each with the importance that the plan has seen there."""
    mass = [0.0] * len(retention)
    for layer, *_, seen in plan["sketch"]["bins"]:
        mass[layer] += seen
    return sum(r * m for r, m in zip(retention, mass, strict=True)) / sum(mass)


def test_retention_asked_for_is_got(server: Server, plan: Path) -> None:
    rng = random.Random(2)
    for _ in range(6):
        server.generate(text(rng, 900), max_new_tokens=4)
    stats = server.stats()
    layers = stats["retention_by_layer"]
    found = json.loads(plan.read_text())
    assert over_layers(layers, found) == pytest.approx(TARGET, abs=0.01)
    number = found["number"]
    assert stats["plan"]["number"] == number
    assert stats["sealed_pages_by_plan"] == {str(number): stats["sealed_pages"]}


def test_qualities_take_more_or_fewer_bytes(server: Server) -> None:
    prompt = text(random.Random(3), 900)
    nbytes = []
    for quality in ("small", "balanced", "high"):
        server.flush_cache()
        asked = {"custom_params": {"diffxkv": {"quality": quality}}}
        server.generate(prompt, max_new_tokens=4, sampling=asked)
        stats = server.stats()
        assert stats["pages_by_quality"][quality] == stats["sealed_pages"] + stats["open_pages"]
        nbytes.append(sum(stats["sealed_bytes_per_token_by_layer"]))
    assert nbytes[0] < nbytes[1] < nbytes[2]


def test_long_generations_stay_bounded(server: Server) -> None:
    """Pages of generated text are sealed as they leave the window, by the plan's thresholds."""
    server.flush_cache()
    answer = server.generate([1, 2, 3], max_new_tokens=GENERATED)
    assert len(answer["output_ids"]) == GENERATED
    stats = server.stats()
    assert stats["open_pages"] <= 3
    assert stats["sealed_pages"] >= GENERATED // 64 - 3
    assert stats["sealed_pages_by_plan"] == {str(stats["plan"]["number"]): stats["sealed_pages"]}
    budgets = sum(stats["plan"]["qualities"]["balanced"]["page_bytes"]) / 64
    sealed = sum(stats["sealed_bytes_per_token_by_layer"])
    # The plan caps nothing here, so this is the thresholds' doing.
    assert sealed < 1.5 * budgets and TOKEN_BYTES / sealed > 2.5
