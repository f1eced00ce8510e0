# SPDX-License-Identifier: Apache-2.0
"""What the device has done with pages, and the ledger does not know yet.

How much a page held, or takes when it is sealed, only the device knows. Nobody waits for that: it
is copied to the host behind the work, and settled when it has surely come.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sglang_diffxkv.kernels.gpu.transfer import Download
from sglang_diffxkv.pool.ledger import Ledger
from sglang_diffxkv.pool.page_states import PageStates
from sglang_diffxkv.pool.totals import Totals


class PageStateError(RuntimeError):
    """A page was used in a way its state does not allow (double free, write when sealed ...)."""


class Released(NamedTuple):
    """Pages that were freed in a step; ``states``: what they were, for `PageStates`."""

    step: int
    pages: int
    states: Download


class Sealed(NamedTuple):
    """Pages that were sealed in a step under a plan; ``sums``: int [2], how many of them and the
    frames allocated to them."""

    step: int
    plan: int
    sums: Download


class Unsettled:
    """In the order in which it happened. Until it is settled, the ledger gives out less than it
    could: freed pages count as held, sealed ones as open."""

    def __init__(self, ledger: Ledger, totals: Totals) -> None:
        self._ledger, self._totals = ledger, totals
        self._events: deque[Released | Sealed] = deque()

    def add(self, event: Released | Sealed) -> None:
        self._events.append(event)

    @property
    def released_pages(self) -> int:
        """Freed pages that the ledger counts as held."""
        return sum(event.pages for event in self._events if isinstance(event, Released))

    def settle(self, before: int | None = None) -> int:
        """Tell the ledger, waiting for the device where it must.

        Args:
            before: only what was done before that step; None: all.

        Returns:
            How many pages turn out to have been sealed.

        Raises:
            PageStateError: a page was freed that was free.
        """
        sealed = 0
        while self._events and (before is None or self._events[0].step < before):
            event = self._events.popleft()
            if isinstance(event, Released):
                self._release(PageStates(event.states))
            else:
                sealed += self._seal(event)
        return sealed

    def _release(self, states: PageStates) -> None:
        if not states.in_use.all():
            raise PageStateError("release: page is already free")
        self._totals.by_quality.subtract(states.by_quality())
        self._totals.by_plan.subtract(states.by_plan())
        fresh, demoted = (states.sealed_share(demoted=x) for x in (False, True))
        on_host = [states.host_share(demoted=x) for x in (False, True)]
        self._ledger.release(states.open_share(), fresh, demoted, on_host)

    def _seal(self, event: Sealed) -> int:
        pages, frames = event.sums.values().tolist()
        self._totals.by_plan[event.plan] += pages
        self._ledger.seal(pages, frames)
        return int(pages)
