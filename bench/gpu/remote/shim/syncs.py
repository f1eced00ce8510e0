# SPDX-License-Identifier: Apache-2.0
"""Which lines make the host wait for the GPU in decode steps, as PyTorch's sync debug mode sees it.

It sees copies to and from pageable memory, ``item`` and the like; not waits for events, which is
how the overlapping scheduler waits for the step before the last.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

LOG = "SYNC_LOG"
"""Names the environment variable with the path of the file that is written."""

SKIPPED, STEPS = 40, 200
"""Decode steps before it counts, and that it counts in."""


class Watch:
    """Wraps ``Scheduler.run_batch``; counts warnings by the innermost line outside of torch."""

    def __init__(self, path: Path) -> None:
        self._path, self._decoded, self._sites = path, 0, Counter[str]()

    def install(self, scheduler: Any) -> None:
        run_batch = scheduler.run_batch

        @functools.wraps(run_batch)
        def watched(self_: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._step(batch.forward_mode.is_decode())
            return run_batch(self_, batch, *args, **kwargs)

        scheduler.run_batch = watched

    def _step(self, is_decode: bool) -> None:
        """Switch to warnings from decode step `SKIPPED` on, `STEPS` long; prefill is left out."""
        import torch

        counting = is_decode and SKIPPED <= self._decoded < SKIPPED + STEPS
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("warn" if counting else "default")
        if counting and self._decoded == SKIPPED:
            warnings.simplefilter("always")
            warnings.showwarning = self._note
        self._decoded += is_decode
        if is_decode and self._decoded in (SKIPPED + 1, SKIPPED + STEPS // 2, SKIPPED + STEPS):
            steps = self._decoded - SKIPPED
            found = {"decode_steps": steps, "syncs": dict(self._sites.most_common(20))}
            self._path.write_text(json.dumps(found) + "\n")

    def _note(self, message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = traceback.extract_stack()[:-1]
        ours = [
            x for x in frames if "/torch/" not in x.filename and "warnings.py" not in x.filename
        ]
        self._sites[" < ".join(f"{_tail(x.filename)}:{x.lineno}" for x in ours[-1:-4:-1])] += 1


def _tail(path: str) -> str:
    return "/".join(path.split("/")[-3:])


def install(scheduler: Any) -> None:
    """If `LOG` is set."""
    if path := os.environ.get(LOG):
        Watch(Path(path)).install(scheduler)
