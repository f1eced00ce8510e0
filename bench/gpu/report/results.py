# SPDX-License-Identifier: Apache-2.0
"""What the bench has found so far, written anew after every record."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.gpu.report.markdown import report
from bench.gpu.report.records import Record, Records


class Results(Records):
    """Records that are kept in files.

    Args:
        folder: where gpu_<device>.{json,md} go.
        arguments: of the command line, for the report.
    """

    def __init__(self, folder: Path, arguments: str) -> None:
        super().__init__()
        self._folder = folder
        self._command = f"bench/gpu/run.sh bench.gpu {arguments}".strip()
        self._begin = time.time()
        self._lock = threading.Lock()

    def add(self, section: str, record: Record) -> None:
        """Take in a record; write everything once it is known what the device is called."""
        with self._lock:
            self.sections.setdefault(section, []).append(_finite(record))
            self._tell(section, record)
            if self.facts():
                self._write()

    def close(self) -> None:
        """Write what there is of a device that nobody could name."""
        with self._lock:
            if not self.facts():
                self._write()

    def log(self, message: str) -> None:
        """Tell whoever watches."""
        print(f"[{time.time() - self._begin:5.0f} s] {message}", file=sys.stderr, flush=True)

    def markdown(self) -> str:
        """The report."""
        with self._lock:
            return report(self, self._command, time.time() - self._begin)

    def _write(self) -> None:
        slug = re.sub(r"[^a-z0-9]+", "_", self.facts().get("device", "unknown").lower()).strip("_")
        self._folder.mkdir(parents=True, exist_ok=True)
        seconds = time.time() - self._begin
        whole = {"command": self._command, "seconds": round(seconds, 1), **self.sections}
        whole["failures"] = self.failures()
        path = self._folder / f"gpu_{slug}.json"
        write_whole(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        write_whole(path.with_suffix(".md"), report(self, self._command, seconds))

    def _tell(self, section: str, record: Record) -> None:
        if section == "machine" and "subnormals" in record and not record["subnormals"]["exact"]:
            self.log(f"!!! {self.failures()[0]} !!!")
        self.log(f"{section}: {json.dumps(record)[:240]}")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever cuts the run off finds the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def _finite(value: Any) -> Any:
    """The same with numbers that JSON has; NaN and inf become text."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
