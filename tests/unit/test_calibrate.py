# SPDX-License-Identifier: Apache-2.0
"""Reading prompts, and what `calibrate` prints; the server's part is in tests/server."""

import json
from pathlib import Path

import pytest

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
    ],
)
def test_calibrate_refuses_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *options, "--output", str(tmp_path / "plan.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_what_it_prints_serves_what_was_calibrated() -> None:
    config = DiffXKVConfig(
        target=4.0, tiers=Tiers(high="K8V8"), high_layers=(0,), save_plan="p.json", learn_share=1.0
    )
    layers = {name: [1.0, 2.0] for name in ("page_bytes", "retention", "alpha_high", "alpha_low")}
    plan = {"target": 4.0, "qualities": {"balanced": layers}}
    last = summary(plan, config, Path("p.json")).splitlines()[-1]
    served = load_config(last.split("'")[1], {})
    assert (served.plan, served.learn_share, served.save_plan) == ("p.json", 0, None)
    assert (served.target, served.tiers, served.high_layers) == (4.0, config.tiers, (0,))
    assert json.loads(last.split("'")[1]).keys() >= {"plan", "target", "tiers"}
