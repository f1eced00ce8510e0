# SPDX-License-Identifier: Apache-2.0
"""The versions of Triton that kernels are compiled with; all but the first lie beside the others.

python -m bench.gpu.compile.compilers    # installs what is missing
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

VERSIONS = ("3.8.0", "3.6.0")
"""The environment's (constraints.txt), and the one that GPU machines with torch 2.11 have."""


def folder(version: str) -> Path | None:
    """Where a version is installed; None for the environment's."""
    return None if version == VERSIONS[0] else ROOT / ".triton" / version


def install() -> None:
    """Install the versions that are missing."""
    for version in VERSIONS[1:]:
        subprocess.run([ROOT / ".ci/triton", version], check=True)


def environment(version: str) -> dict[str, str]:
    """Variables of a process that imports this version."""
    found = dict(os.environ)
    found.pop("TRITON_INTERPRET", None)
    path = [*filter(None, [found.get("PYTHONPATH")]), str(ROOT)]
    if place := folder(version):
        path.insert(0, str(place))
    return found | {"PYTHONPATH": os.pathsep.join(path)}


if __name__ == "__main__":
    install()
