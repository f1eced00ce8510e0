# SPDX-License-Identifier: Apache-2.0
"""One process a folder: a lock that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

_RETRY_SECONDS = 0.01


class FolderInUse(RuntimeError):
    """Another process has the folder."""


class FolderLock:
    """Held until `release`; the file stays, since another process may wait to open it."""

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        """
        Args:
            patience: how many seconds to wait for another that has it: who only looks whether a
                folder is abandoned has it for a moment.

        Raises:
            FolderInUse: another has it.
            OSError: the folder cannot be written to.
        """
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() >= until:
                owner = os.pread(self._fd, 20, 0).decode(errors="replace")
                os.close(self._fd)
                raise FolderInUse(f"{folder} is in use by process {owner or '?'}")
            time.sleep(_RETRY_SECONDS)
        with suppress(OSError):  # a full disk: only the refusal of others says less
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._fd)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
