# SPDX-License-Identifier: Apache-2.0
"""What the bench has found: records by section, and what follows from them."""

from __future__ import annotations

import math
from typing import Any

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


class Records:
    """Records by section, in the order in which they came."""

    def __init__(self) -> None:
        self.sections: dict[str, list[Record]] = {}

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

    def _of_machine(self, key: str) -> Record:
        entries = self.sections.get("machine", [])
        return next((x[key] for x in entries if key in x), {})


def _errors(entries: list[Record]) -> list[Record]:
    """Errors that ended a section, other than a check's; ``late`` where only time was short."""
    return [x for x in entries if "error" in x and "operation" not in x]
