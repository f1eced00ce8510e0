# SPDX-License-Identifier: Apache-2.0
"""The evaluation and the demo's load, with the bundled model on real servers."""

import json

import pytest
from tokenizers import Tokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.cli import main
from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.workload import run_load
from sglang_diffxkv.eval.model import load_model
from tests.support.harness import Server

SAMPLES = 21


@pytest.mark.server
@pytest.mark.slow
def test_eval_reports_what_a_policy_costs(tmp_path, capsys):
    output = tmp_path / "eval.json"
    tasks = "niah_multikey,shared_prefix,recomputed_prefix"
    args = ["--policies", "diffxkv", "--tasks", tasks, "--lengths", "640"]
    args += ["--samples", str(SAMPLES), "--device", "cpu", "--output", str(output)]
    assert main(["eval", *args]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["policy"], row["task"]) for row in rows] == [
        (policy, task) for policy in ("full", "diffxkv") for task in tasks.split(",")
    ]
    full, ours = rows[:3], rows[3:]
    for row in rows:
        assert row["samples"] == SAMPLES and row["length"] == 640
        # The prompt's last, incomplete page is computed again.
        assert row["cached"] > 0.85
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    for row in full:
        assert row["accuracy"] >= 0.9
        assert row["physical_compression"] == 1
    for row in ours:
        assert row["accuracy"] >= 0.75
        assert row["physical_compression"] > 2
        assert row["sealed"] > 0.8 and row["under_pressure"] == 0
        assert 0 < row["mean_kl"] < 0.5
        # Of a head's 64 elements: K8V4 and K4V2 with 10 bytes of scales and importance, 256 raw.
        least = 106 * row["kept_high"] + 58 * row["kept_low"]
        assert 0.6 * 256 / least < row["physical_compression"] < 256 / least
    # Both ask the same questions, so full KV gives the same answers.
    assert full[1]["accuracy"] == full[2]["accuracy"]
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.server
@pytest.mark.slow
def test_answers_of_the_demo_are_right(tmp_path):
    config = {"memory_bytes": "20MiB"}
    options = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    options += ["--enable-metrics"]
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    with Server(BUNDLED, *options, dtype="bfloat16") as server:
        probe = Probe(server.url, load_model(BUNDLED).token_bytes, None)
        stages = list(run_load(server.url, probe, lambda text: len(tokenizer.encode(text).ids)))
    for stage in stages:
        # The model itself misses some: of 65, full KV gets 60 right.
        assert stage.score.right >= 0.5 * stage.score.asked, stage.name
    asked = sum(stage.score.asked for stage in stages)
    assert sum(stage.score.right for stage in stages) >= 0.8 * asked
