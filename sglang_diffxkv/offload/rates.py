# SPDX-License-Identifier: Apache-2.0
"""How long something takes, from how long it took lately."""

from __future__ import annotations

import time
from collections.abc import Callable

FADE = 0.8
"""What is left of the weight of what was measured, each time more is."""
FORGET_SECONDS = 60.0
"""What was measured so long ago is no reason any more not to try again."""


class Rate:
    """Units per second, as of sums that fade."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._units = self._seconds = 0.0
        self._measured = clock() - FORGET_SECONDS

    def add(self, units: float, seconds: float) -> None:
        fade = FADE if self._is_known else 0.0
        self._units = self._units * fade + units
        self._seconds = self._seconds * fade + seconds
        self._measured = self._clock()

    def seconds(self, units: float) -> float | None:
        """For so many; None: it is not known."""
        if not self._is_known or not self._units:
            return None
        return units * self._seconds / self._units

    @property
    def _is_known(self) -> bool:
        return self._clock() - self._measured < FORGET_SECONDS
