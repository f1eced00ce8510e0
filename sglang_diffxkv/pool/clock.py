# SPDX-License-Identifier: Apache-2.0
"""The hand of a clock: where the search for cold entries of a table goes on."""

from __future__ import annotations

from collections.abc import Iterator


class ClockHand:
    """Walks round a table in windows, as CLOCK page replacement does.

    What is coldest in a window stands for what is coldest at all: the search costs as much as it
    finds, however large the table. A table of one window is searched whole.
    """

    def __init__(self, entries: int, window: int) -> None:
        self._entries, self._window, self._at = entries, window, 0

    @property
    def all_windows(self) -> int:
        """How many make a round."""
        return -(-self._entries // self._window)

    def stretch(self, most: int) -> list[slice]:
        """Up to ``most`` windows, as the one or two slices that they make together."""
        parts: list[slice] = []
        for window in self.windows(most):
            if parts and parts[-1].stop == window.start:
                window = slice(parts.pop().start, window.stop)
            parts.append(window)
        return parts

    def windows(self, most: int | None = None) -> Iterator[slice]:
        """Up to ``most`` windows, or all, none twice; the hand moves as they are taken."""
        for _ in range(self.all_windows if most is None else min(most, self.all_windows)):
            start, end = self._at, min(self._at + self._window, self._entries)
            self._at = end % self._entries
            yield slice(start, end)
