# SPDX-License-Identifier: Apache-2.0
"""Packs what the fifteen-minute run takes along, for a machine without network: build/gpu-upload.

    make gpu-pack PYTHON=build/gpu-python/bin/python

PYTHON is an environment like the machine's (machine.txt): Triton's cache is only hit where Python,
Triton and the kernels are the same, and FlashInfer's kernels are compiled for its Python and torch.
With any other both are left out, and compiled on the machine in its own time.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build"
UPLOAD, WHEELS, TRITON_CACHE = BUILD / "gpu-upload", BUILD / "gpu-wheels", BUILD / "gpu-triton"
FLASHINFER_BUILD = BUILD / "gpu-flashinfer"

LIMITS = {"sglang": 20e6, "flashinfer": 16e6, "triton": 9e6}
"""Bytes of each archive; together they fit into an upload of 64 MiB beside the checkout."""

CAPABILITY = 90
PLATFORMS = ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27",
             "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014",
             "manylinux_2_5", "manylinux1")  # fmt: skip

DROPPED = (
    "sglang-*.dist-info/RECORD",
    "flashinfer_python-*.dist-info/RECORD",
    "*.dist-info/licenses/*",
    "*/__pycache__/*",
    "*.pyi",
    "sglang/srt/rust_extensions/*.so",
    "sglang/srt/mem_cache/rust_tree_core/*",
    "sglang/multimodal_gen/*",
    "sglang/test/*",
    "sglang/benchmark/*",
    "sglang/kernels/jit/benchmark/*",
    "sglang/kernels/ops/diffusion/[!_]*",
    "sglang/srt/models/*",
    "flashinfer/data/*",
    "flashinfer/experimental/*",
    "flashinfer/fused_moe/backends/cudnn_frost/*",
    "flashinfer/moe_ep/kernel_src/*",
    "b12x/*",
    "build_*.py",
)
"""Patterns of files that are left behind."""

KEPT = (
    "sglang/srt/models/__init__.py",
    "sglang/srt/models/registry.py",
    "sglang/srt/models/utils.py",
    "sglang/srt/models/llama.py",
    "sglang/srt/models/qwen[23]*.py",  # imported by the servers' own modules
    "flashinfer/fused_moe/backends/cudnn_frost/*.py",
    "flashinfer/experimental/*.py",
    "flashinfer/data/include/*",
    "flashinfer/data/cutlass/include/*",
    "flashinfer/data/cutlass/tools/util/include/*",
    "flashinfer/data/cccl/*/include/*",
    "flashinfer/data/cccl/cub/*",
    "flashinfer/data/cccl/thrust/*",
    "flashinfer/data/spdlog/include/*",
    "flashinfer/data/csrc/batch_decode*",
    "flashinfer/data/csrc/batch_prefill*",
    "flashinfer/data/csrc/cascade.cu",
    "flashinfer/data/csrc/flashinfer_cascade_binding.cu",
    "flashinfer/data/csrc/flashinfer_page_binding.cu",
    "flashinfer/data/csrc/page.cu",
    "flashinfer/data/csrc/*.h",
    "flashinfer/data/csrc/*.inc",
)
"""Exceptions from `DROPPED`; of FlashInfer, sources of attention, should it be compiled there."""

AOT = "flashinfer/data/aot"
"""Where FlashInfer looks for ready-made kernels."""


def is_kept(path: str) -> bool:
    """Whether a file of a wheel is packed."""
    if any(fnmatch(path, pattern) for pattern in KEPT):
        return True
    return not any(fnmatch(path, pattern) for pattern in DROPPED)


def download() -> list[Path]:
    """The pinned wheels, from the registry that pip is set up for."""
    tags = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
               "--python-version=3.12", "--implementation=cp", *tags]  # fmt: skip
    shutil.rmtree(WHEELS, ignore_errors=True)
    subprocess.run([*command, f"-d{WHEELS}", "-r", HERE / "packages.txt"], check=True)
    return sorted(WHEELS.glob("*.whl"))


def members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of what is packed of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.is_dir() and is_kept(info.filename):
                yield info.filename, archive.read(info)


def own_metadata() -> Iterator[tuple[str, bytes]]:
    """What SGLang finds this package's entry points by, where it is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    yield (
        f"{folder}/METADATA",
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
    ]
    yield f"{folder}/entry_points.txt", "\n".join(lines).encode()


def files_of(folder: Path, prefix: str, patterns: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of a folder's files whose names match."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            yield f"{prefix}{path.relative_to(folder)}", path.read_bytes()


def write_archive(name: str, entries: Iterable[tuple[str, bytes]]) -> None:
    """A tar.xz in `UPLOAD`; exits if it is larger than it may be."""
    path = UPLOAD / f"{name}.tar.xz"
    with tarfile.open(path, "w:xz", preset=6) as archive:
        # Like beside like, which is what compresses best.
        for target, content in sorted(entries, key=lambda x: (Path(x[0]).suffix, x[0])):
            info = tarfile.TarInfo(target)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size / 1e6:.1f} MB", flush=True)
    if size > LIMITS[name]:
        sys.exit(f"{path} is larger than {LIMITS[name] / 1e6:.0f} MB")


def is_like_the_machine() -> bool:
    """Whether this Python has what machine.txt asks for, of what decides whether caches fit."""
    asked = dict(line.split("==") for line in (HERE / "machine.txt").read_text().splitlines()
                 if "==" in line)  # fmt: skip
    try:
        same = all(metadata.version(name) == asked[name] for name in ("torch", "triton"))
    except metadata.PackageNotFoundError:
        return False
    return same and sys.version_info[:2] == (3, 12)


def fill_triton_cache() -> None:
    """Compile the kernels that ship, and those of the sweep."""
    run = [str(HERE.parent / "run.sh"), "bench.gpu.compile.prebuild", str(CAPABILITY)]
    env = {"PYTHON": sys.executable, "TRITON_CACHE_DIR": str(TRITON_CACHE)}
    subprocess.run(run, env=os.environ | env, check=True)


def build_flashinfer(site: Path) -> None:
    """Compile FlashInfer's kernels from an unpacked site; needs nvcc, takes minutes."""
    stubs = FLASHINFER_BUILD / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    # The driver's library is linked to, and there may be no driver here.
    empty = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(stubs / "libcuda.so")]
    subprocess.run([*empty, "-x", "c", "/dev/null"], check=True)
    env = {
        "PYTHONPATH": f"{site}:{ROOT}",
        "FLASHINFER_WORKSPACE_BASE": str(FLASHINFER_BUILD),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "LIBRARY_PATH": str(stubs),
        "CPATH": str(metadata.distribution("torch").locate_file("nvidia/cu13/include")),
        "MAX_JOBS": str(max(1, (os.cpu_count() or 2) // 2)),
    }
    subprocess.run([sys.executable, str(HERE / "flashinfer_kernels.py")],
                   env=os.environ | env, check=True)  # fmt: skip


def main() -> None:
    begin = time.monotonic()
    UPLOAD.mkdir(parents=True, exist_ok=True)
    wheels = download()
    ours = [wheel for wheel in wheels if not wheel.name.startswith("flashinfer")]
    site = [entry for wheel in ours for entry in members(wheel)] + list(own_metadata())
    write_archive("sglang", site)
    flashinfer = [x for wheel in wheels if wheel not in ours for x in members(wheel)]
    alike = is_like_the_machine()
    if not alike:
        print("this is no Python like the machine's: no cache of Triton's, no FlashInfer kernels")
    elif shutil.which("nvcc") is None:
        print("no nvcc here: FlashInfer's kernels are compiled on the machine")
    else:
        unpacked = FLASHINFER_BUILD / "site"
        for target, content in site + flashinfer:
            path = unpacked / target
            if not path.exists():  # else ninja takes all of its sources for new
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        build_flashinfer(unpacked)
        built = FLASHINFER_BUILD.glob(".cache/flashinfer/*/*/cached_ops")
        flashinfer += [x for folder in built for x in files_of(folder, f"{AOT}/", ["*.so"])]
    write_archive("flashinfer", flashinfer)
    if alike:
        fill_triton_cache()
        write_archive("triton", files_of(TRITON_CACHE, "", ["*.cubin", "*.json"]))
    print(f"packed in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
