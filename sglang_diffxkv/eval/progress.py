# SPDX-License-Identifier: Apache-2.0
"""How far an evaluation is: a bar with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from typing import Self

from tqdm import tqdm


class Progress:
    """A bar on stderr, where that is a terminal, and lines above it."""

    def __init__(self, count: int, unit: str = " requests") -> None:
        # The mean rate since the start: servers' starts are in it, as they are in what is left.
        self._bar = tqdm(total=count, unit=unit, smoothing=0, disable=None, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def describe(self, text: str) -> None:
        """Say before the bar what is going on."""
        self._bar.set_description(text)

    def advance(self) -> None:
        """One more is done."""
        self._bar.update()

    def line(self, text: str) -> None:
        """Print a line, on a terminal or not."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
