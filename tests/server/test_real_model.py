# SPDX-License-Identifier: Apache-2.0
"""Documents that people wrote, on weights that people use: what the default loses of SmolLM2."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_diffxkv.cli import main
from sglang_diffxkv.eval.documents.corpus import load_documents
from sglang_diffxkv.eval.documents.passages import Passage, cut
from tests.support.harness import fast_environment

LENGTH, SAMPLES = 512, 3
TASKS = ("half",)

Rows = dict[tuple[str, str], dict[str, Any]]
"""By policy and task."""


@pytest.fixture(scope="module")
def rows(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """`sglang-diffxkv eval --documents` with 256 sealed tokens."""
    output = tmp_path_factory.mktemp("documents") / "eval.json"
    args = ["--model", str(smollm2), "--device", "cpu", "--dtype", "float32"]
    args += ["--policies", "diffxkv", "--tasks", ",".join(TASKS)]
    args += ["--lengths", str(LENGTH), "--samples", str(SAMPLES), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in fast_environment("cpu").items():
            patch.setenv(key, value)
        assert main(["eval", "--documents", *args]) == 0
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| diffxkv | half |" in output.with_suffix(".md").read_text()
    return {(row["policy"], row["task"]): row for row in json.loads(output.read_text())["rows"]}


def test_full_kv_predicts_what_transformers_predicts(rows: Rows, smollm2: Path) -> None:
    passages = cut(AutoTokenizer.from_pretrained(smollm2), load_documents(None), LENGTH, SAMPLES)
    found = rows["full", "half"]["whole"]["perplexity"]["mean"]
    assert found == pytest.approx(_perplexity(smollm2, passages), rel=1e-3)


def _perplexity(model: Path, passages: Sequence[Passage]) -> float:
    """Of all tokens of the second halves but their first, which the first half predicts."""
    ids = torch.tensor([passage.ids for passage in passages])
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    half = passages[0].half
    with torch.inference_mode():
        logits = net(ids).logits[:, half:-1]
    targets = ids[:, half + 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp().item()


def test_the_default_is_near_lossless(rows: Rows) -> None:
    """Of sealed pages alone: the window that a server keeps raw is left out here."""
    whole = rows["diffxkv", "half"]["whole"]
    assert whole["agreement"]["mean"] >= 0.97
    assert whole["mean_kl"]["mean"] <= 0.005


@pytest.mark.parametrize("task", TASKS)
def test_all_of_the_first_half_is_read_compressed(rows: Rows, task: str) -> None:
    row = rows["diffxkv", task]
    assert row["documents"] == SAMPLES
    assert row["sealed"] == 1 and row["under_pressure"] == 0
    assert 2 < row["physical_compression"] < 6
    assert 0 < row["whole"]["mean_kl"]["mean"] < 0.1
    for part in row["parts"]:
        assert part["mean_kl"]["low"] <= part["mean_kl"]["mean"] <= part["mean_kl"]["high"]
