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

from bench.gpu import pages

Record = dict[str, Any]

OPERATIONS = {
    "decode": ("decode",),
    "extend": ("extend_sealed", "extend_unpacked", "extend_open"),
    "score": ("score_open", "score_decode"),
    "pack": ("pack", "unpack", "copy_rows"),
    "arena": ("arena",),
}
"""What a group of checks is about."""


BACKGROUND = ("prebuild", "flashinfer")
"""Sections that compile ahead, on the CPU: what they fail at is compiled later, or left out."""


class Results:
    """Records by section, in the order in which they came.

    Args:
        folder: where gpu_<device>.{json,md} go.
        arguments: of the command line, for the report.
    """

    def __init__(self, folder: Path, arguments: str) -> None:
        self._folder = folder
        self._command = f"bench/gpu/run.sh bench.gpu {arguments}".strip()
        self._begin = time.time()
        self._lock = threading.Lock()
        self.sections: dict[str, list[Record]] = {}

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

    def facts(self) -> Record:
        """Of the machine; empty until they are known."""
        return self._of_machine("facts")

    def subnormals(self) -> Record:
        return self._of_machine("subnormals")

    def bandwidths(self) -> list[Record]:
        """By size, ascending."""
        entries = self.sections.get("machine", [])
        return [x["bandwidth"] for x in entries if "bandwidth" in x]

    def checks(self) -> list[Record]:
        """All checks that have a result; those of FlashInfer follow once it is built."""
        names = (k for k in self.sections if k.startswith(("verify-", "flashinfer")))
        sections = (self.sections[name] for name in names)
        return [record for section in sections for record in section if "operation" in record]

    def ready(self) -> list[str]:
        """What FlashInfer was built for, and whether the server's own use of it was checked."""
        entries = self.sections.get("flashinfer", [])
        checked = any(x.get("operation") == "open_prefill" for x in entries)
        return [x["ready"] for x in entries if "ready" in x] + ["open_prefill"] * checked

    def red(self) -> list[str]:
        """Operations that must not be timed: they crashed or hung, or gave NaN or infinity.

        One whose error is only too large, or whose checks took too long, is timed all the same:
        the report says so.
        """
        checks = [x for x in self.checks() if x.get("timed", True)]
        names = {x["operation"] for x in checks if not math.isfinite(float(x.get("error", "nan")))}
        ended = {
            section.split("-")[1]
            for section, entries in self.sections.items()
            if section.startswith("verify-") and any(not x.get("late") for x in _errors(entries))
        }
        for group in (names | ended) & OPERATIONS.keys():
            names |= set(OPERATIONS[group])
        return sorted(names)

    def failures(self) -> list[str]:
        """One line for everything that went wrong."""
        lines = []
        if self.subnormals() and not self.subnormals()["exact"]:
            lines.append("FP16 SUBNORMALS ARE NOT EXACT IN PRODUCTS: no kernel here can be right")
        for check in self.checks():
            if not check["passed"]:
                found = check.get("message") or f"error {check['error']}, LSE {check['lse_error']}"
                lines.append(f"{check['name']}: {found}")
        for section, entries in self.sections.items():
            if section in BACKGROUND:
                continue
            failed = [x for x in entries if "failed" in x and "constants" not in x]
            lines += [f"section {section}: {x['failed']}: {x['message']}" for x in failed]
            lines += [f"section {section}: {x['error']}" for x in _errors(entries)]
            wrong = [x for x in entries if "wrong" in x]
            lines += [f"section {section}: wrong with {x['constants']}" for x in wrong]
        return lines

    def markdown(self) -> str:
        """The report."""
        with self._lock:
            return pages.report(self, self._command, time.time() - self._begin)

    def _of_machine(self, key: str) -> Record:
        entries = self.sections.get("machine", [])
        return next((x[key] for x in entries if key in x), {})

    def _write(self) -> None:
        slug = re.sub(r"[^a-z0-9]+", "_", self.facts().get("device", "unknown").lower()).strip("_")
        self._folder.mkdir(parents=True, exist_ok=True)
        seconds = time.time() - self._begin
        whole = {"command": self._command, "seconds": round(seconds, 1), **self.sections}
        whole["failures"] = self.failures()
        path = self._folder / f"gpu_{slug}.json"
        write_whole(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        write_whole(path.with_suffix(".md"), pages.report(self, self._command, seconds))

    def _tell(self, section: str, record: Record) -> None:
        if section == "machine" and "subnormals" in record and not record["subnormals"]["exact"]:
            self.log(f"!!! {self.failures()[0]} !!!")
        self.log(f"{section}: {json.dumps(record)[:240]}")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever cuts the run off finds the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def _errors(entries: list[Record]) -> list[Record]:
    """Errors that ended a section, other than a check's; ``late`` where only time was short."""
    return [x for x in entries if "error" in x and "operation" not in x]


def _finite(value: Any) -> Any:
    """The same with numbers that JSON has; NaN and inf become text."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
