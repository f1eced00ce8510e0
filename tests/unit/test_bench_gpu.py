# SPDX-License-Identifier: Apache-2.0
"""The bench of the GPU, as far as it goes without one: Triton's interpreter instead."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.children import Child
from bench.gpu.report.results import Results
from bench.gpu.timing.timer import summary

ROOT = Path(__file__).parents[2]
CHECK = {"name": "pack x", "operation": "pack", "timed": True, "tolerance": 1e-3, "lse_error": 0.0}


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The launcher with this Python."""
    return subprocess.run(
        [ROOT / "bench/gpu/run.sh", *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_dry_run_without_sglang_and_flashinfer(tmp_path: Path) -> None:
    """The whole command on small inputs, where SGLang and FlashInfer cannot be imported."""
    for name in ("sglang", "flashinfer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not here')\n")
    only = "machine,verify-score,verify-arena,arena,copies,decode"
    folder = tmp_path / "results"
    arguments = ("bench.gpu", "--dry", "--only", only, "--output", folder)
    done = run(*arguments, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("gpu_*.json")
    found = json.loads(path.read_text())
    assert found["machine"][1]["subnormals"]["exact"]
    assert all(check["passed"] for check in found["verify-score-1"])
    assert {check["operation"] for check in found["verify-score-1"]} == {
        "score_open",
        "score_decode",
    }
    assert found["failures"] == []
    assert {(x["frame_bytes"], x["direction"]) for x in found["copies"]} == {
        (size, direction)
        for size in (512, 3328, 8448)
        for direction in ("to the host", "from the host")
    }
    assert sum("copy" in check["name"] for check in found["verify-arena-1"]) == 10
    (decode,) = found["decode"]
    assert set(decode["times"]) == {"diffxkv", "merge", "score_decode", "plan", "sdpa bf16"}
    assert 0 < decode["bytes"] < decode["raw_bytes"]
    assert "## Decode" in path.with_suffix(".md").read_text()


def test_every_module_is_imported_without_sglang(tmp_path: Path) -> None:
    """Kernels and bench import neither SGLang nor, unless it is used, FlashInfer."""
    (tmp_path / "import_all.py").write_text(
        "import importlib, sys\n"
        "from pathlib import Path\n"
        f"root = Path({str(ROOT)!r})\n"
        "folders = {'bench.gpu': 'bench/gpu', 'sglang_diffxkv.kernels': 'kernels'}\n"
        "for package, folder in folders.items():\n"
        "    folder = root / folder\n"
        "    for file in folder.rglob('*.py'):\n"
        "        parts = file.relative_to(folder).with_suffix('').parts\n"
        "        name = '.'.join((package, *parts)).removesuffix('.__init__')\n"
        "        importlib.import_module(name)\n"
        "assert 'bench.gpu.verify.run' in sys.modules\n"
        "assert not {'sglang', 'flashinfer'} & sys.modules.keys()\n"
    )
    done = run("import_all", PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_results_of_a_run_that_fails(tmp_path: Path) -> None:
    """Failed operations are red, and the files say so; NaN does not make them unreadable."""
    results = Results(tmp_path, "--seconds 1")
    results.add("machine", {"subnormals": {"exact": False}})
    assert not list(tmp_path.iterdir())  # nobody knows yet what the device is called
    results.add("machine", {"facts": {"device": "Some GPU (x)"}})
    results.add("verify-pack-1", CHECK | {"passed": False, "error": math.nan})
    unimportant = {"operation": "score_open", "timed": False, "passed": False, "message": "m"}
    results.add("verify-score-1", CHECK | unimportant)
    results.add("verify-extend-2", {"error": "CUDA error"})
    assert set(results.red()) >= {"pack", "extend_open", "extend_sealed"}
    assert not {"score_open", "decode"} & set(results.red())
    failures = results.failures()
    assert len(failures) == 4 and "SUBNORMALS" in failures[0]
    found = json.loads((tmp_path / "gpu_some_gpu_x.json").read_text())
    assert found["failures"] == failures
    assert found["verify-pack-1"][0]["error"] == "nan"
    assert "## FAILED" in (tmp_path / "gpu_some_gpu_x.md").read_text()


@pytest.mark.parametrize(("name", "seconds"), [("nonsense", 60.0), ("verify-pack-1", -20.0)])
def test_a_section_that_ends_badly(
    name: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails, and one that is late: both leave a record, and nothing running."""
    assert run("platform").returncode == 0  # links what children import
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "build/gpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = Results(tmp_path, "")
    child = Child(name, time.time() + seconds, (), results)
    child.wait()
    (error,) = (x["error"] for x in results.sections[name] if "error" in x)
    assert error in ("exit status 1", "ended: it took longer than it may")
    assert results.failures() == [f"section {name}: {error}"]
    assert child._process.poll() is not None


def test_what_crashed_is_not_timed() -> None:
    """Nor is what the inputs of a timing are made with."""
    later = str(time.time() + 60)
    done = run("bench.gpu.section", "decode", "--deadline", later, "--red", "unpack,pack",
               TRITON_INTERPRET="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, done.stdout.splitlines())
    assert "crashed or gave NaN" in record["skipped"]


def test_summary() -> None:
    values = [float(x) for x in range(1, 12)]
    assert summary(values) == (6.0, 2.0, 10.0, 11)
    assert summary([3.0]) == (3.0, 3.0, 3.0, 1)
