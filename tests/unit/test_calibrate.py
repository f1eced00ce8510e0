# SPDX-License-Identifier: Apache-2.0
"""Reading prompts, and what `calibrate` prints; the server's part is in tests/server."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_diffxkv.calibrate import run
from sglang_diffxkv.calibrate.importance.learn import Learnt, library_texts
from sglang_diffxkv.calibrate.ranks import Files
from sglang_diffxkv.calibrate.run import read_prompts, summary
from sglang_diffxkv.cli import main
from sglang_diffxkv.config import ConfigError, DiffXKVConfig, Tiers, load_config


def test_prompts_are_lines_of_text_or_json(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    lines = ["one\u2028line", "", '{"prompt": "two"}', '{"text": "three", "id": 3}', "  "]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert list(read_prompts(file)) == ["one\u2028line", "two", "three"]


@pytest.mark.parametrize("line", ['{"id": 3}', '{"prompt": 7}', "{broken", '{"text": null}'])
def test_json_without_a_prompt_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts"
    file.write_text(f"fine\n{line}\n")
    with pytest.raises(ConfigError, match="line 2: not a JSON object"):
        list(read_prompts(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "/nowhere"], "--prompts /nowhere"),
        (["--config", "[1]"], "--config is not a JSON object"),
        (["--config", '{"windw": 3}'], "did you mean 'window'"),
        (["--target", "1"], "target = 1.0 is not allowed"),
        (["--model", "/nowhere"], "/nowhere: not a checkpoint"),
        (["--output", "/nowhere/plan.json"], "no folder /nowhere"),
        (["--output", "/"], "give a file"),
        (["--output", "."], "give a file"),
        (["--ranks", "0"], "--ranks 0 is not allowed"),
        (["--ranks", "3", "--output", "p-{rank}.json"], "a multiple of the model's 2 KV heads"),
        (["--ranks", "2", "--output", "p.json"], "put {rank} into its name"),
    ],
)
def test_calibrate_refuses_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--output", str(tmp_path / "plan.json"), *options]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_what_it_prints_serves_what_was_calibrated() -> None:
    config = DiffXKVConfig(
        target=4.0, tiers=Tiers(high="K8V8"), high_layers=(0,), save_plan="p.json", learn_share=1.0
    )
    layers = {name: [1.0, 2.0] for name in ("page_bytes", "retention", "alpha_high", "alpha_low")}
    plan = {"target": 4.0, "qualities": {"balanced": layers}}
    last = summary(plan, config, Files.of(Path("p.json"))).splitlines()[-1]
    served = load_config(last.split("'")[1], {})
    assert served.importance == "p.importance.safetensors"
    assert (served.plan, served.learn_share, served.save_plan) == ("p.json", 0, None)
    assert (served.target, served.tiers, served.high_layers) == (4.0, config.tiers, (0,))
    assert json.loads(last.split("'")[1]).keys() >= {"plan", "target", "tiers"}


def test_the_importance_model_lies_beside_the_plan() -> None:
    for plan, importance in (
        ("a/plan.json", "a/plan.importance.safetensors"),
        ("plan", "plan.importance.safetensors"),
        ("plan-v1.2", "plan-v1.2.importance.safetensors"),
    ):
        assert Files.of(Path(plan)).importance == Path(importance)


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, ConfigError])
def test_what_is_stopped_half_way_leaves_files_as_they_were(
    stopped: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not a new importance model beside the old plan."""
    output = Files.of(tmp_path / "plan.json")
    for path in output:
        path.write_text("old")
    began: list[str] = []

    def save(model: object, path: Path) -> None:
        path.write_text("new")

    def stop(*args: Any) -> None:
        began.append(Path(args[2].importance).read_text())
        raise stopped("stopped")

    monkeypatch.setattr(run, "learn_importance", lambda *args: Learnt(SimpleNamespace(), 0.5))
    monkeypatch.setattr(run, "save_importance", save)
    monkeypatch.setattr(run, "calibrate", stop)
    status = main(["calibrate", "--output", str(output.plan), "--samples", "1", "--length", "256"])
    assert status == (130 if stopped is KeyboardInterrupt else 1) and began == ["new"]
    assert sorted(tmp_path.iterdir()) == sorted(output)
    assert [path.read_text() for path in output] == ["old", "old"]


def test_default_texts_are_read_and_not_run() -> None:
    """`turtle`, say, cannot be imported where there is no Tk."""
    model: Any = SimpleNamespace(
        tokenizer=lambda text, verbose: SimpleNamespace(input_ids=text.split())
    )
    texts = library_texts(model)
    assert len(texts) > 10 and min(map(len, texts)) > 1000
    assert "turtle" not in sys.modules
