# SPDX-License-Identifier: Apache-2.0
"""`sglang.Engine`, which parses no command line: configured by the environment."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sglang_diffxkv.launch import server_environment
from tests.support.harness import fast_environment

PROGRAM = """
import json, sys
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], attention_backend="diffxkv", device="cpu", dtype="float32",
        max_total_tokens=8192, log_level="error", enable_mixed_chunk=True,
    )
    greedy = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    first = engine.generate(input_ids=[list(range(200)), [7] * 90], sampling_params=greedy)
    again = engine.generate(input_ids=list(range(200)), sampling_params=greedy)
    strict = greedy | {"custom_params": {"diffxkv": {"quality": "lossless"}}}
    same = engine.generate(input_ids=list(range(200)), sampling_params=strict)
    try:
        engine.generate(input_ids=[1], sampling_params={"custom_params": {"diffxkv": "high"}})
        refusal = None
    except ValueError as error:
        refusal = str(error)
    info = engine.get_server_info()
    print(json.dumps({
        "same": first[0]["output_ids"] == again["output_ids"],
        "cached": again["meta_info"]["cached_tokens"],
        "lossless": same["meta_info"]["cached_tokens"],
        "refusal": refusal,
        "stats": info["internal_states"][0]["diffxkv"],
    }))
    engine.shutdown()
"""


def test_engine_runs_on_sealed_pages(make_model: Callable[..., Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = server_environment() | fast_environment("cpu")
    env["DIFFXKV_CONFIG"] = json.dumps({"policy": "lossless"})
    run = subprocess.run(
        [sys.executable, "-P", str(program), str(make_model())],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["same"] and result["cached"] == 192
    # the policy loses nothing, so what asks for that may share with what does not
    assert result["lossless"] == 192
    assert "custom_params.diffxkv = 'high' is not allowed" in result["refusal"]
    stats = result["stats"]
    assert stats["policy"] == "lossless" and stats["sealed_pages"] >= 4
    # --max-total-tokens bounds the memory, too: no more than so many uncompressed tokens take
    assert stats["virtual_pages"] <= 8192 // 64
    assert stats["bytes_total"] <= 8192 * 4 * 2 * 2 * 64 * 4
