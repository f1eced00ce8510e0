# SPDX-License-Identifier: Apache-2.0
"""Sections of the bench as child processes, whose records are taken in as they come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from bench.gpu.results import Results

GRACE_S = 8.0
"""How long a section may outlast its deadline: it looks at the clock between measurements only."""


class Child:
    """`bench.gpu.section` in a process group of its own, until it ends or is late.

    Args:
        deadline: of `time.time`.
    """

    def __init__(
        self, name: str, deadline: float, arguments: Sequence[str], results: Results
    ) -> None:
        self.name, self.deadline, self.results = name, deadline, results
        command = [sys.executable, "-m", "bench.gpu.section", name, "--deadline", str(deadline)]
        self._failed = False
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # FlashInfer and its build print, too.
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict):
                    self._failed |= "error" in record and len(record) == 1
                    self.results.add(self.name, record)

    def wait(self) -> None:
        """Until it ends; it is ended where it is later than `GRACE_S` after its deadline."""
        self.wait_until(self.deadline + GRACE_S)
        if self._process.poll() is None:
            self._failed = True
            self.results.add(self.name, {"error": "ended: it took longer than it may"})
            self.stop()
        self._reader.join(GRACE_S)
        if self._process.returncode and not self._failed:
            self.results.add(self.name, {"error": f"exit status {self._process.returncode}"})

    def wait_until(self, at: float) -> None:
        """Until it ends, or until a time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, at - time.time()))

    def stop(self) -> None:
        """End it and its own children, if it still runs."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
