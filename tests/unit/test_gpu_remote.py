# SPDX-License-Identifier: Apache-2.0
"""The fifteen-minute run: what is packed, and that trouble costs its own time only."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import children
from bench.gpu.children import Child
from bench.gpu.remote import __main__ as remote
from bench.gpu.remote import pack, unpack
from bench.gpu.remote.shim import stand_ins, syncs
from bench.gpu.report.results import Results
from bench.gpu.server import kinds, report

CHECK = {"name": "decode x", "operation": "decode", "timed": True, "tolerance": 1e-3}


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("sglang/srt/models/llama.py", True),
        ("sglang/srt/models/deepseek_v2.py", False),
        ("sglang/srt/managers/scheduler.py", True),
        ("sglang/srt/rust_extensions/_server.cpython-312-x86_64-linux-gnu.so", False),
        ("sglang/multimodal_gen/__init__.py", False),
        ("xgrammar-0.2.7.dist-info/RECORD", True),  # its library is found by that
        ("flashinfer/prefill.py", True),
        ("flashinfer/data/csrc/batch_prefill.cu", True),
        ("flashinfer/data/csrc/fused_moe/kernel.cu", False),
        ("flashinfer/data/cutlass/include/cutlass/array.h", True),
        ("flashinfer/data/cutlass/examples/x.cu", False),
    ],
)
def test_what_is_packed(path: str, kept: bool) -> None:
    assert pack.is_kept(path) == kept


def test_archives_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they fit into an upload of 64 MiB."""
    assert sum(pack.LIMITS.values()) < 50e6
    monkeypatch.setattr(pack, "UPLOAD", tmp_path)
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    pack.write_archive("triton", [("b/x.py", b"1"), ("a/x.json", b"{}")])
    with tarfile.open(tmp_path / "triton.tar.xz") as archive:
        assert sorted(archive.getnames()) == ["a/x.json", "b/x.py"]
    monkeypatch.setitem(pack.LIMITS, "triton", 100_000)
    with pytest.raises(SystemExit, match="larger than"):
        pack.write_archive("triton", [("noise", os.urandom(101_000))])


def test_every_pin_is_exact_and_sglang_finds_our_entry_points() -> None:
    lines = (Path(pack.__file__).parent / "packages.txt").read_text().splitlines()
    assert all(line.count("==") == 1 for line in lines if not line.startswith("#"))
    files = {path: content.decode() for path, content in pack.own_metadata()}
    (points,) = (text for path, text in files.items() if path.endswith("entry_points.txt"))
    assert "[sglang.srt.plugins]\ndiffxkv = sglang_diffxkv.plugin:register" in points


def test_cache_is_moved(tmp_path: Path) -> None:
    (tmp_path / "KEY").mkdir()
    group = tmp_path / "KEY/__grp__attend.json"
    group.write_text(json.dumps({"child_paths": {"attend.cubin": "/elsewhere/KEY/attend.cubin"}}))
    assert unpack.move_cache(tmp_path) == 1
    moved = json.loads(group.read_text())["child_paths"]
    assert moved == {"attend.cubin": str(tmp_path / "KEY/attend.cubin")}


def test_a_hang_costs_its_own_limit(tmp_path: Path) -> None:
    """Grandchildren are ended, too; the table is there after every step."""
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    hang = f"import subprocess, sys; subprocess.run({sleep})"
    steps = [
        remote.Step("hang", 1.0, ("-c", hang)),
        remote.Step("sees", 20.0, ("-c", "print(open('call.md').read())"), output="seen.txt"),
        remote.Step("tool", 1.0, (), ("no-such-tool",)),
    ]
    begin = time.monotonic()
    env = dict(os.environ)
    os.chdir(tmp_path)
    assert not remote.perform("call", steps, tmp_path, env)
    assert time.monotonic() - begin < 20
    assert "ENDED after 1 s" in (tmp_path / "seen.txt").read_text()
    table = (tmp_path / "call.md").read_text()
    assert "| sees | 20 |" in table and "skipped: no no-such-tool here" in table


@pytest.mark.parametrize(("error", "red"), [(0.5, False), (math.nan, True), (math.inf, True)])
def test_a_failed_tolerance_is_timed_all_the_same(error: float, red: bool, tmp_path: Path) -> None:
    results = Results(tmp_path, "")
    results.add("verify-decode-1", CHECK | {"passed": False, "error": error, "lse_error": 0.0})
    results.add("verify-pack-1", {"error": "ended: it took longer than it may", "late": True})
    assert results.red() == (["decode"] if red else [])
    assert len(results.failures()) == 2


def test_results_are_there_after_every_figure(tmp_path: Path) -> None:
    results = Results(tmp_path, "")
    results.add("machine", {"facts": {"device": "X"}})
    for i in range(3):
        results.add("arena", {"skipped": f"figure {i}"})
        found = json.loads((tmp_path / "gpu_x.json").read_text())
        assert len(found["arena"]) == i + 1
        assert f"figure {i}" in (tmp_path / "gpu_x.md").read_text()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["gpu_x.json", "gpu_x.md"]


SECTION = """
import json, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1]) if "--first" in sys.argv else 0
for i in range(first, 4):
    if i == 1 and {hang}:
        time.sleep(60)
    print(json.dumps({{"done": i}}), flush=True)
    if i == 1:
        sys.exit({lost})
"""


@pytest.mark.parametrize(("hang", "done"), [(False, [0, 1, 2, 3]), (True, [0, 2, 3])])
def test_sections_go_on_behind_what_hangs_or_loses_the_device(
    hang: bool, done: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "section.py"
    script.write_text(SECTION.format(hang=hang, lost=children.LOST))
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(children.subprocess, "Popen", start)
    results = Results(tmp_path, "")
    Child("verify-pack-1", time.time() + 60, (), results, silence=3.0).wait()
    records = results.sections["verify-pack-1"]
    assert [x["done"] for x in records if "done" in x] == done
    others = [x for x in records if "done" not in x]
    assert others == (
        [{"error": "ended: nothing for 3 s", "late": False}]
        if hang
        else [{"restarted": "the device was lost"}]
    )
    assert bool(results.red()) == hang


def test_absent_packages_can_be_imported_but_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "ABSENT", ("no_such_package",))
    monkeypatch.setattr(sys, "meta_path", [stand_ins.Finder(), *sys.meta_path])
    module = import_module("no_such_package.part")
    annotation = module.Thing | None
    assert annotation is None and not isinstance(3, module.Thing)
    type("Derived", (), {"x": module.scalar_types.uint4})
    with pytest.raises(RuntimeError, match=r"no_such_package\.part\.kernel is called"):
        module.kernel(1)
    for name in [x for x in sys.modules if x.startswith("no_such_package")]:
        del sys.modules[name]


def test_a_second_try_does_without_flashinfer(tmp_path: Path) -> None:
    (tmp_path / "a/flashinfer").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    path = [str(tmp_path / name) for name in "ab"]
    assert kinds.without_flashinfer(os.pathsep.join(path)) == path[1]
    tiny, full = (kinds.token_bytes(kinds.GPU, kinds.Kind(x, None, ())) for x in (False, True))
    assert (tiny, full) == (8 * 4 * 128 * 2 * 2, 128 << 10)


def test_page_of_servers_that_did_not_start() -> None:
    record = {
        "device": "X",
        "seconds": 9.0,
        "memory_bytes": 1 << 30,
        "loads": [{"name": "memory-bound", "requests": 2, "prompt": 3, "output": 4}],
        "failed: start of stock": "log\nRuntimeError: no kernel image\nended",
        "throughput, memory-bound": {"ours 8B": [3.0, 4.0], "stock 8B": [2.0]},
        "ratio to stock, memory-bound": {"ours 8B": 1.75},
        "equality, lossless": {
            name: {"alone": "1 of 2", "together": "2 of 2", "all_alone": False}
            for name in ("stock", "ours, no graphs")
        },
        "syncs": {"ours": {"decode_steps": 10, "syncs": {"a.py:3": 20}}},
    }
    page = report.report(record)
    assert "- **start of stock: RuntimeError: no kernel image**" in page
    assert "- **lossless outputs of ours, no graphs differ: 1 of 2 are equal**" in page
    assert "outputs of stock differ" not in page
    assert "| ours 8B | 3 | 4 | 1.75 |" in page and "| stock 8B | 2 | – | – |" in page
    assert "| a.py:3 | 2 |" in page


def test_hidden_waits_are_counted_by_line_in_decode_steps_only(tmp_path: Path) -> None:
    class Scheduler:
        def run_batch(self, batch: Any) -> str:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
            return "ran"

    def batch(is_decode: bool) -> Any:
        return SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: is_decode))

    path = tmp_path / "syncs.json"
    with warnings.catch_warnings():
        syncs.Watch(path).install(Scheduler)
        warnings.simplefilter("ignore")
        for i in range(syncs.SKIPPED + syncs.STEPS // 2):
            assert Scheduler().run_batch(batch(True)) == "ran"
            if i == 1:
                Scheduler().run_batch(batch(False))
    found = json.loads(path.read_text())
    assert found["decode_steps"] == syncs.STEPS // 2
    ((site, count),) = found["syncs"].items()
    assert "test_gpu_remote.py" in site and count == syncs.STEPS // 2 - 1
