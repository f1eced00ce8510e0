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

from bench.gpu.report.results import Results

GRACE_S = 8.0
"""How long a section may outlast its deadline: it looks at the clock between measurements only."""

SILENCE_S = 60.0
"""How long a section that can be gone on with may take for a record; compiling takes part of it."""

LOST = 3
"""Exit status of a section that lost its device, and can be gone on with in a new process."""


class Child:
    """`bench.gpu.section` in process groups of its own, until it ends or is late.

    Args:
        deadline: of `time.time`.
        silence: where given, a section whose records are one for each piece of work: one that
            loses its device or hangs for so many seconds is started anew behind that piece.
    """

    def __init__(
        self,
        name: str,
        deadline: float,
        arguments: Sequence[str],
        results: Results,
        silence: float | None = None,
    ) -> None:
        self.name, self.deadline, self.results = name, deadline, results
        self._silence = silence
        command = [sys.executable, "-m", "bench.gpu.section", name, "--deadline", str(deadline)]
        self._command = [*command, *arguments]
        self._done = 0
        self._launch()

    def _launch(self) -> None:
        first = ["--first", str(self._done)] if self._done else []
        self._failed, self._heard = False, time.time()
        self._process = subprocess.Popen(
            [*self._command, *first], stdout=subprocess.PIPE, text=True, start_new_session=True
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
                    self._done += 1
                    self._heard = time.time()
                    self.results.add(self.name, record)

    def wait(self) -> None:
        """Until it ends; it is ended where it is later than `GRACE_S` after its deadline."""
        while not self._ended():
            self._launch()

    def _ended(self) -> bool:
        """Wait for the process; False if another shall go on behind what it failed at."""
        late = self.deadline + GRACE_S
        while self._process.poll() is None and time.time() < late and not self._is_silent():
            self.wait_until(min(late, time.time() + 0.2))
        silent, hung = self._is_silent(), self._process.poll() is None
        if hung:
            self._failed = True
            self.stop()
        self._reader.join(GRACE_S)
        go_on = time.time() < self.deadline and (silent or self._process.returncode == LOST)
        if hung:
            what = f"nothing for {self._silence:.0f} s" if silent else "it took longer than it may"
            self.results.add(self.name, {"error": f"ended: {what}", "late": not silent})
            self._done += 1
        elif self._process.returncode == LOST and go_on:
            self.results.add(self.name, {"restarted": "the device was lost"})
        elif self._process.returncode and not self._failed:
            self.results.add(self.name, {"error": f"exit status {self._process.returncode}"})
        return not (self._silence and go_on)

    def _is_silent(self) -> bool:
        return self._silence is not None and time.time() - self._heard > self._silence

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
