# SPDX-License-Identifier: Apache-2.0
"""What has happened in a pool since the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Events since the start."""

    opened: int = 0
    sealed: int = 0
    sealed_under_pressure: int = 0
    released: int = 0
    reclaims: int = 0
    evicted: int = 0
    demoted: int = 0
    """Pages, each time one is."""
    frames_demoted: int = 0
    """Frames that demotion has freed."""
    offloaded: int = 0
    """Pages, to host memory, each time one is."""
    loaded_back: int = 0
    """Pages, from there."""
    prefetched: int = 0
    """Pages, from the disk to host memory."""
