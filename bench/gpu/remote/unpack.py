# SPDX-License-Identifier: Apache-2.0
"""Unpacks what `pack` packed, once per machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
UPLOAD = ROOT / "build/gpu-upload"
WORK = Path(os.environ.get("GPU_WORK", "/tmp/diffxkv-gpu"))
SITE, FLASHINFER, TRITON_CACHE = WORK / "site", WORK / "flashinfer", WORK / "triton"
FOLDERS = {"sglang": SITE, "flashinfer": FLASHINFER, "triton": TRITON_CACHE}
DONE = WORK / "unpacked"


def unpack(name: str) -> str:
    """One archive, if it is there."""
    path = UPLOAD / f"{name}.tar.xz"
    if not path.exists():
        return f"{path.name} was not uploaded"
    FOLDERS[name].mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as archive:
        archive.extractall(FOLDERS[name], filter="data")
    return f"{path.name} is unpacked"


def move_cache(folder: Path) -> int:
    """Groups of Triton's cache name their files by absolute path: make it this folder's.

    Returns:
        How many kernels there are.
    """
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        children = json.loads(group.read_text())["child_paths"]
        moved = {name: str(group.parent / name) for name in children}
        group.write_text(json.dumps({"child_paths": moved}))
    return len(groups)


def main() -> None:
    if DONE.exists():
        print("unpacked already")
        return
    with ThreadPoolExecutor() as pool:
        print(*pool.map(unpack, FOLDERS), sep="\n")
    print(f"{move_cache(TRITON_CACHE)} kernels in Triton's cache")
    # The servers' processes start at the same time: none of them should compile all of it.
    compiled = [str(folder) for folder in (SITE, FLASHINFER) if folder.exists()]
    if compiled:
        command = [sys.executable, "-m", "compileall", "-q", "-j0", *compiled]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    DONE.parent.mkdir(parents=True, exist_ok=True)
    DONE.touch()


if __name__ == "__main__":
    main()
