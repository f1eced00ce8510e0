# SPDX-License-Identifier: Apache-2.0
"""Kill -9 of a process that writes to the disk store, at random points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nothing_wrong_and_nothing_lost_after_kill_9(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-m", "tests.support.disk_kills", str(tmp_path), "--kills", "200"]
    # `-m` finds tests/ in the current folder only; nothing there hides what this one imports.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [*command, "--seed", str(seed)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 200 and found["records"] > 2000 and found["told last"] > 200
