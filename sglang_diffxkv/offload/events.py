# SPDX-License-Identifier: Apache-2.0
"""Who is told when cached pages move between the device, the host and the disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class LevelEvents(Protocol):
    """Pages are named by their keys (`offload.keys`): int64 [N, 2] on any device, in any order, or
    16 bytes each. Keys that no page in SGLang's radix tree had are ignored.
    """

    def offloaded(self, keys: torch.Tensor) -> None:
        """The payload of cached pages has gone from the device to the host."""

    def loaded_back(self, keys: torch.Tensor) -> None:
        """The payload of cached pages has come from the host to the device."""

    def adopting(self) -> AbstractContextManager[None]:
        """What the tree takes in meanwhile lies on the host: pages that came from the disk."""

    def backing_up(self, keys: Sequence[bytes]) -> None:
        """Cached pages are about to be written; one of the two below follows, for each page."""

    def backed_up(self, keys: Sequence[bytes]) -> None:
        """Pages are on the disk; told twice is as once. May be called on any thread."""

    def dropped_from_disk(self, keys: Sequence[bytes]) -> None:
        """Pages fell off the disk, or were not written after all. On any thread, too."""


class NoEvents:
    """Nobody is told."""

    def offloaded(self, keys: torch.Tensor) -> None:
        pass

    def loaded_back(self, keys: torch.Tensor) -> None:
        pass

    def adopting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backing_up(self, keys: Sequence[bytes]) -> None:
        pass

    def backed_up(self, keys: Sequence[bytes]) -> None:
        pass

    def dropped_from_disk(self, keys: Sequence[bytes]) -> None:
        pass
