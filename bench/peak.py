# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a piece of work on the host."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had allocated while ``work`` ran, above what it had before.

    From the allocator's own events, so what operations allocate inside themselves counts.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    levels = [int(change["Total Allocated"]) for change in changes]
    before = levels[0] - int(changes[0]["Bytes"])
    return max(levels) - before
