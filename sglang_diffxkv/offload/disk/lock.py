# SPDX-License-Identifier: Apache-2.0
"""One process a folder: a lock that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderInUse(RuntimeError):
    """Another process has the folder."""


class FolderLock:
    """Held until `release`; the file stays, since another process may wait to open it."""

    def __init__(self, folder: Path) -> None:
        """Raises FolderInUse; OSError if the folder cannot be written to."""
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._fd, 20, 0).decode(errors="replace")
            os.close(self._fd)
            raise FolderInUse(f"{folder} is in use by process {owner or '?'}") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._fd)
